"""How soon one death is told, and what else it costs: from SIGKILL of a worker to the failure of its future.

``python -m benchmarks.latency [--json FILE]``.  Two workers with a running task each and 12 tasks queued;
one worker is killed.  Its future fails; how many of the other 13 tasks succeed is counted too.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from concurrent.futures import Future
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from time import monotonic, perf_counter, sleep
from typing import Any, NamedTuple

from benchmarks.pools import LIMIT_S, Pool, contestants, heading, in_turns, nothing, open_pool, versions

REPEATS = 20
QUEUED = 12
LOOK_S = 0.005


class Death(NamedTuple):
    """What one killed worker did: milliseconds until its future failed, and how many others succeeded."""

    milliseconds: float
    others_done: int


def hold(folder: str, name: str) -> int:
    """Say that this task runs, and in which process, and keep running until ``release`` is there."""
    place = Path(folder)
    being_written = place / f".{name}"
    being_written.write_text(str(os.getpid()))
    being_written.rename(place / name)
    _await(place / "release")
    return 0


def _await(path: Path) -> None:
    end = monotonic() + LIMIT_S
    while not path.exists():
        if monotonic() > end:
            raise TimeoutError(f"{path.name} did not appear in {LIMIT_S:g} s")
        sleep(LOOK_S)


def one_death(name: str) -> Death:
    """Kill one of two busy workers of a new pool."""
    pool = open_pool(name, workers=2)
    try:
        with TemporaryDirectory() as folder:
            return _kill_and_look(pool, Path(folder))
    finally:
        pool.close()


def _kill_and_look(pool: Pool, folder: Path) -> Death:
    victim, survivor = (pool.submit(hold, str(folder), name) for name in ("victim", "survivor"))
    others = [survivor, *(pool.submit(nothing, number) for number in range(QUEUED))]
    try:
        _await(folder / "victim")
        _await(folder / "survivor")
        pid = int((folder / "victim").read_text())
        killed = perf_counter()
        os.kill(pid, signal.SIGKILL)
        error = victim.exception(LIMIT_S)
        milliseconds = (perf_counter() - killed) * 1e3
    finally:
        (folder / "release").touch()
    assert error is not None
    return Death(milliseconds, sum(_succeeds(future) for future in others))


def _succeeds(future: Future[Any]) -> bool:
    return future.exception(LIMIT_S) is None


def _row(name: str, deaths: list[Death]) -> str:
    times = [death.milliseconds for death in deaths]
    p99 = quantiles(times, n=100, method="inclusive")[98]
    done = sum(death.others_done for death in deaths)
    return f"{name:12}{median(times):>12.1f}{p99:>12.1f}{max(times):>12.1f}{done:>16} of {len(deaths) * (QUEUED + 1)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency", description="From a kill to its failed future."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write versions and every repeat there")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="deaths in every pool (default: %(default)s)")
    options = parser.parse_args()
    found = versions()
    names = contestants(found)
    print(heading(found), flush=True)
    deaths: dict[str, list[Death]] = {name: [] for name in names}
    for name in in_turns(names, options.repeats):
        deaths[name].append(one_death(name))
    print(f"{options.repeats} deaths in each pool, in turns; ms from SIGKILL to the failed future\n")
    print(f"{'':12}{'p50 ms':>12}{'p99 ms':>12}{'worst ms':>12}{'others done':>23}")
    for name, of_pool in deaths.items():
        print(_row(name, of_pool))
    if options.json:
        repeats = {name: [death._asdict() for death in of_pool] for name, of_pool in deaths.items()}
        options.json.write_text(json.dumps({"versions": found, "repeats": repeats}, indent=1) + "\n")


if __name__ == "__main__":
    main()
