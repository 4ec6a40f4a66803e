"""What starting costs, beside stock fork, forkserver, spawn and loky: the first pool, a further worker, a second pool.

``python -m benchmarks.starts [--repeat N] [--json FILE]``.  Each start plays in fresh interpreters, in turn; medians in
milliseconds, and as ratios to stock fork.

* ``program``: a program whose one task is a function of an imported module, from its start to its end;
* ``first result``: from the opening of the first pool to its first result, imports done;
* ``further worker``: all workers are busy, a task is submitted, and a further worker answers it;
* ``second pool``: from the opening of another pool to its first result.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

STARTS = ("fork", "forkserver", "spawn", "loky", "safepool")
FIGURES = ("program", "first result", "further worker", "second pool")
REFERENCE = "fork"
LIMIT_S = 60.0
BUSY_S = 0.4
FURTHER = 5
POOLS = 7


def open_pool(start: str, workers: int) -> Any:
    if start == "safepool":
        from safepool import SafePoolExecutor

        return SafePoolExecutor(workers)
    if start == "loky":
        from loky import ProcessPoolExecutor as Loky

        return Loky(workers)
    from concurrent.futures import ProcessPoolExecutor

    return ProcessPoolExecutor(workers, multiprocessing.get_context(start))


def first_result(start: str) -> float:
    import concurrent.futures.process  # noqa: F401

    if start == "safepool":
        import safepool.executor  # noqa: F401
    if start == "loky":
        import loky  # noqa: F401
    return _open_and_ask(start, 2)


def _open_and_ask(start: str, workers: int) -> float:
    began = perf_counter()
    pool = open_pool(start, workers)
    pool.submit(int).result(LIMIT_S)
    took = perf_counter() - began
    pool.shutdown()
    return took * 1e3


def second_pool(start: str) -> float:
    _open_and_ask(start, 2)
    times = []
    for _ in range(POOLS):
        sleep(0.05)  # what the last one started is at rest
        times.append(_open_and_ask(start, 2))
    return median(times)


def further_worker(start: str) -> float:
    """(Stock fork and loky start all workers at once, so theirs are asked of a new pool each.)"""
    if start in ("fork", "loky"):
        return second_pool(start)
    pool = open_pool(start, FURTHER + 1)
    pool.submit(int).result(LIMIT_S)
    times, busy = [], []
    for number in range(FURTHER):
        busy.append(pool.submit(sleep, BUSY_S + FURTHER * 0.1 - number * 0.1))
        sleep(0.1)
        began = perf_counter()
        pool.submit(int).result(LIMIT_S)
        times.append((perf_counter() - began) * 1e3)
    for future in busy:
        future.result(LIMIT_S)
    pool.shutdown()
    return median(times)


def program(start: str) -> float:
    """(Timed from outside.)"""
    with open_pool(start, 2) as pool:
        pool.submit(int).result(LIMIT_S)
    return 0.0


PLAYS = {"program": program, "first result": first_result, "further worker": further_worker, "second pool": second_pool}


def play(figure: str, start: str) -> float:
    began = perf_counter()
    command = [sys.executable, "-m", "benchmarks.starts", "--play", figure, start]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    return (perf_counter() - began) * 1e3 if figure == "program" else float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--play", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.play:
        print(PLAYS[options.play[0]](options.play[1]))
        return
    starts = [start for start in STARTS if start != "loky" or find_spec("loky") is not None]
    found: dict[str, dict[str, list[float]]] = {figure: {start: [] for start in starts} for figure in FIGURES}
    for _ in range(options.repeat):
        for figure in FIGURES:
            for start in starts:
                found[figure][start].append(play(figure, start))
    print(f"{'ms (ratio to stock fork)':24}" + "".join(f"{start:>18}" for start in starts))
    for figure, by_start in found.items():
        medians = {start: median(times) for start, times in by_start.items()}
        cells = (f"{ms:9.1f} ({ms / medians[REFERENCE]:5.2f}x)" for ms in medians.values())
        print(f"{figure:24}" + "".join(f"{cell:>18}" for cell in cells))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
