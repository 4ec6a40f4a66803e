"""Random workers are killed under load, again and again: every future resolves, and only to the truth."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from concurrent.futures import FIRST_COMPLETED
from contextlib import suppress
from time import monotonic
from typing import Any

import pytest

from safepool import SafeFuture, SafePoolExecutor, WorkerDied, wait
from tests.pool import tasks
from tests.support import LIMIT_S

KILL_EACH_S = 0.25
IN_FLIGHT = 100


class _Chaos:
    """What came of the tasks of one run."""

    def __init__(self, context: Any, seconds: float, seed: int) -> None:
        self.kills = self.lost = self.right = 0
        self.wrong: list[object] = []
        self._random = random.Random(seed)
        self._asked: dict[SafeFuture, int] = {}
        with SafePoolExecutor(4, context) as executor:
            self._run(executor, seconds)
            self._collect(wait(self._asked, timeout=LIMIT_S).done)
            self.unresolved = len(self._asked)
            assert executor.submit(pow, 2, 3).result(LIMIT_S) == 8, "the same pool still works"

    def _run(self, executor: SafePoolExecutor, seconds: float) -> None:
        for future in [executor.submit(tasks.nap, 0.01) for _ in range(40)]:
            future.result(LIMIT_S)
        end, next_kill, number = monotonic() + seconds, monotonic() + KILL_EACH_S, 0
        while monotonic() < end:
            while len(self._asked) < IN_FLIGHT:
                self._asked[executor.submit(tasks.nap, 0.01, number)] = number
                number += 1
            self._collect(wait(self._asked, timeout=0.02, return_when=FIRST_COMPLETED).done)
            if monotonic() >= next_kill:
                next_kill += KILL_EACH_S
                self._kill_one(sorted(executor._processes))

    def _kill_one(self, pids: list[int]) -> None:
        if pids:
            with suppress(ProcessLookupError):
                os.kill(self._random.choice(pids), signal.SIGKILL)
                self.kills += 1

    def _collect(self, done: set[Any]) -> None:
        for future in done:
            number = self._asked.pop(future)
            error = future.exception(0)
            if isinstance(error, WorkerDied):
                self.lost += 1
            elif error is None and future.result(0) == number:
                self.right += 1
            else:
                self.wrong.append(error or future.result(0))

    def check(self) -> None:
        assert not self.unresolved
        assert not self.wrong
        assert self.lost <= self.kills
        assert self.right > self.kills


def test_a_few_seconds_of_chaos() -> None:
    """Four kills a second for six seconds: all resolve, at most one task is lost per kill, no answer is false."""
    chaos = _Chaos(None, 6.0, seed=1)
    chaos.check()
    assert chaos.kills >= 10


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("method", [None, "fork", "spawn", "forkserver"])
def test_a_minute_of_chaos(method: str | None) -> None:
    """The same for a minute, with each way to start workers."""
    chaos = _Chaos(method and multiprocessing.get_context(method), 60.0, seed=2)
    print(f"\n{method}: {chaos.right} right, {chaos.kills} kills, {chaos.lost} lost")
    chaos.check()
    assert chaos.kills >= 100
