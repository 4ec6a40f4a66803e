"""Tasks that do something: compute under a busy parent, compute like a tournament, carry big data."""

from __future__ import annotations

import random
from collections.abc import Callable
from statistics import median
from time import perf_counter, thread_time
from typing import Any

from benchmarks.clocks import Clock, Spent
from benchmarks.dispatch import Figures, warm
from benchmarks.pools import Pool

MB = 10**6
PAGE = 4096


def compute(seconds: float) -> None:
    """Use so much CPU time."""
    end = thread_time() + seconds
    while thread_time() < end:
        pass


def busy_parent(name: str, workers: int, seconds: float, task_s: float) -> Figures:
    """Which share of a core each worker has while the main thread runs Python and never waits."""
    pool = warm(name, workers)
    for _ in range(int(1.5 * workers * seconds / task_s)):  # more than can be done
        pool.post(compute, task_s)
    clock = Clock()
    end = perf_counter() + seconds
    while perf_counter() < end:
        sum(range(100))
    spent = clock.spent()
    return {"share": spent.workers / spent.wall / workers}


def tournament(name: str, workers: int, count: int, rounds: int) -> Figures:
    """The shortest time that so many tasks of 1 to 20 ms could take, as a share of that which they take."""
    pool = warm(name, workers)
    # Another order in each round: how well the last tasks happen to fit says nothing of a pool.
    orders = [[dice.uniform(0.001, 0.020) for _ in range(count)] for dice in map(random.Random, range(rounds))]
    found = [(_all_of(pool, tasks), sum(tasks)) for tasks in orders]
    return {
        "efficiency": median(work_s / workers / spent.wall for spent, work_s in found),
        "parent_us": median(spent.parent / count * 1e6 for spent, _ in found),
        "workers_ms": median(spent.workers / count * 1e3 for spent, _ in found),
    }


def _all_of(pool: Pool, tasks: list[float]) -> Spent:
    clock = Clock()
    for handle in [pool.post(compute, seconds) for seconds in tasks]:
        pool.answer(handle)
    return clock.spent()


# -------------------------------------------------------------------- big data


def look(data: Any) -> int:
    """Take it in: every page of it is touched, so that none can be left behind."""
    return int(sum(data[::PAGE])) if isinstance(data, bytes) else int(data[::PAGE].sum())


def give_back(data: Any) -> Any:
    return data


def array_of(size: int) -> Any:
    import numpy

    return numpy.ones(size, numpy.uint8)


def bytes_of(size: int) -> bytes:
    return b"\1" * size


def big_data(name: str, make: Callable[[int], Any], rounds: dict[int, int]) -> Figures:
    """GB/s by wall time, one at a time; ``rounds``: megabytes -> how often.  What goes both ways counts twice."""
    pool = warm(name, 1)
    found = {}
    for megabytes, count in rounds.items():
        data = make(megabytes * MB)
        gigabytes = megabytes / 1000
        found[f"in_{megabytes}"] = gigabytes / _median_trip(pool, look, data, count)
        found[f"both_{megabytes}"] = 2 * gigabytes / _median_trip(pool, give_back, data, count)
    return found


def _median_trip(pool: Pool, fn: Callable[[Any], Any], data: Any, count: int) -> float:
    """Seconds; the first trip does not count, and the answer of every one is looked at."""
    times = []
    for _ in range(count + 1):
        began = perf_counter()
        answer = pool.answer(pool.post(fn, data))
        total = answer if fn is look else look(answer)
        times.append(perf_counter() - began)
        assert total == -(-len(data) // PAGE)
        del answer
    return median(times[1:])
