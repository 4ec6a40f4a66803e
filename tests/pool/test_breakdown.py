"""A bug in the pool itself is never a hang: every future fails, with the event log."""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

import pytest

from safepool import PoolBroken, SafeFuture, SafePoolExecutor
from safepool import _events as e
from safepool._core import Core
from safepool._tables import IllegalTransition
from tests.pool import tasks
from tests.support import LIMIT_S, until


class _Faulty(Core):
    """A core with a bug: it takes an edge that is not in its tables when an event of one kind comes."""

    trips_at: type = e.Received

    def handle(self, event: e.Event) -> list[e.Command]:
        if type(event) is self.trips_at:
            raise IllegalTransition("an edge that is not in the table")
        return super().handle(event)


@pytest.mark.parametrize("event", [e.TasksSubmitted, e.WorkerReady, e.Received, e.WorkerDied, e.CancelRequested])
def test_a_bug_in_the_core_fails_everything_with_the_log(
    event: type, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever the state machine breaks down, no future waits, submit says so, and nothing is left."""
    monkeypatch.setattr(_Faulty, "trips_at", event)
    with caplog.at_level(logging.CRITICAL, "concurrent.futures"):
        executor = SafePoolExecutor(2)
        watchdog = executor._watchdog
        watchdog._core = _Faulty(watchdog._policy)
        futures: list[SafeFuture] = []
        with suppress(PoolBroken):  # the first may break it before the second is submitted
            for n in range(6):
                futures.append(executor.submit(tasks.nap, 0.05 if n else 1.0, n))  # noqa: PERF401
            until(lambda: futures[0].running() or futures[0].done(), "the first one runs")
            futures[0].kill()
            executor.submit(os._exit, 3)
        wait(futures, LIMIT_S)
        errors = [future.exception(LIMIT_S) for future in futures if not future.cancelled()]
        until(lambda: executor._broken, "the breakdown")
        until(lambda: "please report" in caplog.text, "the log tells of it")
    told = [error for error in errors if error is not None]
    assert told or event is e.WorkerDied
    for error in told:
        assert isinstance(error, PoolBroken)
        assert "an edge that is not in the table" in str(error)
        assert error.event_log or event is e.TasksSubmitted
    with pytest.raises(BrokenProcessPool, match="broke down"):
        executor.submit(abs, 1)
    executor.shutdown()


def test_a_watchdog_that_cannot_start_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread is to be had: the future fails at once."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("can't start new thread")

    executor = SafePoolExecutor(1)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        error = executor.submit(abs, 1).exception(LIMIT_S)
    assert isinstance(error, BrokenProcessPool)
    assert "can't start new thread" in str(error)
    executor.shutdown()


def test_a_fork_of_the_user_may_not_use_the_pool() -> None:
    """In a child that the program forks, submit and result refuse instead of waiting for ever."""
    with SafePoolExecutor(1) as executor:
        future = executor.submit(tasks.nap, 1.0, 5)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            words = []
            for attempt in (lambda: executor.submit(abs, 1), lambda: future.result(5)):
                try:
                    words.append(repr(attempt()))
                except BaseException as error:
                    words.append(type(error).__name__)
            os.write(writer, " ".join(words).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            assert pipe.read() == "RuntimeError PoolBroken"
        os.waitpid(pid, 0)
        assert future.result(LIMIT_S) == 5
