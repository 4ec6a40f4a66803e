"""Whenever in the life of a worker its end comes, it costs the task that had begun there, and no other."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from safepool import SafePoolExecutor, TaskTimeout, WorkerDied, _seats
from tests.faults import tasks
from tests.pool import tasks as plain
from tests.pool.test_deaths import error_of, is_usable, running
from tests.support import LIMIT_S, SLACK_S, until

MakePool = Callable[..., SafePoolExecutor]

ENDS = {"SIGKILL": -signal.SIGKILL, "SIGSEGV": -signal.SIGSEGV, "exit": 7}
BIG_BYTES = 8_000_000


def test_in_its_initializer(pool: MakePool, context: Any, tmp_path: Path) -> None:
    """The first two workers end before they are ready: no task hears of it."""
    executor = pool(2, context, tasks.end_when_started, ("SIGKILL", tmp_path / "log", 2))
    assert [executor.submit(plain.echo, n).result(LIMIT_S) for n in range(4)] == list(range(4))
    assert executor._broken is False


@pytest.mark.parametrize("how", ["SIGSEGV", "exit"])
def test_in_its_initializer_in_other_ways(pool: MakePool, tmp_path: Path, how: str) -> None:
    """The same when the initializer crashes or exits."""
    executor = pool(1, initializer=tasks.end_when_started, initargs=(how, tmp_path / "log", 2))
    assert executor.submit(plain.echo, 1).result(LIMIT_S) == 1


def test_while_it_starts(pool: MakePool, context: Any) -> None:
    """A worker that is killed some milliseconds after its launch costs one task at most."""
    dice = random.Random(7)
    for _ in range(4):
        executor = pool(1, context)
        futures = [executor.submit(plain.echo, n) for n in range(5)]
        until(lambda: executor._processes, "a worker is launched")
        time.sleep(dice.uniform(0, 0.02))
        for pid in executor._processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert not wait(futures, LIMIT_S).not_done
        lost = [future for future in futures if future.exception(0) is not None]
        assert len(lost) <= 1
        assert all(type(error_of(future)) is WorkerDied for future in lost)
        assert is_usable(executor)
        executor.shutdown()


def test_while_its_task_is_half_sent(pool: MakePool, context: Any) -> None:
    """A worker dies with half of a big argument read: the task had not begun, and another worker does it."""
    executor = pool(1, context)
    pid = executor.submit(os.getpid).result(LIMIT_S)
    os.kill(pid, signal.SIGSTOP)
    futures = [executor.submit(plain.size, n, bytes(BIG_BYTES)) for n in range(3)]
    time.sleep(0.1)  # until the channel is full
    os.kill(pid, signal.SIGKILL)
    assert [future.result(LIMIT_S) for future in futures] == [(n, BIG_BYTES) for n in range(3)]
    assert pid not in executor._processes


@pytest.mark.parametrize("how", ENDS)
def test_while_it_reads_its_task(pool: MakePool, how: str) -> None:
    """The task that ends its reader fails and says how; those before and behind it are answered."""
    executor = pool(2)
    futures = [executor.submit(plain.echo, n) for n in range(20)]
    victim = executor.submit(plain.echo, tasks.EndsWhenRead(how))
    futures += [executor.submit(plain.echo, n) for n in range(20, 40)]
    error = error_of(victim)
    assert type(error) is WorkerDied
    assert error.exitcode == ENDS[how]
    assert [future.result(LIMIT_S) for future in futures] == list(range(40))


def test_while_it_reads_its_task_under_every_start_method(pool: MakePool, context: Any) -> None:
    """The same however the worker was started."""
    executor = pool(1, context)
    error = error_of(executor.submit(plain.echo, [bytes(BIG_BYTES), tasks.EndsWhenRead("SIGKILL")]))
    assert type(error) is WorkerDied
    assert error.exitcode == -signal.SIGKILL
    assert is_usable(executor)


@pytest.mark.parametrize("size", [0, BIG_BYTES])
@pytest.mark.parametrize("how", ["SIGKILL", "exit"])
def test_while_it_pickles_its_answer(pool: MakePool, how: str, size: int) -> None:
    """The task that ends its worker while its result is pickled fails and says how."""
    executor = pool(1)
    victim = executor.submit(tasks.return_what_ends, how, size)
    behind = [executor.submit(plain.echo, n) for n in range(10)]
    error = error_of(victim)
    assert type(error) is WorkerDied
    assert error.exitcode == ENDS[how]
    assert [future.result(LIMIT_S) for future in behind] == list(range(10))


@pytest.mark.parametrize("how", ENDS)
def test_while_it_writes_its_answer(pool: MakePool, how: str) -> None:
    """Killed at many places within a big answer: it comes whole or not at all, and those behind it come."""
    dice = random.Random(how)
    executor = pool(2)
    for _ in range(8):
        size = BIG_BYTES + dice.randrange(1000)
        victim = executor.submit(tasks.end_in_bytes, how, size)
        behind = [executor.submit(plain.echo, n) for n in range(4)]
        error = victim.exception(LIMIT_S)
        assert error is None or type(error) is WorkerDied
        if error is None:
            assert len(victim.result(0)) == size
        else:
            assert error.exitcode == ENDS[how]
        lost = [future for future in behind if future.exception(LIMIT_S) is not None]
        # A worker that answered in time may end within the next task instead.
        assert len(lost) <= (error is None)
    assert is_usable(executor)


@pytest.mark.parametrize("how", ENDS)
def test_after_its_answer(pool: MakePool, how: str) -> None:
    """An answer that was given stands; of what comes next one task may be lost, none is answered wrongly."""
    executor = pool(2)
    dice = random.Random(how)
    losses = 0  # an end may be felt in a later round
    for ends in range(1, 9):
        seconds = dice.uniform(0, 0.01)
        last = executor.submit(tasks.end_later, how, seconds)
        behind = [executor.submit(plain.nap, 0.002, n) for n in range(8)]
        error = last.exception(LIMIT_S)
        assert error is None or (type(error) is WorkerDied and error.exitcode == ENDS[how])
        if error is None:
            assert last.result(0) == seconds
        wait(behind, LIMIT_S)
        lost = [future for future in behind if future.exception(LIMIT_S) is not None]
        losses += len(lost) + (error is not None)
        assert losses <= ends
        assert all(future.result(0) == n for n, future in enumerate(behind) if future not in lost)
    until(lambda: is_usable(executor), "usable")


@pytest.mark.parametrize("how", [*ENDS, "SIGSTOP"])
def test_while_it_retires(pool: MakePool, how: str) -> None:
    """A worker that has done its share ends badly, or stops, on its way out: everybody is answered by others."""
    executor = pool(1, max_tasks_per_child=1)
    futures = [executor.submit(tasks.retire_slowly, how) for _ in range(2)]
    assert len({future.result(LIMIT_S) for future in futures}) == 2
    assert executor._broken is False
    assert is_usable(executor)


def test_while_it_retires_under_every_start_method(pool: MakePool, retiring_context: Any) -> None:
    """The same however the worker was started."""
    executor = pool(1, retiring_context, max_tasks_per_child=1)
    assert len({executor.submit(tasks.retire_slowly, "SIGKILL").result(LIMIT_S) for _ in range(3)}) == 3
    assert is_usable(executor)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_while_the_pool_shuts_down(pool: MakePool, context: Any, tmp_path: Path, how: int) -> None:
    """A worker is killed while the pool only finishes its work: the rest of the work is finished all the same."""
    gate = tmp_path / "gate"
    executor = pool(2, context)
    futures = [executor.submit(plain.wait_for, gate, n) for n in range(8)]
    running(*futures[:2])
    executor.shutdown(wait=False)
    assert futures[0].worker_pid is not None
    os.kill(futures[0].worker_pid, how)
    error = error_of(futures[0])
    assert type(error) is WorkerDied
    assert error.exitcode == -how
    gate.touch()
    assert [future.result(LIMIT_S) for future in futures[1:]] == list(range(1, 8))
    executor.shutdown()
    assert not executor._processes


def test_while_idle_workers_are_sent_home(pool: MakePool, context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped worker, and one that is killed in that moment, do not keep the pool from closing."""
    monkeypatch.setattr(_seats, "RETIRE_GRACE_S", 0.5)
    executor = pool(2, context)
    futures = [executor.submit(plain.nap, 0.2, n) for n in range(2)]
    assert [future.result(LIMIT_S) for future in futures] == [0, 1]
    pids = list(executor._processes)
    os.kill(pids[0], signal.SIGSTOP)
    began = time.monotonic()
    executor.shutdown(wait=False)
    with suppress(ProcessLookupError):
        os.kill(pids[-1], signal.SIGKILL)
    executor.shutdown()
    assert time.monotonic() - began < 0.5 + 2 + SLACK_S
    assert not executor._processes


# ------------------------------------------------------------ stopped, with a limit


def test_stopped_while_it_reads_or_answers(pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that stops while it unpickles a task, or pickles an answer, is over at the task's limit."""
    monkeypatch.setattr(_seats, "ACK_LIMIT_S", 1.0)
    executor = pool(2, timeout=0.5 + SLACK_S)
    for victim in (
        executor.submit(plain.echo, tasks.EndsWhenRead("SIGSTOP")),
        executor.submit(tasks.return_what_ends, "SIGSTOP", 0),
        executor.submit(tasks.return_what_ends, "SIGSTOP", BIG_BYTES),
    ):
        behind = [executor.submit(plain.echo, n) for n in range(6)]
        error = error_of(victim)
        assert type(error) is TaskTimeout
        assert error.limit == "timeout"
        assert [future.result(LIMIT_S) for future in behind] == list(range(6))


def test_stopped_while_it_writes(pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at many places within or behind a big answer: whole, or over at the limit; those behind it come."""
    monkeypatch.setattr(_seats, "ACK_LIMIT_S", 0.5)
    monkeypatch.setattr(_seats, "READ_BYTES_PER_S", 1e9)
    executor = pool(2, timeout=0.5 + SLACK_S)
    for n in range(2):
        size = BIG_BYTES + n
        victim = executor.submit(tasks.end_in_bytes, "SIGSTOP", size)
        error = victim.exception(LIMIT_S)
        assert error is None or type(error) is TaskTimeout
        assert error is not None or len(victim.result(0)) == size
        behind = [executor.submit(plain.echo, n) for n in range(4)]
        wait(behind, LIMIT_S)
        lost = [future for future in behind if future.exception(LIMIT_S) is not None]
        assert len(lost) <= (error is None)


def test_stopped_while_its_task_is_half_sent(pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped worker with half of a big argument: the task is taken from it and done by another."""
    monkeypatch.setattr(_seats, "ACK_LIMIT_S", 0.5)
    monkeypatch.setattr(_seats, "READ_BYTES_PER_S", 1e8)
    executor = pool(1)
    pid = executor.submit(os.getpid).result(LIMIT_S)
    os.kill(pid, signal.SIGSTOP)
    futures = [executor.submit(plain.size, n, bytes(BIG_BYTES)) for n in range(3)]
    assert [future.result(LIMIT_S) for future in futures] == [(n, BIG_BYTES) for n in range(3)]


def test_stopped_while_all_that_it_is_sent_has_a_deadline(pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scenario 4 of ``_seats``: not each of them is lost until the end of time."""
    monkeypatch.setattr(_seats, "ACK_LIMIT_S", 1.0)
    executor = pool(1)
    pid = executor.submit(os.getpid).result(LIMIT_S)
    os.kill(pid, signal.SIGSTOP)
    hurried = executor.options(deadline=SLACK_S)
    errors = []
    while not errors or errors[-1] is not None:
        assert len(errors) < 6
        errors.append(hurried.submit(plain.echo, 1).exception(LIMIT_S))
    assert {type(error) for error in errors[:-1]} == {TaskTimeout}


def test_stopped_while_its_task_is_half_sent_under_a_deadline(pool: MakePool) -> None:
    """A deadline is kept while the task is half written to a stopped worker; the next one is done by another."""
    executor = pool(2)
    gate = executor.submit(plain.nap, 1.0, "busy")
    running(gate)
    pid = executor.submit(os.getpid).result(LIMIT_S)
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    late = executor.options(deadline=0.5).submit(plain.size, 1, bytes(BIG_BYTES))
    error = error_of(late)
    assert type(error) is TaskTimeout
    assert error.limit == "deadline"
    assert time.monotonic() - began < 0.5 + 2 + SLACK_S
    assert gate.result(LIMIT_S) == "busy"
    os.kill(pid, signal.SIGKILL)
    assert is_usable(executor)
