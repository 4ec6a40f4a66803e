"""Programs that use a pool and then end, each in another way; what they see they leave as files for a row to read.

``python -m benchmarks.fault_scripts PROGRAM POOL START FOLDER``
"""

from __future__ import annotations

import sys
import threading
from concurrent.futures import wait
from pathlib import Path
from time import monotonic, sleep

from benchmarks import fault_tasks as tasks
from benchmarks.pools import Pool, open_pool

LIMIT_S = 8.0
STOP_S = 5.0
FULL_S = 0.5  # until a pipe that nobody reads is full


def await_file(folder: str, name: str) -> None:
    end = monotonic() + LIMIT_S
    while not (Path(folder) / name).exists():
        if monotonic() > end:
            raise TimeoutError(f"no {name} within {LIMIT_S:g} s")
        sleep(tasks.LOOK_S)


def tell(folder: str, name: str, words: object) -> None:
    """Leave the file ``name`` with ``words``."""
    (Path(folder) / f".{name}").write_text(str(words))
    (Path(folder) / f".{name}").rename(Path(folder) / name)


def raises(pool: Pool, folder: str) -> None:
    """Fail while one task sleeps and another spins."""
    kept = [pool.submit(tasks.sleep_on, folder, "asleep"), pool.submit(tasks.hold_the_gil, folder, "spinning")]
    await_file(folder, "asleep")
    await_file(folder, "spinning")
    raise RuntimeError(f"the script gives up on {len(kept)} tasks")


def interrupted_busy(pool: Pool, folder: str) -> None:
    """Wait for two tasks that sleep, as a script does that thinks of no Ctrl-C."""
    _wait_for_sleepers(pool, folder)


def interrupted_within(pool: Pool, folder: str) -> None:
    """The same in a ``with`` block, and Ctrl-C is caught around it."""
    try:
        with pool.block():
            _wait_for_sleepers(pool, folder)
    except KeyboardInterrupt:
        tell(folder, "interrupted", "")


def _wait_for_sleepers(pool: Pool, folder: str) -> None:
    futures = [pool.submit(tasks.sleep_on, folder, name) for name in ("one", "two")]
    await_file(folder, "one")
    await_file(folder, "two")
    tell(folder, "ready", "")
    wait(futures, tasks.LIMIT_S)
    sleep(tasks.LIMIT_S)  # Ctrl-C may end the tasks before it comes here


def interrupted_idle(pool: Pool, folder: str) -> None:
    """Sleep beside a pool that has nothing to do."""
    wait([pool.submit(tasks.nap, 0.1) for _ in range(2)], LIMIT_S)
    tell(folder, "ready", "")
    sleep(tasks.LIMIT_S)


def leaves_idle(pool: Pool, folder: str) -> None:
    """End with a pool whose work is done."""
    wait([pool.submit(tasks.note, folder, number, 0.01) for number in range(6)], LIMIT_S)


def leaves_busy(pool: Pool, folder: str) -> None:
    """End with work submitted."""
    for number in range(6):
        pool.submit(tasks.note, folder, number, 0.1)


def prints(pool: Pool, folder: str) -> None:
    """A task prints more than anybody reads."""
    pool.submit(tasks.flood, folder, "flood")
    _look_beside_the_flood(pool, folder)


def prints_under_a_limit(pool: Pool, folder: str) -> None:
    """The same, with a limit of a second on that task."""
    flood = pool.limited(1.0, tasks.flood, folder, "flood")
    _look_beside_the_flood(pool, folder, flood)


def _look_beside_the_flood(pool: Pool, folder: str, limited: object = None) -> None:
    await_file(folder, "flood")
    sleep(FULL_S)
    others = [pool.submit(tasks.echo, number) for number in range(10)]
    done = wait(others, LIMIT_S).done
    tell(folder, "others", sum(future.exception(0) is None for future in others if future in done))
    if limited is not None:
        wait([limited], LIMIT_S)  # type: ignore[list-item]
        over = limited.done() and isinstance(limited.exception(0), pool.timed_out)  # type: ignore[attr-defined]
        tell(folder, "limit", "held" if over else f"not held: {limited}")
        after = [pool.submit(tasks.hold, folder, f"after-{number}") for number in range(2)]
        await_file(folder, "after-0")
        await_file(folder, "after-1")
        tell(folder, "release", "")
        wait(after, LIMIT_S)
    began = monotonic()
    stopping = threading.Thread(target=pool.end, daemon=True)
    stopping.start()
    stopping.join(STOP_S)
    tell(folder, "stopped", "no" if stopping.is_alive() else monotonic() - began)


PROGRAMS = {
    program.__name__: program
    for program in (
        raises,
        interrupted_busy,
        interrupted_within,
        interrupted_idle,
        leaves_idle,
        leaves_busy,
        prints,
        prints_under_a_limit,
    )
}

if __name__ == "__main__":
    kept = open_pool(sys.argv[2], 2, sys.argv[3])  # as long as the program lives
    PROGRAMS[sys.argv[1]](kept, sys.argv[4])
