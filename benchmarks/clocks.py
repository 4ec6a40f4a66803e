"""CPU time of this process and of all that it has started, whichever pool they belong to."""

from __future__ import annotations

import resource
import time
from contextlib import suppress
from typing import NamedTuple

import psutil


class Spent(NamedTuple):
    """Seconds."""

    wall: float
    parent: float
    workers: float


class Clock:
    """Runs from its making on; ``spent()`` reads it.

    "Workers" are all descendants, so a sidecar or a manager process of a pool counts, too; and so do those that end
    meanwhile, if they are waited for by this process.
    """

    def __init__(self) -> None:
        self._workers = _of_descendants()
        self._ended = _of_ended()
        self._parent = time.process_time()
        self._wall = time.perf_counter()

    def spent(self) -> Spent:
        wall, parent = time.perf_counter() - self._wall, time.process_time() - self._parent
        now, ended = _of_descendants(), _of_ended() - self._ended
        alive = sum(seconds - self._workers.get(pid, 0.0) for pid, seconds in now.items())
        if ended:  # what they had used before is in it
            ended -= sum(seconds for pid, seconds in self._workers.items() if pid not in now)
        return Spent(wall, parent, alive + max(0.0, ended))


def _of_ended() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _of_descendants() -> dict[int, float]:
    found = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error, OSError):
            found[process.pid] = _of(process)
    return found


def _of(process: psutil.Process) -> float:
    """By the clock that Linux has for every process: /proc/PID/stat counts in steps of 10 ms."""
    try:
        return time.clock_gettime((~process.pid << 3) | 2)  # clock_getcpuclockid(3)
    except (AttributeError, OSError):
        times = process.cpu_times()
        return float(times.user + times.system)
