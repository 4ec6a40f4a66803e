"""The fault grid as a table: every row against every pool, each cell in an audited process of its own.

``python -m benchmarks.faults [--pools a,b] [--rows 1,2,7] [--start default,fork] [--json FILE]``.  The exit
code is 1 if safepool fails a row.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from time import monotonic, sleep
from typing import Any

import psutil

from benchmarks.children import END_S, LOOK_S, MARK, end_all, heed_sigterm, marked, python_path
from benchmarks.fault_rows import GONE_S, HANG, LEAK, LOST, NA, PASS, ROWS, WRONG, Row
from benchmarks.machine import heading, installed
from benchmarks.pools import OURS, POOLS, STARTS, TAKES_START

BOOT_S = 20.0  # for a cell to begin
SLACK_S = 0.2  # a quiet machine
SLACK_PER_LOAD_S = 0.5
WORST_FIRST = (HANG, LOST, WRONG, LEAK, PASS, NA)
_running: dict[str, subprocess.Popen[bytes]] = {}  # mark -> the process of a cell
BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    for _ in range(10**6):\n        pass\n"


@dataclass
class Cell:
    """What one row came to against one pool; ``parts`` holds what each part of it said."""

    row: int
    pool: str
    start: str
    verdict: str = NA
    seconds: float | None = None
    lost: int = 0
    evidence: list[str] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        if self.verdict == PASS and self.seconds is not None:
            return f"pass {self.seconds:.2f} s"
        return f"lost {self.lost}" if self.verdict == LOST else self.verdict


# ------------------------------------------------------------------- one cell


def run_cell(row: Row, pool: str, start: str, *, slack: float = SLACK_S, brief: bool = False) -> Cell:
    """Play a row against a pool, in processes of their own with a hard limit, and see that nothing is left of them.

    The parts of a row share a process until one fails; what comes after that one gets a new process.
    """
    cell = Cell(row.number, pool, start)
    todo = list(range(len(row.parts)))
    while todo:
        parts = _run_parts(row, cell, todo, slack, brief)
        cell.parts += parts
        todo = [number for number in todo if number > max(part["number"] for part in parts)]
    _sum_up(cell)
    return cell


def _sum_up(cell: Cell) -> None:
    cell.verdict = min((part["verdict"] for part in cell.parts), key=WORST_FIRST.index)
    cell.lost = sum(part["lost"] for part in cell.parts)
    times = [part["seconds"] for part in cell.parts if part["verdict"] == PASS]
    cell.seconds = max(times, default=None)
    for part in cell.parts:
        if part["verdict"] not in (PASS, NA):
            cell.evidence += [f"[{part['part']}] {words}" for words in part["evidence"]]


def _run_parts(row: Row, cell: Cell, todo: Sequence[int], slack: float, brief: bool) -> list[dict[str, Any]]:
    """Run parts in one process, up to the first that fails; what each came to."""
    with tempfile.TemporaryDirectory(prefix="cell-", ignore_cleanup_errors=True) as folder:
        mark = uuid.uuid4().hex
        command = [sys.executable, "-m", "benchmarks.fault_rows", str(row.number), cell.pool, cell.start, folder]
        command += ["--slack", str(slack), "--parts", ",".join(map(str, todo)), *(["--brief"] if brief else [])]
        # What is temporary goes there, too: a socket of a fork server, a core file, bytecode of nobody.
        environ = {**os.environ, MARK: mark, "PYTHONPATH": python_path(), "TMPDIR": folder}
        with Path(folder, "stderr").open("wb") as errors:
            child = subprocess.Popen(
                command,
                env=environ,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        _running[mark] = child
        try:
            trouble = _watch(child, Path(folder, "report"), row.limit_s + slack)
            lines = _lines(Path(folder, "report"))
            is_whole = not trouble and bool(lines) and "done" in lines[-1]
            left = _left_of(child.pid, mark) if is_whole else []
        finally:
            end_all(child, mark)
            del _running[mark]
        parts = _parts_of(lines) or [_failed_part(todo[0], "the start of its process", WRONG)]
        last = parts[-1]
        if trouble:
            last.update(verdict=HANG)
            last["evidence"].append(trouble)
        elif child.returncode != 0:
            last.update(verdict=WRONG)
            last["evidence"].append(f"its process ended with exit code {child.returncode}")
        elif left:
            last.update(verdict=LEAK)
            last["evidence"].append("left of its process: " + "; ".join(left))
        words = Path(folder, "stderr").read_text(errors="replace").strip()
        if words and last["verdict"] not in (PASS, NA):
            last["evidence"].append(f"its stderr: {words[-4000:]}")
        return parts


def _watch(child: subprocess.Popen[bytes], report: Path, part_limit_s: float) -> str:
    """Wait for a process to end; what kept it from that, in words, or nothing."""
    said, since = -1, monotonic()
    while child.poll() is None:
        lines = _lines(report)
        if len(lines) != said:
            said, since = len(lines), monotonic()
        is_done = bool(lines) and "done" in lines[-1]
        limit = END_S if is_done else part_limit_s if lines and "begun" in lines[-1] else BOOT_S
        if monotonic() - since > limit:
            return f"hang: {'its interpreter does not end' if is_done else 'no answer'} after {limit:g} s"
        sleep(LOOK_S)
    return ""


def _lines(report: Path) -> list[dict[str, Any]]:
    with suppress(OSError):
        whole = report.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]
    return []


def _parts_of(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    parts: dict[int, dict[str, Any]] = {}
    for line in lines:
        if "begun" in line:
            parts[line["begun"]] = _failed_part(line["begun"], line["part"], WRONG)
        elif "ended" in line:
            parts[line.pop("ended")].update(line)
    return list(parts.values())


def _failed_part(number: int, name: str, verdict: str) -> dict[str, Any]:
    return {
        "number": number,
        "part": name,
        "verdict": verdict,
        "seconds": None,
        "lost": 0,
        "evidence": [],
        "notes": [],
    }


def _left_of(session: int, mark: str) -> list[str]:
    """What still runs a few seconds after the process of a cell has ended."""
    end = monotonic() + GONE_S
    while (left := list(marked(session, mark))) and monotonic() < end:
        sleep(0.05)
    return [_describe(process) for process in left]


def _describe(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return f"{process.pid} {' '.join(process.cmdline())[-100:]}"
    return str(process.pid)


# ------------------------------------------------------------------ all of them


@contextmanager
def load(count: int) -> Iterator[None]:
    """So many busy loops beside us; each also ends by itself when this process is gone."""
    loops = [subprocess.Popen([sys.executable, "-S", "-c", BUSY, str(os.getpid())]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait(END_S)


def worst(cells: Sequence[Cell]) -> Cell:
    """Repeats of a cell as one: the worst verdict, the median of the times."""
    found = min(cells, key=lambda cell: WORST_FIRST.index(cell.verdict))
    times = [cell.seconds for cell in cells if cell.verdict == PASS and cell.seconds is not None]
    if found.verdict == PASS and times:
        found.seconds = median(times)
    return found


def columns(pools: Sequence[str], starts: Sequence[str]) -> list[tuple[str, str]]:
    """Pools with the start methods that they take; those that take none keep their own."""
    pairs = [(pool, start) for pool in pools for start in starts if start == "default" or pool in TAKES_START]
    return pairs + [(pool, "default") for pool in pools if pool not in {name for name, _ in pairs}]


def _title(pool: str, start: str) -> str:
    return pool if start == "default" else f"{pool} {start}"


class Table:
    """A line for each row as soon as it is known, a column for each pool, and what it comes to."""

    def __init__(self, rows: Sequence[Row], titles: Sequence[str]) -> None:
        self._rows = rows
        self._titles = titles
        self._width = max(14, *(len(title) + 2 for title in titles))
        self._verdicts: dict[str, list[str]] = {title: [] for title in titles}

    def head(self) -> None:
        self._print("", self._titles)

    def row(self, row: Row, cells: Sequence[Cell]) -> None:
        """Print the line of a row; ``cells`` are in the order of the columns."""
        for title, cell in zip(self._titles, cells):
            self._verdicts[title].append(cell.verdict)
        self._print(f"{row.number:2} {row.fault}", map(str, cells))

    def totals(self) -> None:
        words = [f"{found.count(PASS)} of {len(found) - found.count(NA)}" for found in self._verdicts.values()]
        self._print("   rows that hold", words)

    def _print(self, head: str, words: Iterable[str]) -> None:
        print(f"{head:38}" + "".join(f"{word:>{self._width}}" for word in words), flush=True)


def _names(text: str, allowed: Iterable[str], what: str) -> list[str]:
    names = text.split(",")
    unknown = set(names) - set(allowed)
    if unknown:
        raise SystemExit(f"no such {what}: {', '.join(sorted(unknown))}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description="The fault grid, side by side.")
    parser.add_argument("--pools", default=",".join(POOLS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--rows", help="comma-separated numbers (default: all)")
    parser.add_argument("--start", default="default", help=f"comma-separated, of {', '.join(STARTS)}")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each cell; the worst counts")
    parser.add_argument("--load", type=int, default=0, metavar="N", help="busy loops beside it")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--slack", type=float, help="seconds added to every limit (default: a little, more under load)")
    parser.add_argument("--brief", action="store_true", help="fewer rounds of what is repeated")
    parser.add_argument("--why", action="store_true", help="the evidence of every cell that fails, not only safepool's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write versions and every run of every cell there")
    options = parser.parse_args()
    heed_sigterm()

    found = installed()
    pools = [pool for pool in _names(options.pools, POOLS, "pool") if found[pool] is not None]
    rows = [ROWS[int(n)] for n in _names(options.rows, map(str, ROWS), "row")] if options.rows else list(ROWS.values())
    pairs = columns(pools, _names(options.start, STARTS, "start method"))
    slack = SLACK_S + options.load * SLACK_PER_LOAD_S if options.slack is None else options.slack
    slack += (options.jobs - 1) * SLACK_PER_LOAD_S if options.slack is None else 0
    print(heading({name: what for name, what in found.items() if name in pools or what is None}), flush=True)
    print("a limit is met within " + f"{slack:g} s; n/a: the pool offers no such thing\n")
    lines = Table(rows, [_title(pool, start) for pool, start in pairs])
    lines.head()
    runs: list[Cell] = []
    with load(options.load), ThreadPoolExecutor(options.jobs) as threads:
        futures = {
            (row.number, *pair): [
                threads.submit(run_cell, row, *pair, slack=slack, brief=options.brief) for _ in range(options.repeat)
            ]
            for row in rows
            for pair in pairs
        }
        try:
            for row in rows:
                of_row = [[future.result() for future in futures[row.number, *pair]] for pair in pairs]
                runs += (cell for of_one in of_row for cell in of_one)
                lines.row(row, [worst(of_one) for of_one in of_row])
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for mark, child in tuple(_running.items()):  # interrupted
                end_all(child, mark)
    lines.totals()
    failed = [cell for cell in runs if cell.verdict not in (PASS, NA)]
    for cell in failed:
        if options.why or cell.pool == OURS:
            print(f"\nrow {cell.row}, {_title(cell.pool, cell.start)}: {cell.verdict}")
            print("\n".join(f"    {line}" for words in cell.evidence for line in words.splitlines()))
    if options.json:
        result = {"versions": {"python": platform.python_version(), **found}, "cells": [asdict(cell) for cell in runs]}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(cell.pool == OURS for cell in failed))


if __name__ == "__main__":
    sys.exit(main())
