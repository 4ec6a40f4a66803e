"""The results of ``python -m benchmarks`` as tables: medians, and how many times better safepool is than each other."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from benchmarks.machine import Versions, versions_line
from benchmarks.pools import OURS
from benchmarks.rows import ROWS, Figure

#: As it is in the JSON: {"machine", "date", "versions", "repeats", "rows": {row: {pool: {"runs", "trouble", "why"}}}}.
Results = dict[str, Any]
Table = list[list[str]]

UNSTEADY = 1.5
LEGEND = (
    f"(n x): safepool is so many times better than this pool; ~: the best run is over {UNSTEADY:g} times the worst;\n"
    "hung: not done within its limit, and ended; failed: raised or died; n/a: the pool offers no such thing"
)


def medians(cell: dict[str, Any]) -> dict[str, float]:
    """The median of each figure over the runs of one pool; empty if a run of it was spoilt."""
    runs = [] if cell["trouble"] else cell["runs"]
    return {key: median(run[key] for run in runs) for key in (runs[0] if runs else {})}


def is_steady(cell: dict[str, Any], figure: Figure) -> bool:
    """Its runs agree, more or less; if they do not, the median says little."""
    values = [run[figure.key] for run in cell["runs"]]
    return max(values) <= UNSTEADY * min(values)


def times_better(figure: Figure, ours: float, theirs: float) -> float | None:
    """Of our figure than theirs: above 1 whichever way is better.  None: that says nothing of such figures."""
    over, under = (ours, theirs) if figure.more_is_better else (theirs, ours)
    return over / under if over > 0 and under > 0 else None


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table_of(row: str, pools: dict[str, dict[str, Any]]) -> Table:
    """A head, and a line for each pool."""
    found = {pool: medians(cell) for pool, cell in pools.items()}
    ours = found.get(OURS, {})
    figures = [figure for figure in ROWS[row].figures if any(figure.key in of_pool for of_pool in found.values())]
    lines = [["", *(figure.words for figure in figures)]]
    for pool, of_pool in found.items():
        if of_pool:
            others = ours if pool != OURS else {}
            marks = ("" if is_steady(pools[pool], figure) else "~" for figure in figures)
            lines.append([pool, *(mark + _cell(figure, of_pool, others) for mark, figure in zip(marks, figures))])
        else:
            lines.append([pool, pools[pool]["trouble"], *[""] * (len(figures) - 1)])
    return lines


def _cell(figure: Figure, of_pool: dict[str, float], ours: dict[str, float]) -> str:
    words = number(of_pool[figure.key])
    times = times_better(figure, ours[figure.key], of_pool[figure.key]) if figure.key in ours else None
    return words if times is None else f"{words} ({number(times)}x)"


def notes_of(pools: dict[str, dict[str, Any]]) -> list[str]:
    """Why a pool has no figures: the last thing that it said."""
    return [
        f"{pool}: {cell['trouble']}: {(cell['why'].splitlines() or [''])[-1][:200]}"
        for pool, cell in pools.items()
        if cell["trouble"]
    ]


def in_columns(table: Table) -> Iterator[str]:
    """For a terminal."""
    widths = [max(map(len, column)) for column in zip(*_whole(table))]
    for line in table:
        first, *others = (
            word.ljust(width) if n == 0 else word.rjust(width) for n, (word, width) in enumerate(zip(line, widths))
        )
        yield "  ".join([first, *others]).rstrip()


def _whole(table: Table) -> Iterator[list[str]]:
    """All lines have as many cells as the longest."""
    width = max(map(len, table))
    for line in table:
        yield [*line, *[""] * (width - len(line))]


def row_text(row: str, pools: dict[str, dict[str, Any]]) -> str:
    notes = (f"  {note}" for note in notes_of(pools))
    return "\n".join([f"{row}: {ROWS[row].words}", *in_columns(table_of(row, pools)), *notes])


# ------------------------------------------------------------------------ page


def page(results: Results, plot: str) -> str:
    """The results as a page of Markdown; ``plot``: the file of the image beside it."""
    versions: Versions = results["versions"]
    parts = [
        "# Performance",
        f"Written by `python -m benchmarks`, not by hand; all figures are of one run, on {results['date']}.",
        f"Machine: {results['machine']}.",
        f"Pools: {versions_line(versions)}.",
        f"![One panel for each table, a bar for each pool]({plot})",
        _HOW_TO_READ.format(repeats=results["repeats"], unsteady=UNSTEADY),
        *(_section(row, pools) for row, pools in results["rows"].items()),
        _HOW_TO_REPRODUCE,
    ]
    return "\n\n".join(parts) + "\n"


def _section(row: str, pools: dict[str, dict[str, Any]]) -> str:
    words = ROWS[row].words
    parts = [f"## {words[0].upper()}{words[1:]}", "\n".join(_markdown(table_of(row, pools)))]
    notes = "\n".join(f"* {note}" for note in notes_of(pools))
    return "\n\n".join([*parts, *([notes] if notes else [])])


def _markdown(table: Table) -> Iterator[str]:
    lines = iter(_whole(table))
    head = next(lines)
    yield f"| {' | '.join(head)} |"
    yield "|---" + "|---:" * (len(head) - 1) + "|"
    yield from (f"| {' | '.join(line)} |" for line in lines)


_HOW_TO_READ = """## How to read it

* Each cell is the median of {repeats} runs. Every run of every pool had a fresh process, and the pools took turns, so
  that whatever else the machine did hit all alike. Quote the ratios; absolute figures belong to one machine at one
  moment.
* In brackets: how many times better safepool is than that pool. Below 1 the other pool is better.
* `~`: the best of its runs is over {unsteady:g} times the worst. The machine did something else, or the pool is so.
* CPU time stands beside wall time, and depends less on the load of the machine. "Parent" is the process that submits,
  all its threads together; "workers" are all processes below it: sidecars and managers of a pool count, too.
* Every pool is used in its own way (`submit` and `result`, `schedule`, `apply_async` and `get`) with its own default
  start method and default chunks of `map`: multiprocessing.Pool and mpire cut big chunks there, the others send every
  item alone.
* `hung`: not done within its limit, and ended; `failed`: raised or died; `n/a`: the pool offers no such thing.
* In gigabytes per second, what goes both ways counts twice."""

_HOW_TO_REPRODUCE = """## How to reproduce it

    pip install '.[bench]'
    python -m benchmarks --json results.json --page docs/performance.md

`--rows`, `--pools` and `--repeat` choose less; `python -m benchmarks --help` names the rows. On a machine that does
something else meanwhile, more repeats help more than longer ones."""
