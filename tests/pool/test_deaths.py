"""One death costs one task: all others are answered, and the pool goes on."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from safepool import PoisonTask, PoolBroken, Retry, SafeFuture, SafePoolExecutor, WorkerDied, WorkerStartError
from tests.pool import tasks
from tests.support import LIMIT_S, PROMPT_S, SLACK_S, is_gone, until

MakePool = Callable[..., SafePoolExecutor]

REFILL_S = 0.2  # from the news of a death until its seat is taken again
BREAK_S = 15.0  # until a pool that can start nobody says so


def running(*futures: Future[Any]) -> None:
    """Wait until workers have acknowledged all of these tasks."""
    until(lambda: all(future.running() for future in futures), f"running: {futures}")


def error_of(future: Future[Any], limit_s: float = LIMIT_S) -> BaseException:
    error = future.exception(limit_s)
    assert error is not None, f"it returned {future.result(limit_s)!r}"
    return error


def is_usable(executor: SafePoolExecutor) -> bool:
    return [executor.submit(tasks.echo, n).result(LIMIT_S) for n in range(3)] == [0, 1, 2]


# ------------------------------------------------------------------- signals


def test_a_killed_worker_takes_only_its_own_task_along(pool: MakePool, context: Any, tmp_path: Path) -> None:
    """Of 14 tasks on two workers, the one whose worker is killed fails, with all the facts, and 13 return."""
    gate = tmp_path / "gate"
    executor = pool(2, context)
    futures = [executor.submit(tasks.wait_for, gate, n) for n in range(14)]
    running(*futures[:2])
    pid = futures[0].worker_pid
    assert pid is not None
    killed_at = monotonic()
    os.kill(pid, signal.SIGKILL)
    error = error_of(futures[0])
    assert monotonic() - killed_at < PROMPT_S
    assert type(error) is WorkerDied
    assert isinstance(error, BrokenProcessPool)
    assert (error.pid, error.exitcode, error.task) == (pid, -signal.SIGKILL, str(futures[0]))
    for fact in (str(pid), "exit code -9 (SIGKILL: Killed)", str(futures[0]), "wait_for"):
        assert fact in str(error)
    gate.touch()
    assert [future.result(LIMIT_S) for future in futures[1:]] == list(range(1, 14))
    assert is_usable(executor)


ENDS: list[tuple[Callable[..., Any], int, int, str]] = [
    (os._exit, 0, 0, "EXIT(0), exit code 0"),
    (os._exit, 7, 7, "EXIT(7), exit code 7"),
    (tasks.send_self, signal.SIGSEGV, -signal.SIGSEGV, "exit code -11 (SIGSEGV"),
    (tasks.send_self, signal.SIGTERM, -signal.SIGTERM, "exit code -15 (SIGTERM"),
]


def test_however_a_worker_ends_its_task_says_how(pool: MakePool, context: Any, tmp_path: Path) -> None:
    """Exit codes, 0 included, and signals arrive as ``WorkerDied`` of that task alone."""
    gate = tmp_path / "gate"
    executor = pool(2, context)
    neighbour = executor.submit(tasks.wait_for, gate, "neighbour")
    for end, argument, exitcode, words in ENDS:
        before, error, after = (
            executor.submit(tasks.echo, "before"),
            error_of(executor.submit(end, argument)),
            executor.submit(tasks.echo, "after"),
        )
        assert type(error) is WorkerDied
        assert error.exitcode == exitcode
        assert words in str(error)
        assert (before.result(LIMIT_S), after.result(LIMIT_S)) == ("before", "after")
    assert not neighbour.done()
    gate.touch()
    assert neighbour.result(LIMIT_S) == "neighbour"


@pytest.mark.parametrize("error", [SystemExit(3), SystemExit(), KeyboardInterrupt("now"), GeneratorExit()], ids=repr)
def test_no_exception_ends_a_worker(pool: MakePool, error: BaseException) -> None:
    """``sys.exit()``, Ctrl-C and the like in a task travel as themselves, and the worker stays."""
    executor = pool(1)
    pid = executor.submit(os.getpid).result(LIMIT_S)
    raised = error_of(executor.submit(tasks.raise_error, error))
    assert type(raised) is type(error)
    assert raised.args == error.args
    assert executor.submit(os.getpid).result(LIMIT_S) == pid


def test_the_death_of_an_idle_worker_is_nobodys_loss(pool: MakePool, context: Any) -> None:
    """An idle worker that is killed is replaced, and no task hears of it."""
    executor = pool(1, context)
    pid = executor.submit(os.getpid).result(LIMIT_S)
    os.kill(pid, signal.SIGKILL)
    until(lambda: is_gone(pid), "the worker is gone")
    assert executor.submit(os.getpid).result(LIMIT_S) != pid
    assert is_usable(executor)


def test_a_task_submitted_right_after_the_kill_of_an_idle_worker_is_answered(pool: MakePool) -> None:
    """Whoever submits while the news of the death is on its way gets an answer all the same."""
    executor = pool(1)
    for n in range(20):
        os.kill(executor.submit(os.getpid).result(LIMIT_S), signal.SIGKILL)
        assert executor.submit(tasks.echo, n).result(LIMIT_S) == n


def test_all_workers_killed_with_big_tasks_in_the_queue(pool: MakePool, context: Any, tmp_path: Path) -> None:
    """Both workers are killed with 60 tasks of 2 MB queued: two tasks fail, 60 return."""
    gate = tmp_path / "gate"
    executor = pool(2, context)
    victims = [executor.submit(tasks.wait_for, gate) for _ in range(2)]
    running(*victims)
    data = bytes(2_000_000)
    futures = [executor.submit(tasks.size, n, data) for n in range(60)]
    for victim in victims:
        assert victim.worker_pid is not None
        os.kill(victim.worker_pid, signal.SIGKILL)
    assert [type(error_of(victim)) for victim in victims] == [WorkerDied, WorkerDied]
    assert not wait(futures, LIMIT_S).not_done
    assert [future.result(LIMIT_S) for future in futures] == [(n, len(data)) for n in range(60)]


def test_a_seat_is_filled_again_at_once(pool: MakePool, context: Any, tmp_path: Path) -> None:
    """When the future of a killed worker is done there are as many workers as before, moments later."""
    executor = pool(2, context)
    gate = tmp_path / "gate"
    futures = [executor.submit(tasks.wait_for, gate) for _ in range(2)]
    running(*futures)
    old = set(executor._processes)
    assert len(old) == 2
    pid = futures[0].worker_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    error_of(futures[0])
    seconds = until(lambda: len(executor._processes) == 2 and pid not in executor._processes, "two workers again")
    assert seconds < REFILL_S + SLACK_S
    assert len(set(executor._processes) - old) == 1
    gate.touch()


def test_a_worker_that_closed_every_descriptor_is_replaced(pool: MakePool, context: Any) -> None:
    """A task that closes all descriptors, its worker's channel too, fails; the pool goes on."""
    executor = pool(1, context)
    assert type(error_of(executor.submit(tasks.close_all_descriptors))) is WorkerDied
    assert is_usable(executor)


# ------------------------------------------------------ what had not begun yet


def test_what_a_dead_worker_had_not_begun_runs_once_elsewhere(pool: MakePool, tmp_path: Path) -> None:
    """Tasks that wait at the worker behind its victim run exactly once, at its successor."""
    gate, log = tmp_path / "gate", tmp_path / "log"
    executor = pool(1)
    wait([executor.submit(tasks.echo, n) for n in range(300)], LIMIT_S)  # it sees that tasks are short
    victim = executor.submit(tasks.note_and_wait, log, "victim", gate)
    behind = [executor.submit(tasks.note, log, n) for n in range(30)]
    running(victim)
    assert victim.worker_pid is not None
    os.kill(victim.worker_pid, signal.SIGKILL)
    assert type(error_of(victim)) is WorkerDied
    assert [future.result(LIMIT_S) for future in behind] == list(range(30))
    assert tasks.noted(log) == ["victim", *map(str, range(30))]


def test_no_task_runs_twice_and_no_answer_is_lost_when_workers_die_in_between(pool: MakePool, tmp_path: Path) -> None:
    """Whenever a worker is killed among thousands of short tasks, each task runs at most once."""
    log = tmp_path / "log"
    executor = pool(2)
    futures = [executor.submit(tasks.note, log, n) for n in range(3000)]
    kills = 0
    while not all(future.done() for future in futures) and kills < 15:
        until(lambda: len(executor._processes) > 0, "a worker")
        done = sum(future.done() for future in futures)
        for pid in tuple(executor._processes)[:1]:
            with suppress(ProcessLookupError):  # that of the last round, not yet buried
                os.kill(pid, signal.SIGKILL)
                kills += 1
        until(lambda: sum(future.done() for future in futures) >= min(done + 100, 3000), "100 more are done")
    assert not wait(futures, LIMIT_S).not_done
    lost = [n for n, future in enumerate(futures) if future.exception(0) is not None]
    assert all(type(error_of(futures[n])) is WorkerDied for n in lost)
    assert len(lost) <= kills
    noted = sorted(map(int, tasks.noted(log)))
    assert len(noted) == len(set(noted))
    assert set(noted) >= set(range(3000)) - set(lost)


# -------------------------------------------------------- pools that break


def test_break_is_the_letter_of_the_standard_library(pool: MakePool, context: Any, tmp_path: Path) -> None:
    """With ``on_worker_death="break"`` one death fails every task, with the evidence, and closes the pool."""
    gate = tmp_path / "gate"
    executor = pool(2, context, on_worker_death="break")
    futures = [executor.submit(tasks.wait_for, gate, n) for n in range(6)]
    running(*futures[:2])
    pid = futures[0].worker_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    for future in futures:
        assert isinstance(error_of(future), BrokenProcessPool)
        assert f"process {pid}" in str(error_of(future))
        assert "SIGKILL" in str(error_of(future))
    is_broken(executor, "on_worker_death")


def is_broken(executor: SafePoolExecutor, reason: str) -> None:
    """The pool says everywhere that it is broken, and why."""
    assert isinstance(executor._broken, str)
    assert reason in executor._broken
    with pytest.raises(BrokenProcessPool, match=reason) as caught:
        executor.submit(tasks.echo, 1)
    assert isinstance(caught.value, PoolBroken)
    assert reason in caught.value.reason
    executor.shutdown()
    with pytest.raises(BrokenProcessPool, match=reason):
        executor.submit(tasks.echo, 1)


def submitted_before_it_breaks(executor: SafePoolExecutor, count: int) -> list[SafeFuture]:
    """Calls of a pool whose workers cannot start: all, unless it is broken, and says so, before the last of them."""
    futures = [executor.submit(tasks.echo, 0)]
    with suppress(PoolBroken):
        for n in range(1, count):
            futures.append(executor.submit(tasks.echo, n))  # noqa: PERF401
    return futures


def test_an_initializer_that_exits_breaks_the_pool(pool: MakePool, context: Any) -> None:
    """Workers that die in their initializer, one after another, end in a broken pool, not in a loop."""
    executor = pool(2, context, initializer=tasks.exit_in_initializer)
    began = monotonic()
    for future in submitted_before_it_breaks(executor, 5):
        error = error_of(future)
        assert type(error) is WorkerStartError
        assert "exit code 1" in str(error)
    assert monotonic() - began < BREAK_S
    is_broken(executor, "exit code 1")


class Refusal:
    """A start context whose processes cannot be started."""

    def __init__(self, error: Exception) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._error = error
        self.starts = 0

    def get_start_method(self, allow_none: bool = False) -> str:
        return "spawn"

    def Process(self, *args: Any, **kwargs: Any) -> Any:  # noqa: N802  (multiprocessing's name)
        process = self._context.Process(*args, **kwargs)
        process.start = self._refuse  # type: ignore[method-assign]
        return process

    def _refuse(self) -> None:
        self.starts += 1
        raise self._error


@pytest.mark.parametrize(
    ("error", "most"), [(OSError("no process for you"), 50), (ValueError("no process for you"), 2)], ids=repr
)
def test_a_system_that_starts_no_process_breaks_the_pool(pool: MakePool, error: Exception, most: int) -> None:
    """A launch that fails is tried for some seconds, one that makes no sense once per seat; then the pool is broken."""
    refusal = Refusal(error)
    executor = pool(2, refusal)
    began = monotonic()
    for future in submitted_before_it_breaks(executor, 3):
        assert type(error_of(future)) is WorkerStartError
        assert "no process for you" in str(error_of(future))
    assert monotonic() - began < BREAK_S
    assert 1 <= refusal.starts <= most
    is_broken(executor, "no process for you")


def test_an_initializer_that_raises_is_named(pool: MakePool, context: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The futures fail with the traceback of the initializer, and the pool says that it is broken."""
    caplog.set_level(logging.CRITICAL)
    executor = pool(2, context, initializer=tasks.raise_in_initializer, initargs=("a wrong model",))
    for future in submitted_before_it_breaks(executor, 3):
        error = error_of(future)
        assert type(error) is WorkerStartError
        for words in ("initializer", "raise_in_initializer", "ValueError: a wrong model"):
            assert words in str(error)
    is_broken(executor, "a wrong model")


def test_an_initializer_that_cannot_be_pickled_breaks_the_pool(pool: MakePool) -> None:
    """What can never be sent to a worker is told at the first task, and not tried for ever."""
    executor = pool(1, initializer=tasks.echo, initargs=(threading.Lock(),))
    error = error_of(executor.submit(tasks.echo, 1))
    assert type(error) is WorkerStartError
    assert "cannot pickle" in str(error)


def test_a_task_that_kills_its_workers_is_put_in_quarantine(pool: MakePool, tmp_path: Path) -> None:
    """A task under a retry policy may take down ``deaths`` workers; then it is ``PoisonTask``."""
    log = tmp_path / "log"
    executor = pool(2)
    poison = executor.options(retry=Retry(attempts=100, deaths=3)).submit(tasks.die_until, log, 1000)
    others = [executor.submit(tasks.echo, n) for n in range(50)]
    error = error_of(poison)
    assert type(error) is PoisonTask
    assert (error.deaths, error.exitcode, len(error.attempts)) == (3, -signal.SIGKILL, 3)
    assert len(set(tasks.noted(log))) == 3
    assert [future.result(LIMIT_S) for future in others] == list(range(50))
    assert is_usable(executor)


def test_who_ran_it_is_known_at_once(pool: MakePool) -> None:
    """Of a task that ends with its worker before anybody has asked whether it has begun."""
    future = pool(1).submit(os._exit, 3)
    error = error_of(future)
    assert type(error) is WorkerDied
    assert future.worker_pid == error.pid
