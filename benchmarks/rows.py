"""The rows of ``python -m benchmarks``; run as a program, this plays one row against one pool."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from benchmarks import children, dispatch, latency, loads
from benchmarks.children import Outcome
from benchmarks.pools import OURS, PEBBLE, STOCK, NotOffered

PEERS = (OURS, STOCK, "mp.Pool", "loky", PEBBLE, "deadpool", "mpire")
WORKERS = 2
TASKS = 20_000
MANY_TASKS = 5_000
TRIPS = 1_000
ITEMS = 200_000
QUEUED = 30_000
BUSY_S = 2.0
DEATHS = 5
LIMITED = 50
#: Megabytes -> how often.
ROUNDS = {10: 9, 100: 5}


class Figure(NamedTuple):
    """One figure of a row: its name in the results, its words in the tables, and whether more of it is better."""

    key: str
    words: str
    more_is_better: bool = False


class Row(NamedTuple):
    """``measure``: what one pool comes to; the first of ``figures`` is plotted; ``limit_s``: seconds for one pool."""

    words: str
    figures: tuple[Figure, ...]
    measure: Callable[[str], dict[str, float]]
    limit_s: float = 60.0
    pools: Sequence[str] = PEERS


_PARENT = Figure("parent_us", "parent CPU us/task")
_CPU = (_PARENT, Figure("workers_us", "workers CPU us/task"))
_FUTURES = (Figure("per_s", "futures/s", True), *_CPU)
_ITEMS = (Figure("per_s", "items/s", True), *_CPU)
_GBS = tuple(
    Figure(f"{way}_{megabytes}", f"{megabytes} MB {words}, GB/s", True)
    for megabytes in ROUNDS
    for way, words in (("in", "in"), ("both", "both ways"))
)
_FEATURES = (
    Figure("plain_per_s", "futures/s without", True),
    *(Figure(f"{option}_share", f"share with {option}", True) for option in ("timeout", "retry", "on_event")),
    *(Figure(f"{option}_parent_us", f"parent us, {option}") for option in ("plain", "timeout", "retry", "on_event")),
)

ROWS: dict[str, Row] = {
    "noop": Row(
        f"{TASKS:,} no-op futures, {WORKERS} workers: all submitted, then all asked",
        _FUTURES,
        partial(dispatch.throughput, workers=WORKERS, count=TASKS),
    ),
    "trip": Row(
        f"round trip of {TRIPS:,} no-op futures, one at a time, {WORKERS} workers",
        (Figure("p50_us", "p50 us"), Figure("p99_us", "p99 us"), *_CPU),
        partial(dispatch.round_trip, workers=WORKERS, count=TRIPS),
    ),
    **{
        f"workers-{workers}": Row(
            f"{MANY_TASKS:,} no-op futures, {workers} workers",
            _FUTURES,
            partial(dispatch.throughput, workers=workers, count=MANY_TASKS),
        )
        for workers in (32, 128)
    },
    "map": Row(
        f"map over {TASKS:,} no-op items in the pool's default chunks, {WORKERS} workers",
        _ITEMS,
        partial(dispatch.map_throughput, workers=WORKERS, count=TASKS, chunksize=None),
    ),
    "map-100": Row(
        f"map over {ITEMS:,} no-op items in chunks of 100, {WORKERS} workers",
        _ITEMS,
        partial(dispatch.map_throughput, workers=WORKERS, count=ITEMS, chunksize=100),
    ),
    "queue": Row(
        f"{QUEUED:,} futures queued behind a busy worker: memory of the parent, and the CPU time of submit",
        (
            Figure("bytes", "bytes per future"),
            Figure("first_submit_us", "submit us, first tenth"),
            Figure("last_submit_us", "submit us, last tenth"),
        ),
        partial(dispatch.queued, count=QUEUED),
    ),
    "busy": Row(
        "tasks of 1 ms CPU while the parent's main thread runs Python: the share of a core that each worker gets",
        (Figure("share", "share of a core", True),),
        # One core is the parent's.
        partial(loads.busy_parent, workers=min(4, max(1, (os.cpu_count() or 2) - 1)), seconds=BUSY_S, task_s=0.001),
    ),
    "arrays": Row(
        "numpy arrays, one at a time, one way in and both ways",
        _GBS,
        partial(loads.big_data, make=loads.array_of, rounds=ROUNDS),
    ),
    "bytes": Row(
        "bytes, one at a time, one way in and both ways",
        _GBS,
        partial(loads.big_data, make=loads.bytes_of, rounds=ROUNDS),
    ),
    "kill": Row(
        f"SIGKILL of one of two busy workers, {DEATHS} times: until its future fails, and how many of "
        f"{latency.QUEUED + 1} other tasks succeed",
        (
            Figure("p50_ms", "p50 ms"),
            Figure("worst_ms", "worst ms"),
            Figure("others_done", "others done", True),
        ),
        partial(latency.deaths, count=DEATHS),
        30.0,
    ),
    "timeout": Row(
        f"{LIMITED} tasks over a limit of 50 ms: how late they fail",
        (Figure("p99_ms", "p99 ms late"), Figure("p50_ms", "p50 ms late")),
        partial(latency.overshoots, limit_s=0.05, count=LIMITED),
        30.0,
    ),
    "tournament": Row(
        f"120 tasks of 1 to 20 ms CPU, {WORKERS} workers: the shortest possible time as a share of the actual one",
        (Figure("efficiency", "efficiency", True), _PARENT, Figure("workers_ms", "workers CPU ms/task")),
        partial(loads.tournament, workers=WORKERS, count=120, rounds=7),
    ),
    "features": Row(
        f"what an option costs: {TASKS:,} no-op futures, {WORKERS} workers, beside a pool without it",
        _FEATURES,
        partial(dispatch.features, workers=WORKERS, count=TASKS),
        pools=(OURS,),
    ),
}


def play(row: str, pool: str) -> Outcome:
    """One row against one pool in a process of its own; an ``Outcome`` whose figures are by name."""
    return children.play("benchmarks.rows", [row, pool], ROWS[row].limit_s)


def main() -> None:
    row, pool = sys.argv[1:]
    try:
        children.tell(ROWS[row].measure(pool))
    except NotOffered as error:
        children.decline(error)


if __name__ == "__main__":
    main()
