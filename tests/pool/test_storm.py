"""Everything at once: limits, retries, deaths, kills and cancels, in any order, and every future tells the truth."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from safepool import PoisonTask, Retry, SafeFuture, SafePoolExecutor, TaskTimeout, WorkerDied, wait
from tests.pool import tasks
from tests.support import LIMIT_S

MOST_OPEN = 200
EXPECTED = (PoisonTask, TaskTimeout, ValueError, WorkerDied)


class _Storm:
    """What came of one run: ``lies`` are answers that do not fit what really happened."""

    def __init__(self, executor: SafePoolExecutor, log: Path, seed: int, seconds: float) -> None:
        self._executor, self._log = executor, log
        self._random = random.Random(seed)
        self._asked: list[tuple[SafeFuture, bool]] = []  # with: is it never tried again?
        self._noted: dict[int, tuple[SafeFuture, bool]] = {}
        self._refused: set[SafeFuture] = set()
        end = monotonic() + seconds
        while monotonic() < end:
            self._act()
            open_ones = [future for future, _ in self._asked[-2 * MOST_OPEN :] if not future.done()]
            if len(open_ones) >= MOST_OPEN:
                wait(open_ones, timeout=0.1, return_when="FIRST_COMPLETED")
        self.unresolved = wait([future for future, _ in self._asked], timeout=2 * LIMIT_S).not_done
        self.kinds = Counter(self._kind_of(future) for future, _ in self._asked)
        self.lies = [] if self.unresolved else list(self._look_for_lies())

    def _act(self) -> None:
        draw = self._random.random()
        if draw < 0.6:
            self._note()
        elif draw < 0.85:
            self._submit(*self._random.choice(TROUBLE))
        elif draw < 0.99 and self._asked:
            future, _ = self._random.choice(self._asked[-100:])
            if self._random.random() < 0.3:
                future.kill()
            elif future.cancel():
                self._refused.add(future)
        else:
            for pid in list(self._executor._processes)[:1]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _note(self) -> None:
        number = len(self._asked)
        self._noted[number] = self._submit(tasks.note, self._log, number)

    def _submit(self, fn: Callable[..., Any], *args: Any) -> tuple[SafeFuture, bool]:
        choose = self._random.choice
        retry = choose([None, None, 2, Retry(attempts=3, wait=0.05)])
        # What would never end has a limit in any case.
        timeout = choose([0.1, 0.3]) if fn in ENDLESS else choose([None, None, 0.1, 0.3])
        view = self._executor.options(timeout=timeout, deadline=choose([None, None, 0.3, 1.0]), retry=retry)
        asked = view.submit(fn, *args), retry is None
        self._asked.append(asked)
        return asked

    def _kind_of(self, future: SafeFuture) -> str:
        return "cancelled" if future.cancelled() else type(future.exception(0)).__name__ if future.done() else "open"

    def _look_for_lies(self) -> Any:
        runs = Counter(map(int, tasks.noted(self._log)))
        for future, _ in self._asked:
            if not future.cancelled() and not isinstance(future.exception(0), (*EXPECTED, type(None))):
                yield f"{future!r}: {future.exception(0)!r}"
        for number, (future, once) in self._noted.items():
            is_answered = not future.cancelled() and future.exception(0) is None
            if is_answered and future.result(0) != number:
                yield f"{future!r} answered {future.result(0)} and not {number}"
            if is_answered and not runs[number]:
                yield f"{future!r} was answered and never ran"
            if once and runs[number] > 1:
                yield f"{future!r} ran {runs[number]} times"
            if once and future in self._refused and runs[number]:
                yield f"{future!r} said that it was cancelled, and ran"


ENDLESS = (tasks.hold_the_gil, tasks.send_self)
TROUBLE: list[tuple[Any, ...]] = [
    (tasks.nap, 0.0),
    (tasks.nap, 0.01),
    (tasks.nap, 0.1),
    (tasks.raise_error, ValueError("drawn")),
    (tasks.raise_error, ValueError("drawn")),
    (os._exit, 3),
    (tasks.size, 1, bytes(500_000)),
    (tasks.hold_the_gil,),
    (tasks.send_self, signal.SIGSTOP),
    (tasks.send_self, signal.SIGSEGV),
]


def check(executor: SafePoolExecutor, log: Path, seed: int, seconds: float) -> None:
    storm = _Storm(executor, log, seed, seconds)
    assert not storm.unresolved, [repr(future) for future in storm.unresolved][:5]
    assert not storm.lies, storm.lies[:5]
    assert storm.kinds["NoneType"] > 100, storm.kinds
    assert executor.submit(tasks.echo, 1).result(LIMIT_S) == 1, "the same pool still works"
    began = monotonic()
    executor.shutdown()
    assert monotonic() - began < LIMIT_S


def test_a_storm(pool: Callable[..., SafePoolExecutor], tmp_path: Path) -> None:
    """Some seconds of everything that users and the world do to a pool: all resolve, and none lies."""
    check(pool(3), tmp_path / "log", seed=1, seconds=4.0)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(3))
def test_a_long_storm(pool: Callable[..., SafePoolExecutor], context: Any, tmp_path: Path, seed: int) -> None:
    """The same for longer, with each way to start workers."""
    check(pool(3, context), tmp_path / "log", seed=seed, seconds=20.0)
