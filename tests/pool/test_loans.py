"""An idle worker is lent to whoever submits: the task goes out at once, and nothing is lost if that goes wrong."""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from safepool import SafePoolExecutor, WorkerDied, _link, _seats
from safepool._loans import Loan
from tests.pool import tasks
from tests.support import LIMIT_S, until

MakePool = Callable[..., SafePoolExecutor]


class Interrupted(BaseException):
    """What a signal handler of the user's raises."""


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What came of each attempt to take a loan."""
    found: list[bool] = []
    take = Loan.take

    def note(self: Loan, future: Any) -> bool:
        found.append(take(self, future))
        return found[-1]

    monkeypatch.setattr(Loan, "take", note)
    return found


def _wait_until_lent(executor: SafePoolExecutor) -> None:
    executor.submit(tasks.echo, 0).result(LIMIT_S)
    until(lambda: executor._watchdog._loans, "a worker is lent")


def test_one_task_at_a_time_goes_straight_to_its_worker(pool: MakePool, taken: list[bool]) -> None:
    """Nearly all of them; a pool that nobody uses lends nothing."""
    executor = pool(2)
    _wait_until_lent(executor)
    assert [executor.submit(tasks.echo, n).result(LIMIT_S) for n in range(200)] == list(range(200))
    assert sum(taken) > 100
    until(lambda: not executor._watchdog._loans, "it is called in")
    assert executor.submit(tasks.echo, 1).result(LIMIT_S) == 1


def test_a_worker_keeps_nothing_of_the_last_task(pool: MakePool, taken: list[bool], tmp_path: Path) -> None:
    """Whoever drops the future has dropped what it returned, also while the worker is busy with the next one."""
    executor, gate = pool(1), tmp_path / "gate"
    for _ in range(200):
        _wait_until_lent(executor)
        future = executor.submit(tasks.a_set)
        if taken[-1]:
            break
    assert taken[-1]
    busy = executor.submit(tasks.wait_for, gate)
    result = weakref.ref(future.result(LIMIT_S))
    del future
    until(lambda: result() is None, "nobody holds it")
    gate.touch()
    busy.result(LIMIT_S)


def test_threads_never_get_the_same_worker(pool: MakePool, taken: list[bool]) -> None:
    """Each task is run once, whoever was faster."""
    executor = pool(4)
    _wait_until_lent(executor)

    def work(seed: int) -> list[int]:
        return [executor.submit(tasks.echo, seed * 1000 + n).result(LIMIT_S) for n in range(200)]

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, range(4), timeout=LIMIT_S)) == [
            list(range(seed * 1000, seed * 1000 + 200)) for seed in range(4)
        ]
    assert any(taken)


@pytest.mark.parametrize("write", [1, 2])
def test_a_handler_that_raises_while_a_task_is_sent(
    pool: MakePool, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    """Before its ticket, or between that and the call: the caller has the exception, and the pool loses nothing."""
    executor = pool(1)
    _wait_until_lent(executor)
    real, count = os.write, 0

    def interrupted(fd: int, data: bytes) -> int:
        nonlocal count
        count += 1
        if count == write:
            raise Interrupted
        return real(fd, data)

    monkeypatch.setattr(_link._os, "write", interrupted)
    with pytest.raises(Interrupted):
        executor.submit(tasks.echo, 1)
    monkeypatch.setattr(_link._os, "write", real)
    futures = [executor.submit(tasks.echo, n) for n in range(50)]
    assert [future.result(LIMIT_S) for future in futures] == list(range(50))


def test_a_caller_that_is_slow_to_send(pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the watchdog waits for it: nothing else is sent there meanwhile, and its task is done."""
    executor = pool(1)
    _wait_until_lent(executor)
    real, gate = os.write, threading.Event()

    def slow(fd: int, data: bytes) -> int:
        if threading.current_thread() is caller:
            gate.wait(LIMIT_S)
        return real(fd, data)

    found: list[Any] = []
    caller = threading.Thread(target=lambda: found.append(executor.submit(tasks.echo, "slow")), daemon=True)
    monkeypatch.setattr(_link._os, "write", slow)
    caller.start()
    until(lambda: any(loan.takers for loan in executor._watchdog._loans), "the worker is taken")
    other = executor.submit(tasks.echo, "other")
    time.sleep(0.4)  # longer than it is waited for: whether that does harm is what is tried
    gate.set()
    caller.join(LIMIT_S)
    assert other.result(LIMIT_S) == "other"
    assert found[0].result(LIMIT_S) == "slow"


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_lent_worker_that_dies_or_stops(pool: MakePool, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """What is sent to it has not begun, and is done by another."""
    monkeypatch.setattr(_seats, "ACK_LIMIT_S", 0.3)
    executor = pool(1)
    for n in range(10):
        _wait_until_lent(executor)
        (pid,) = executor._processes
        os.kill(pid, getattr(signal, how))
        assert executor.submit(tasks.echo, n).result(LIMIT_S) == n


def test_a_pool_that_closes_while_its_worker_is_taken(pool: MakePool) -> None:
    """The task is done, or refused: nobody waits."""
    for _ in range(30):
        executor = pool(1)
        _wait_until_lent(executor)
        closing = threading.Thread(target=executor.shutdown, daemon=True)
        closing.start()
        try:
            future = executor.submit(tasks.echo, 1)
        except RuntimeError:
            continue
        finally:
            closing.join(LIMIT_S)
        assert future.done()
        assert future.exception(0) is not None or future.result(0) == 1


def test_a_worker_that_nobody_took_and_that_dies_with_a_task(pool: MakePool, tmp_path: Path) -> None:
    """The loan has the number of the task that the pool itself sends there next, which runs once."""
    executor = pool(1)
    for n in range(5):
        _wait_until_lent(executor)
        until(lambda: not executor._watchdog._loans, "the loan is called in")
        log = tmp_path / str(n)
        error = executor.submit(note_and_die, [log]).exception(LIMIT_S)  # (not plain: the pool sends it)
        assert type(error) is WorkerDied
        assert log.read_text().split() == ["once"]


def note_and_die(log: list[Path]) -> None:
    tasks.note(log[0], "once")
    os._exit(3)
