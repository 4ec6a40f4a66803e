"""How soon one death or one limit is told, and what else a death costs."""

from __future__ import annotations

import os
import signal
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from statistics import mean, median, quantiles
from tempfile import TemporaryDirectory
from time import monotonic, perf_counter, sleep
from typing import Any, NamedTuple

from benchmarks.pools import LIMIT_S, Pool, nothing, open_pool

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
    being_written.write_text(f"{os.getpid()} {monotonic()}")
    being_written.rename(place / name)
    await_file(place / "release")
    return 0


def await_file(path: Path) -> None:
    end = monotonic() + LIMIT_S
    while not path.exists():
        if monotonic() > end:
            raise TimeoutError(f"{path.name} did not appear in {LIMIT_S:g} s")
        sleep(LOOK_S)


def deaths(name: str, count: int) -> dict[str, float]:
    """From SIGKILL of one of two busy workers to the failure of its future; how many of 13 other tasks succeed."""
    found = [one_death(name) for _ in range(count)]
    times = [death.milliseconds for death in found]
    others = mean(death.others_done for death in found)
    return {"p50_ms": median(times), "worst_ms": max(times), "others_done": others}


def one_death(name: str) -> Death:
    """Kill one of two busy workers of a new pool."""
    pool = open_pool(name, workers=2)
    with TemporaryDirectory() as folder:
        death = _kill_and_look(pool, Path(folder))
    with suppress(Exception):  # some refuse, once a worker has died
        pool.shutdown()
    return death


def _kill_and_look(pool: Pool, folder: Path) -> Death:
    victim, survivor = (pool.submit(hold, str(folder), name) for name in ("victim", "survivor"))
    others = [survivor, *(pool.submit(nothing, number) for number in range(QUEUED))]
    try:
        await_file(folder / "victim")
        await_file(folder / "survivor")
        pid = int((folder / "victim").read_text().split()[0])
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


def overshoots(name: str, limit_s: float, count: int) -> dict[str, float]:
    """Milliseconds from the moment at which a running task is over its limit to the failure of its future."""
    pool = open_pool(name, workers=1)
    times = []
    for _ in range(count):
        pool.submit(loaded).result(LIMIT_S)
        with TemporaryDirectory() as folder:
            error = pool.limited(limit_s, hold, folder, "running").exception(LIMIT_S)
            told = monotonic()
            assert isinstance(error, pool.timed_out), repr(error)
            began = float(Path(folder, "running").read_text().split()[1])
        times.append((told - began - limit_s) * 1e3)
    return {"p50_ms": median(times), "p99_ms": quantiles(times, n=100, method="inclusive")[98]}


def loaded() -> None:
    """A worker that has run this has imported this module: a limit counts the time that it takes."""
