"""Who spends the microseconds of a no-op task: CPU time by thread and by function, as a page.

``python -m benchmarks.hot_path [--page FILE]``.  The functions are profiled in a run of its own, whose shares are then
applied to the CPU time of runs without a profiler: a profiler slows small functions more than big ones, so take the
order and not the digits.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import thread_time
from typing import Any

from benchmarks.clocks import Clock
from benchmarks.machine import machine_line
from benchmarks.pools import LIMIT_S, nothing
from safepool import SafePoolExecutor
from safepool._watchdog import Watchdog

TASKS = 20_000
REPEATS = 7
TOLD = 14  # functions of each thread


class Run:
    """One run on a new pool: CPU seconds by who spent them."""

    def __init__(self, profiled: dict[str, cProfile.Profile] | None = None) -> None:
        watchdog_s = [0.0]
        with _watched(watchdog_s, profiled), SafePoolExecutor(2) as pool:
            for future in [pool.submit(nothing, number) for number in range(300)]:
                future.result(LIMIT_S)
            clock, before = Clock(), watchdog_s[0]
            mine = profiled["main"] if profiled else None
            began = thread_time()
            if mine is not None:
                mine.enable()
            futures = [pool.submit(nothing, number) for number in range(TASKS)]
            submitted = thread_time()
            for future in futures:
                future.result(LIMIT_S)
            if mine is not None:
                mine.disable()
            ended = thread_time()
            self.seconds = {
                "submit (the caller)": submitted - began,
                "result (the caller)": ended - submitted,
                "the watchdog": watchdog_s[0] - before,
                "two workers": clock.spent().workers,
            }


class _watched:  # noqa: N801  (it is used as a verb)
    """Within, the CPU time of watchdogs is summed up, turn by turn."""

    def __init__(self, seconds: list[float], profiled: dict[str, cProfile.Profile] | None) -> None:
        self._seconds = seconds
        self._profiled = profiled
        self._turn: Callable[[Watchdog], None] = Watchdog._turn

    def __enter__(self) -> None:
        turn, seconds, profiled = self._turn, self._seconds, self._profiled

        def counted(watchdog: Watchdog) -> None:
            began = thread_time()
            if profiled:
                profiled["watchdog"].enable()
            try:
                turn(watchdog)
            finally:
                if profiled:
                    profiled["watchdog"].disable()
                seconds[0] += thread_time() - began

        Watchdog._turn = counted  # type: ignore[method-assign]

    def __exit__(self, *error: object) -> None:
        Watchdog._turn = self._turn  # type: ignore[method-assign]


def _functions(profile: cProfile.Profile, us_per_task: float) -> list[str]:
    """Rows: what each function spends by itself, in microseconds a task."""
    found: Any = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    total = sum(own for _, _, own, _, _ in found.values())
    rows = sorted(((own, calls, where) for where, (_, calls, own, _, _) in found.items()), reverse=True)[:TOLD]
    told = []
    for own, calls, (file, _, name) in rows:
        place = f"`{name}`" if file == "~" else f"`{Path(file).stem}.{name}`"
        told.append(f"| {place} | {calls / TASKS:.2f} | {own / total * us_per_task:.2f} |")
    return told


def page() -> str:
    runs = [Run().seconds for _ in range(REPEATS)]
    who = {name: median(run[name] for run in runs) / TASKS * 1e6 for name in runs[0]}
    profiled = {"main": cProfile.Profile(), "watchdog": cProfile.Profile()}
    Run(profiled)
    caller = who["submit (the caller)"] + who["result (the caller)"]
    lines = [
        "# The hot path: who spends the microseconds",
        "",
        f"{machine_line()}. {TASKS:,} no-op tasks at once, 2 workers; CPU time, medians of {REPEATS} runs.",
        "Made by `python -m benchmarks.hot_path --page docs/hot_path.md`.",
        "",
        "| who | us a task |",
        "|---|---|",
        *(f"| {name} | {us:.2f} |" for name, us in who.items()),
    ]
    for name, profile, us in (
        ("the caller", profiled["main"], caller),
        ("the watchdog", profiled["watchdog"], who["the watchdog"]),
    ):
        lines += ["", f"## {name[0].upper()}{name[1:]}, by function", "", "| function | calls a task | us a task |"]
        lines += ["|---|---|---|", *_functions(profile, us)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, metavar="FILE", help="write it there")
    options = parser.parse_args()
    made = page()
    print(made)
    if options.page is not None:
        notes = Path(__file__).with_name("hot_path.md")
        options.page.write_text(made + (notes.read_text() if notes.exists() else ""))


if __name__ == "__main__":
    main()
