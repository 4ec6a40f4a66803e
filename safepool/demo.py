"""Shows incident 001 live: the same program on the stock pool and on ours, side by side, then in words.

Guarantees:

* it is over within ``LIMIT_S`` and the few seconds that ending the programs may take;
* it leaves no process, however it is left: a program ends when its stdin does.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, replace
from time import monotonic, sleep
from typing import TextIO

from ._incident import POOLS, TASKS, TASKS_PER_WORKER, WORKERS

LIMIT_S = 45.0
ROW_S = 0.5
STILL_S = 3.0  # nothing moves and there is no worker any more: that is a hang
STILL_LONG_S = 10.0  # nothing moves, but workers live or are to come: that may be a loaded machine
END_S = 4.0  # for a program to end when it is told to
TERM_S = 1.0  # ... when it gets SIGTERM; after that it is SIGKILL


@dataclass(frozen=True, slots=True)
class Report:
    """One line of a program: how its 756 tasks stand ``seconds`` after it began."""

    seconds: float
    done: int
    failed: int
    running: int
    pending: int
    workers: int

    def has_moved_since(self, before: Report) -> bool:
        return replace(self, seconds=before.seconds) != before


class Program:
    """A running program: what it reported last, and since when nothing in its reports moves."""

    def __init__(self, pool: str) -> None:
        self.pool = pool
        self.last: Report | None = None
        self._moved: Report | None = None
        self._words: deque[str] = deque(maxlen=3)  # what else it printed: how it failed
        self._process = _start(pool)
        self._reader = threading.Thread(target=self._read, name=f"reader of {pool}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.startswith("{"):
                self._words.append(line.strip())
                continue
            self.last = Report(**json.loads(line))
            if self._moved is None or self.last.has_moved_since(self._moved):
                self._moved = self.last

    def state(self) -> str:
        """``starting``, ``working``, ``finished``, ``hung`` or ``failed``."""
        last, moved = self.last, self._moved
        if last is not None and last.done + last.failed == TASKS:
            return "finished"
        if not self._reader.is_alive():
            return "failed"
        if last is None or moved is None:
            return "starting"
        # By the clock of the program: a machine that delays its reports does not make it look still.
        limit_s = STILL_S if last.done and not last.workers else STILL_LONG_S
        return "hung" if last.seconds - moved.seconds >= limit_s else "working"

    def is_decided(self) -> bool:
        return self.state() in ("finished", "hung", "failed")

    def seconds(self) -> float:
        """When something moved last, from the start of the program."""
        return 0.0 if self._moved is None else self._moved.seconds

    def still_s(self) -> float:
        return 0.0 if self.last is None else self.last.seconds - self.seconds()

    def last_words(self) -> str:
        return self._words[-1] if self._words else "it said nothing"

    def tell_to_end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()

    def close(self) -> None:
        """End it and wait until the last process of it is gone, which the end of its output tells."""
        self.tell_to_end()
        self._reader.join(END_S)
        # Until it is reaped its pid, which names the group too, cannot be anybody else's.
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._reader.is_alive():
                # SIGTERM first: it spares the resource tracker, who has semaphores to remove.
                os.killpg(self._process.pid, number)
                self._reader.join(TERM_S)
        self._process.wait(TERM_S)

    def __repr__(self) -> str:
        return f"<Program {self.pool} pid={self._process.pid} {self.state()} {self.last}>"


def _start(pool: str) -> subprocess.Popen[str]:
    # Not by ``-m``: the program must find the same safepool, wherever this process found its own.
    code = f"import sys; sys.path[:] = {sys.path!r}; from safepool import _incident; _incident.main({pool!r})"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C is for the demo, which then ends its programs
    )


# -------------------------------------------------------------------- screen


class Screen:
    """Rows of a table: on a terminal each replaces the one before, else they are lines."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._redraws = out.isatty()
        self._is_open = False  # a row without its line end is on the terminal

    def row(self, text: str) -> None:
        if not self._redraws:
            self.line(text)
            return
        width = shutil.get_terminal_size().columns - 1  # a row that wraps could not be replaced
        self._is_open = True
        self._out.write(f"\r{text[:width]}\x1b[K")
        self._out.flush()

    def line(self, text: str = "") -> None:
        self._out.write(("\n" if self._is_open else "") + text + "\n")
        self._out.flush()
        self._is_open = False

    def close(self) -> None:
        if self._is_open:
            self.line()


COLUMNS = "{:>4}{:>8}{:>8}{:>6} {:<9}"  # two of them are to fit into 80


def _cells(program: Program) -> str:
    last = program.last
    figures = ("", "", "", "") if last is None else (last.done, last.running, last.pending, last.workers)
    state, still_s = program.state(), program.still_s()
    if state == "working" and still_s >= 1:
        state = f"still {still_s:.0f} s"
    return COLUMNS.format(*figures, state)


def _head() -> list[str]:
    columns = COLUMNS.format("done", "running", "pending", "alive", "")
    return [
        f"{TASKS} tasks of 2 ms on {WORKERS} workers, each replaced after {TASKS_PER_WORKER} tasks "
        f"(max_tasks_per_child={TASKS_PER_WORKER}).",
        "",
        f"{'':4}|{' stock ProcessPoolExecutor':<36}| safepool",
        f"{'s':>4}|{columns}|{columns}".rstrip(),
    ]


# -------------------------------------------------------------------- verdict


def _words_on_stock(stock: Program) -> str:
    python = f"The stock pool of Python {platform.python_version()}"
    last, state = stock.last, stock.state()
    if last is None:
        return f"{python} did not begin ({stock.last_words()}): nothing is shown about it."
    if state == "finished" and not last.failed:
        return f"{python} did {last.done} of {TASKS} in {last.seconds:.1f} s: it did not hang this time."
    so_far = (
        f"{last.done} of {TASKS} done, {last.running} running, {last.pending} pending, {last.workers} workers alive"
    )
    if state == "hung":
        return f"{python} hung: {so_far}, and nothing has moved for {stock.still_s():.0f} s."
    if state == "working":
        return f"{python} was still at work when the time was up, so nothing is shown: {so_far}."
    return f"{python} failed, but did not hang: {so_far}; {last.failed} failed; {stock.last_words()}."


def _words_on_ours(ours: Program) -> str:
    last = ours.last
    if last is None:
        return f"safepool did not begin: {ours.last_words()}."
    if last.done == TASKS:
        return f"safepool did {last.done} of {TASKS} in {ours.seconds():.1f} s."
    return (
        f"safepool did {last.done} of {TASKS}, which is a bug of ours or a machine too slow: {last.failed} failed, "
        f"{last.running} running, {last.pending} pending, {last.workers} workers alive; {ours.last_words()}."
    )


WHY = "Why: a worker that retires leaves behind the mark of an idle one, so it is never replaced (CPython gh-115634)."


# ------------------------------------------------------------------------ run


def run(out: TextIO) -> bool:
    """Show it on ``out``; True: ours did all of its tasks."""
    screen = Screen(out)
    with ExitStack() as at_end:
        programs = []
        for pool in POOLS:
            programs.append(Program(pool))
            at_end.callback(programs[-1].close)
        for program in programs:
            at_end.callback(program.tell_to_end)  # both at once, before either is waited for
        at_end.callback(screen.close)
        for line in _head():
            screen.line(line)
        _watch(screen, programs)
        stock, ours = programs
        screen.line()
        screen.line(_words_on_stock(stock))
        if stock.state() == "hung":
            screen.line(WHY)
        screen.line(_words_on_ours(ours))
        return ours.last is not None and ours.last.done == TASKS


def _watch(screen: Screen, programs: list[Program]) -> None:
    began = monotonic()
    while True:
        sleep(ROW_S)
        seconds = monotonic() - began
        screen.row(f"{seconds:>4.1f}|" + "|".join(_cells(program) for program in programs).rstrip())
        if seconds > LIMIT_S or all(program.is_decided() for program in programs):
            return
