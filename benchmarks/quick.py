"""The figures a user can feel, in under a minute: stock pool, ours and the best peer in turns, medians, ratios.

``python -m benchmarks.quick [--json FILE]``
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import NamedTuple

from benchmarks.pools import LIMIT_S, STOCK, Pool, contestants, heading, in_turns, nothing, open_pool, versions

WORKERS = 2
ROUNDS = 5
TASKS = 5_000
TRIPS = 400
ITEMS = 40_000
CHUNK = 100

Figures = dict[str, float]


class Column(NamedTuple):
    """One figure: its name in the results, its words in the table, and whether more of it is better."""

    key: str
    words: str
    more_is_better: bool


COLUMNS = (
    Column("futures_per_s", f"no-op futures/s, {TASKS} at once", True),
    Column("futures_of_main_per_s", "same, function of __main__", True),
    Column("map_items_per_s", f"map items/s, chunks of {CHUNK}", True),
    Column("round_trip_p50_us", "round trip p50, us", False),
    Column("round_trip_p99_us", "round trip p99, us", False),
    Column("cold_start_ms", "cold start to first result, ms", False),
)


def nothing_of_main(number: int) -> int:
    """The no-op again, in the module that is run: where scripts keep theirs, and what some pools send by value."""
    return number


# --------------------------------------------------------------- measurements


def measure(name: str, bytecode: str) -> Figures:
    """All figures of one pool, once; ``bytecode`` is the folder for what cold starts compile."""
    pool = open_pool(name, WORKERS)
    try:
        for future in [pool.submit(nothing, number) for number in range(100)]:
            future.result(LIMIT_S)  # all workers are up
        return {
            "futures_per_s": _throughput(pool, nothing),
            "futures_of_main_per_s": _throughput(pool, nothing_of_main),
            "map_items_per_s": _map_throughput(pool),
            **_round_trip(pool),
            "cold_start_ms": cold_start(name, bytecode),
        }
    finally:
        pool.close()


def _throughput(pool: Pool, fn: Callable[[int], int]) -> float:
    began = perf_counter()
    futures = [pool.submit(fn, number) for number in range(TASKS)]
    total = sum(future.result(LIMIT_S) for future in futures)
    seconds = perf_counter() - began
    assert total == sum(range(TASKS))
    return TASKS / seconds


def _round_trip(pool: Pool) -> Figures:
    trips = []
    for number in range(TRIPS):
        began = perf_counter()
        pool.submit(nothing, number).result(LIMIT_S)
        trips.append((perf_counter() - began) * 1e6)
    return {"round_trip_p50_us": median(trips), "round_trip_p99_us": quantiles(trips, n=100)[98]}


def _map_throughput(pool: Pool) -> float:
    began = perf_counter()
    total = sum(pool.map(nothing, range(ITEMS), CHUNK))
    seconds = perf_counter() - began
    assert total == sum(range(ITEMS))
    return ITEMS / seconds


def cold_start(name: str, bytecode: str) -> float:
    """Milliseconds of ``benchmarks.cold``: the second pool of one process would find everything warm."""
    # Installed packages have bytecode; a checkout may have none, or be told to write none.
    environ = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode, "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-m", "benchmarks.cold", name]
    outcome = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    return float(outcome.stdout)


# ---------------------------------------------------------------------- table


def medians_of(repeats: dict[str, list[Figures]]) -> dict[str, Figures]:
    """The median of each figure of each pool."""
    return {
        name: {column.key: median(figures[column.key] for figures in of_pool) for column in COLUMNS}
        for name, of_pool in repeats.items()
    }


def table(medians: dict[str, Figures]) -> str:
    """A row for each figure, a column for each pool, with how many times better than stock it is."""
    rows = [f"{'':34}" + "".join(f"{name:>20}" for name in medians)]
    for column in COLUMNS:
        cells = (_cell(column, figures[column.key], medians[STOCK][column.key]) for figures in medians.values())
        rows.append(f"{column.words:34}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(rows)


def _cell(column: Column, figure: float, stock: float) -> str:
    times_better = figure / stock if column.more_is_better else stock / figure
    return f"{figure:,.0f} ({times_better:.2f}x)"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quick", description="Quick figures beside the stock pool."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write versions, medians and every repeat there")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="repeats of every pool (default: %(default)s)")
    options = parser.parse_args()
    found = versions()
    names = contestants(found)
    print(heading(found), flush=True)
    repeats: dict[str, list[Figures]] = {name: [] for name in names}
    with TemporaryDirectory() as bytecode:
        for name in names:
            cold_start(name, bytecode)  # the first one compiles, and does not count
        for name in in_turns(names, options.rounds):
            repeats[name].append(measure(name, bytecode))
    medians = medians_of(repeats)
    print(f"medians of {options.rounds} repeats in turns, {WORKERS} workers; (n x) = n times better than stock\n")
    print(table(medians))
    if options.json:
        result = {"versions": found, "medians": medians, "repeats": repeats}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
