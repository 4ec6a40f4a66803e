"""What it costs to hand out tasks that do nothing: at once, one by one, by ``map``, in a long queue, with options."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from tempfile import mkdtemp
from time import perf_counter, sleep, thread_time
from typing import Any

import psutil

from benchmarks.clocks import Clock, Spent
from benchmarks.latency import await_file, hold
from benchmarks.machine import in_turns
from benchmarks.pools import OURS, ExecutorPool, NotOffered, Pool, nap, nothing, open_pool

Figures = dict[str, float]

WARM = 100
WARM_S = 0.2  # all workers are busy for so long, and a bit longer for each, so all of them have been started
EACH_S = 0.015
REST_S = 0.1
PASSES = 6  # of what is compared within one process


def warm(name: str, workers: int) -> Pool:
    """A new pool whose workers are up."""
    pool = open_pool(name, workers)
    warm_up(pool, workers)
    return pool


def warm_up(pool: Pool, workers: int) -> None:
    for handle in [pool.post(nap, WARM_S + workers * EACH_S) for _ in range(workers)]:
        pool.answer(handle)
    for handle in [pool.post(nothing, number) for number in range(WARM)]:
        pool.answer(handle)


def at_once(pool: Pool, count: int, fn: Callable[[int], int] = nothing) -> Spent:
    """Submit all, then have the answers of all."""
    post, answer = pool.post, pool.answer
    clock = Clock()
    handles = [post(fn, number) for number in range(count)]
    total = sum(answer(handle) for handle in handles)
    spent = clock.spent()
    assert total == sum(range(count))
    return spent


def throughput(name: str, workers: int, count: int) -> Figures:
    return per_task(at_once(warm(name, workers), count), count)


def per_task(spent: Spent, count: int) -> Figures:
    return {
        "per_s": count / spent.wall,
        "parent_us": spent.parent / count * 1e6,
        "workers_us": spent.workers / count * 1e6,
    }


def trips(pool: Pool, count: int) -> list[float]:
    """Microseconds of each of so many tasks, one at a time."""
    found = []
    for number in range(count):
        began = perf_counter()
        pool.answer(pool.post(nothing, number))
        found.append((perf_counter() - began) * 1e6)
    return found


def round_trip(name: str, workers: int, count: int) -> Figures:
    pool = warm(name, workers)
    clock = Clock()
    found = trips(pool, count)
    spent = per_task(clock.spent(), count)
    p50, p99 = median(found), quantiles(found, n=100)[98]
    return {"p50_us": p50, "p99_us": p99, "parent_us": spent["parent_us"], "workers_us": spent["workers_us"]}


def mapped(pool: Pool, count: int, chunksize: int | None) -> Spent:
    clock = Clock()
    total = sum(pool.map(nothing, range(count), chunksize))
    spent = clock.spent()
    assert total == sum(range(count))
    return spent


def map_throughput(name: str, workers: int, count: int, chunksize: int | None) -> Figures:
    pool = open_pool(name, workers)
    sum(pool.map(nothing, range(WARM), chunksize))  # (mpire starts other workers for a map than for single tasks)
    return per_task(mapped(pool, count, chunksize), count)


# ---------------------------------------------------------------- a long queue


def queued(name: str, count: int) -> Figures:
    """Bytes of one future that waits behind a worker that does not answer, and what ``submit`` costs meanwhile."""
    pool = warm(name, 1)
    if pool.most_queued is not None:
        raise NotOffered(f"its submit waits while {pool.most_queued:,} tasks do")
    folder = Path(mkdtemp())  # it is removed with that of this process
    pool.post(hold, str(folder), "running")
    await_file(folder / "running")
    gc.collect()
    process, post = psutil.Process(), pool.post
    handles: list[Any] = []
    marks = []
    before = process.memory_info().rss
    for tenth in range(10):
        marks.append(thread_time())
        handles.extend([post(nothing, number) for number in range(tenth * count // 10, (tenth + 1) * count // 10)])
    marks.append(thread_time())
    sleep(REST_S)  # what threads of the pool do with them is done
    after = process.memory_info().rss
    per_submit = [(end - began) / (count / 10) * 1e6 for began, end in pairwise(marks)]
    (folder / "release").touch()
    return {"bytes": (after - before) / count, "first_submit_us": per_submit[0], "last_submit_us": per_submit[-1]}


# -------------------------------------------------------- what a feature costs


def features(name: str, workers: int, count: int) -> Figures:
    """Throughput of pools of ours with one option each, as a share of that without; side by side."""
    from safepool import Retry, SafePoolExecutor

    assert name == OURS
    options: dict[str, dict[str, Any]] = {
        "plain": {}, "timeout": {"timeout": 60.0}, "retry": {"retry": Retry(3)}, "on_event": {"on_event": _ignore},
    }  # fmt: skip
    found: dict[str, list[Figures]] = {option: [] for option in options}
    for option in in_turns(list(options), PASSES):
        pool = ExecutorPool(SafePoolExecutor(workers, **options[option]))
        warm_up(pool, workers)
        found[option].append(per_task(at_once(pool, count), count))
        pool.shutdown()
    return _shares(found)


def _ignore(event: object) -> None:
    pass


def _shares(found: dict[str, list[Figures]]) -> Figures:
    """``plain_per_s``, the share of it with each option, and the parent's CPU time per task with each."""
    per_s = {option: median(one["per_s"] for one in of_option) for option, of_option in found.items()}
    shares = {f"{option}_share": figure / per_s["plain"] for option, figure in per_s.items() if option != "plain"}
    cpu = {f"{option}_parent_us": median(one["parent_us"] for one in runs) for option, runs in found.items()}
    return {"plain_per_s": per_s["plain"], **shares, **cpu}
