"""The figures that a user can feel, in under a minute, as ratios to the stock pool: are they what they were?

``python -m benchmarks.quick [--json FILE] [--write-baseline]``.  Exit code 1 if half of a ratio of the committed
baseline is lost in each of three measurements, or if safepool hangs or fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from benchmarks import baseline, children
from benchmarks.baseline import ATTEMPTS, Kind, judge, suspects
from benchmarks.dispatch import at_once, mapped, trips, warm
from benchmarks.machine import heading, in_turns, installed, machine_line, present
from benchmarks.pools import LIMIT_S, OURS, PEBBLE, STOCK, Pool, nothing

POOLS = (STOCK, OURS, PEBBLE)  # and the best peer, for the table
WORKERS = 2
ROUNDS = 3
TASKS = 5_000
TRIPS = 400
ITEMS = 40_000
CHUNK = 100
STARTS = 3
CHILD_S = 20.0  # for all figures of one pool, once

Medians = dict[str, dict[str, float]]  # pool -> figure -> median


def nothing_of_main(number: int) -> int:
    """The no-op again, in the module that is run: where scripts keep theirs, and what some pools send by value."""
    return number


def cold_start(name: str) -> float:
    """Milliseconds of ``benchmarks.cold``: the second pool of one process would find everything warm."""
    command = [sys.executable, "-m", "benchmarks.cold", name]
    runs = (subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True) for _ in range(STARTS))
    return median(float(run.stdout) for run in runs)


class Figure(NamedTuple):
    """One figure: its words, whether more of it is better, and how it is measured with a pool that is warm."""

    words: str
    more_is_better: bool
    measure: Callable[[Pool, str], float]


FIGURES = {
    "futures_per_s": Figure(
        f"no-op futures/s, {TASKS} at once", True, lambda pool, _: TASKS / at_once(pool, TASKS).wall
    ),
    "futures_of_main_per_s": Figure(
        "same, function of __main__", True, lambda pool, _: TASKS / at_once(pool, TASKS, nothing_of_main).wall
    ),
    "round_trip_p50_us": Figure("round trip p50, us", False, lambda pool, _: median(trips(pool, TRIPS))),
    "map_items_per_s": Figure(
        "map items/s, default chunks", True, lambda pool, _: TASKS / mapped(pool, TASKS, None).wall
    ),
    "map_chunks_items_per_s": Figure(
        f"map items/s, chunks of {CHUNK}", True, lambda pool, _: ITEMS / mapped(pool, ITEMS, CHUNK).wall
    ),
    "cold_start_ms": Figure("cold start to first result, ms", False, lambda _, name: cold_start(name)),
}


def play(name: str, figures: Iterable[str]) -> dict[str, float]:
    """Some figures of one pool, in this process."""
    pool = warm(name, WORKERS)
    pool.answer(pool.post(nothing, 0))
    return {figure: FIGURES[figure].measure(pool, name) for figure in figures}


def measure(names: Sequence[str], figures: Sequence[str], rounds: int, bytecode: str) -> tuple[Medians, list[str]]:
    """(medians, what went wrong), each round of each pool in a process of its own, in turns.

    ``bytecode``: the folder for what they compile; installed packages have theirs, a checkout may have none.
    """
    runs: dict[str, list[Any]] = {name: [] for name in names}
    troubles: dict[str, str] = {}
    for name in in_turns(names, rounds):
        if name not in troubles:
            environ = {"PYTHONPYCACHEPREFIX": bytecode, "PYTHONDONTWRITEBYTECODE": ""}
            words = ["--play", name, "--figures", ",".join(figures)]
            told, trouble, why = children.play("benchmarks.quick", words, CHILD_S, environ)
            if trouble:
                troubles[name] = f"{name}: {trouble}: {why}"
            else:
                runs[name].append(told)
    medians = {
        name: {figure: median(run[figure] for run in of_pool) for figure in figures}
        for name, of_pool in runs.items()
        if name not in troubles
    }
    return medians, list(troubles.values())


def ratios(medians: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Of our figures to those of the stock pool, where both are there: how many times better."""
    ours, stock = medians.get(OURS, {}), medians.get(STOCK, {})
    return {figure: times_better(figure, ours[figure], stock[figure]) for figure in ours if figure in stock}


def times_better(figure: str, one: float, other: float) -> float:
    return one / other if FIGURES[figure].more_is_better else other / one


def table(medians: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each figure, a column for each pool, with how many times better than stock it is."""
    rows = [f"{'':34}" + "".join(f"{name:>20}" for name in medians)]
    for key, figure in FIGURES.items():
        cells = (_cell(key, figures[key], medians.get(STOCK, {}).get(key)) for figures in medians.values())
        rows.append(f"{figure.words:34}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(rows)


def _cell(key: str, figure: float, stock: float | None) -> str:
    words = f"{figure:,.0f}"
    return words if stock is None else f"{words} ({times_better(key, figure, stock):.2f}x)"


def compare(known: baseline.Ratios, first: dict[str, float], again: Callable[[list[str]], dict[str, float]]) -> bool:
    """Say what has changed; figures that are bad are measured ``again``.  True: nothing has failed."""
    attempts = [first]
    verdicts = judge(known, attempts)
    while (bad := suspects(verdicts)) and len(attempts) < ATTEMPTS:
        print(f"measured again, for half is lost: {', '.join(bad)}", flush=True)
        attempts.append(again(bad))
        verdicts = judge(known, attempts)
    worth = [verdict for verdict in verdicts if verdict.kind is not Kind.FINE]
    print("\n".join(["beside the baseline:", *(f"  {verdict}" for verdict in worth)]) if worth else "as the baseline")
    return all(verdict.kind is not Kind.FAILURE for verdict in verdicts)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quick", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write versions, medians and ratios there")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="runs of every pool (default: %(default)s)")
    parser.add_argument(
        "--write-baseline", action="store_true", help="what is measured now is the baseline from now on"
    )
    parser.add_argument("--play", help=argparse.SUPPRESS)
    parser.add_argument("--figures", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = _options()
    if options.play:
        children.tell(play(options.play, options.figures.split(",")))
    children.heed_sigterm()
    found = installed(POOLS)
    print(heading(found), flush=True)
    troubles: list[str] = []
    with TemporaryDirectory() as bytecode:

        def run(names: Sequence[str], figures: Sequence[str]) -> Medians:
            medians, wrong = measure(names, figures, options.rounds, bytecode)
            troubles.extend(wrong)
            return medians

        medians = run(present(found), list(FIGURES))
        print(f"medians of {options.rounds} runs in turns, {WORKERS} workers; (n x) = n times better than stock\n")
        print(table(medians) + "\n", flush=True)
        good = True
        if options.write_baseline:
            baseline.write(ratios(medians), machine_line())
        else:
            good = compare(baseline.read(), ratios(medians), lambda bad: ratios(run((STOCK, OURS), bad)))
    if options.json:
        result = {"versions": found, "medians": medians, "ratios": ratios(medians)}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(troubles))
    # A pool that hung or failed is no matter of figures.
    return 0 if good and not any(trouble.startswith(f"{OURS}:") for trouble in troubles) else 1


if __name__ == "__main__":
    sys.exit(main())
