"""Callbacks may do whatever they like, while workers die: no other future and no other callback suffers."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from safepool import SafePoolExecutor, WorkerDied, _side, as_completed
from tests.faults import tasks
from tests.pool import tasks as plain
from tests.pool.test_deaths import error_of, is_usable, running
from tests.support import LIMIT_S, SLACK_S, until

MakePool = Callable[..., SafePoolExecutor]


class Called:
    """A callback that runs ``act`` and remembers what came of it."""

    def __init__(self, act: Callable[[Future[Any]], Any] = lambda _: None) -> None:
        self._act = act
        self.results: list[Any] = []
        self._over = threading.Event()

    def __call__(self, future: Future[Any]) -> None:
        try:
            self.results.append(self._act(future))
        except BaseException as error:
            self.results.append(error)
        finally:
            self._over.set()

    def result(self, limit_s: float = LIMIT_S) -> Any:
        assert self._over.wait(limit_s), "the callback is not over"
        assert len(self.results) == 1
        return self.results[0]


def gated(executor: SafePoolExecutor, gate: Path) -> Future[Any]:
    future = executor.submit(plain.wait_for, gate, "first")
    running(future)
    return future


def test_it_waits_for_another_future_while_workers_die(pool: MakePool, tmp_path: Path) -> None:
    """A callback gets the result of a task that is queued behind two deaths of the only worker."""
    executor, gate = pool(1), tmp_path / "gate"
    first = gated(executor, gate)
    dying = [executor.submit(tasks.end, "SIGKILL") for _ in range(2)]
    last = executor.submit(plain.echo, "last")
    waiting = Called(lambda _: last.result(LIMIT_S))
    first.add_done_callback(waiting)
    gate.touch()
    assert waiting.result() == "last"
    assert [type(error_of(future)) for future in dying] == [WorkerDied, WorkerDied]


def test_it_waits_for_all_that_it_submits(pool: MakePool, tmp_path: Path) -> None:
    """A callback may run a whole map, and as_completed, on the pool that calls it."""
    executor, gate = pool(2), tmp_path / "gate"
    first = gated(executor, gate)

    def work(_: object) -> Any:
        mapped = list(executor.map(plain.echo, range(20), timeout=LIMIT_S))
        dying = executor.submit(tasks.end, "exit")
        futures = [dying, *(executor.submit(plain.echo, n) for n in range(20))]
        done = list(as_completed(futures, timeout=LIMIT_S))
        return mapped, len(done), type(dying.exception(0))

    working = Called(work)
    first.add_done_callback(working)
    gate.touch()
    assert working.result() == (list(range(20)), 21, WorkerDied)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), GeneratorExit(), SystemExit(3), MemoryError()], ids=repr)
def test_it_raises(pool: MakePool, tmp_path: Path, error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever one callback raises is logged; the next ones of this future and of others are called."""
    executor, gate = pool(1), tmp_path / "gate"
    caplog.set_level(logging.CRITICAL + 1, "concurrent.futures")
    first, second = gated(executor, gate), executor.submit(plain.echo, 2)
    after, others = Called(), Called()

    def fail(_: object) -> None:
        raise error

    first.add_done_callback(fail)
    first.add_done_callback(after)
    second.add_done_callback(fail)
    second.add_done_callback(others)
    gate.touch()
    assert after.result() is None
    assert others.result() is None
    assert is_usable(executor)


def test_it_raises_and_the_log_does_too(pool: MakePool, tmp_path: Path) -> None:
    """A log handler that raises as well keeps neither the next callback nor the end of the pool waiting."""

    class Refusing(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            raise RuntimeError("the log is full")

    executor, gate = pool(1), tmp_path / "gate"
    first, second = gated(executor, gate), executor.submit(plain.echo, 2)
    after, others = Called(), Called()
    first.add_done_callback(lambda _: 1 / 0)
    first.add_done_callback(after)
    second.add_done_callback(others)
    logger, handler = logging.getLogger("concurrent.futures"), Refusing()
    logger.addHandler(handler)
    try:
        gate.touch()
        assert after.result(_side.PATIENCE_S / 2) is None
        assert others.result(_side.PATIENCE_S / 2) is None
        began = monotonic()
        executor.shutdown()
        assert monotonic() - began < _side.PATIENCE_S / 2
    finally:
        logger.removeHandler(handler)


def test_it_blocks_while_the_pool_ends(pool: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A callback that never returns delays shutdown, and other callbacks, by the patience it is given, and no more."""
    monkeypatch.setattr(_side, "PATIENCE_S", 0.5)
    executor, gate = pool(1), tmp_path / "gate"
    first, second = gated(executor, gate), executor.submit(plain.nap, 0.1)
    leave, after = threading.Event(), Called()
    first.add_done_callback(lambda _: leave.wait(LIMIT_S))
    second.add_done_callback(after)
    try:
        gate.touch()
        assert after.result(5) is None
        began = monotonic()
        executor.shutdown()
        assert monotonic() - began < 2 + SLACK_S
    finally:
        leave.set()


def test_it_kills_the_workers(pool: MakePool, tmp_path: Path) -> None:
    """kill_workers() in a callback ends everything else at once; every other future is done and called back."""
    executor, gate = pool(2), tmp_path / "gate"
    first = gated(executor, gate)
    stuck = executor.submit(plain.nap, LIMIT_S)
    running(stuck)
    queued = [executor.submit(plain.echo, n) for n in range(5)]
    killing, told = Called(lambda _: executor.kill_workers()), [Called() for _ in range(6)]
    for future, callback in zip([stuck, *queued], told):
        future.add_done_callback(callback)
    first.add_done_callback(killing)
    gate.touch()
    assert killing.result() is None
    assert all(callback.result() is None for callback in told)
    assert all(future.done() for future in [stuck, *queued])
    executor.shutdown()


def test_it_shuts_down_while_tasks_wait_and_die(pool: MakePool, tmp_path: Path) -> None:
    """shutdown() in a callback does not wait for itself; what was submitted is done, one death included."""
    executor, gate = pool(1), tmp_path / "gate"
    first = gated(executor, gate)
    dying, last = executor.submit(tasks.end, "SIGSEGV"), executor.submit(plain.echo, "last")
    shutting = Called(lambda _: executor.shutdown())
    late = Called(lambda _: executor.submit(plain.echo, 1))
    first.add_done_callback(shutting)
    last.add_done_callback(late)
    gate.touch()
    assert shutting.result() is None
    assert last.result(LIMIT_S) == "last"
    assert type(error_of(dying)) is WorkerDied
    assert isinstance(late.result(), RuntimeError)
    executor.shutdown()


def test_it_drops_the_last_reference(tmp_path: Path) -> None:
    """A pool that only its callback holds finishes its work and ends."""
    gate = tmp_path / "gate"
    executors = [SafePoolExecutor(1)]
    first, last = gated(executors[0], gate), executors[0].submit(plain.echo, "last")
    thread = executors[0]._executor_manager_thread
    dropping = Called(lambda _: executors.clear())
    first.add_done_callback(dropping)
    gate.touch()
    assert dropping.result() is None
    assert last.result(LIMIT_S) == "last"
    assert thread is not None
    thread.join(LIMIT_S)
    assert not thread.is_alive()


def test_they_cancel_and_kill_each_other(pool: MakePool, tmp_path: Path) -> None:
    """Sixty futures whose callbacks cancel, kill and submit while workers die: all are done, none is told twice."""
    executor, gate = pool(2), tmp_path / "gate"
    first = gated(executor, gate)
    calls: list[Any] = [(plain.nap, 0.005), (tasks.end, "SIGKILL"), (plain.echo, 1), (tasks.throw, ValueError)]
    futures = [executor.submit(*calls[n % 4]) for n in range(60)]
    told = [0] * 60
    more: list[Future[Any]] = []

    def meddle(n: int) -> Callable[[Future[Any]], None]:
        def act(_: object) -> None:
            other = futures[(n * 7 + 3) % 60]
            if n % 3 == 0:
                other.cancel()
            elif n % 3 == 1:
                other.kill()
            else:
                more.append(executor.submit(plain.echo, n))
            told[n] += 1  # last: when all are told, ``more`` is complete

        return act

    for n, future in enumerate(futures):
        future.add_done_callback(meddle(n))
    gate.touch()
    assert first.result(LIMIT_S) == "first"
    assert not wait(futures, LIMIT_S).not_done
    until(lambda: all(told), "every callback was called")
    assert not wait(more, LIMIT_S).not_done
    assert told == [1] * 60
    assert all(future.exception(0) is None for future in more)
    assert is_usable(executor)


def test_it_runs_while_its_threads_signal_mask_is_the_users(pool: MakePool, tmp_path: Path) -> None:
    """A callback may start a process and wait for it: no signal is blocked in what it starts."""
    executor, gate = pool(1), tmp_path / "gate"
    first = gated(executor, gate)
    asking = Called(lambda _: signal.pthread_sigmask(signal.SIG_BLOCK, []))
    first.add_done_callback(asking)
    gate.touch()
    assert asking.result() == signal.pthread_sigmask(signal.SIG_BLOCK, [])
