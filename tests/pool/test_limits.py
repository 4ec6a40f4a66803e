"""Time limits are real: whatever a task does, it is over at its limit, and its seat is taken again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from safepool import Retry, SafePoolExecutor, TaskTimeout
from tests.pool import tasks
from tests.pool.test_deaths import error_of, is_usable, running
from tests.support import LIMIT_S, SLACK_S, is_gone, until

MakePool = Callable[..., SafePoolExecutor]

LATE_S = 0.1  # so much after its limit a task is over
REFILL_S = 0.2

STUCK: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "sleep": (tasks.nap, (tasks.LIMIT_S,)),
    "C loop": (tasks.hold_the_gil, ()),
    "SIGTERM ignored": (tasks.ignore_sigterm, ()),
    "SIGSTOP": (tasks.send_self, (signal.SIGSTOP,)),
}


def check_timeout(executor: SafePoolExecutor, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    neighbour = executor.submit(tasks.nap, 1.5, "neighbour")
    future = executor.options(timeout=1).submit(fn, *args)
    running(future)
    began, pid = monotonic(), future.worker_pid
    assert pid is not None
    error = error_of(future)
    seconds = monotonic() - began
    assert 0.8 < seconds < 1 + LATE_S + SLACK_S
    assert type(error) is TaskTimeout
    assert isinstance(error, TimeoutError)
    assert (error.limit, error.seconds, error.task, error.pid) == ("timeout", 1.0, str(future), pid)
    assert "timeout of 1 s" in str(error)
    assert until(lambda: is_gone(pid), "the worker is reaped") < SLACK_S
    assert until(lambda: len(executor._processes) == 2, "the seat is taken again") < REFILL_S + SLACK_S
    assert pid not in executor._processes
    assert is_usable(executor)
    assert neighbour.result(LIMIT_S) == "neighbour"


@pytest.mark.parametrize("kind", STUCK)
def test_a_task_is_over_at_its_timeout(pool: MakePool, kind: str) -> None:
    """Asleep, in a C loop with the GIL, deaf to SIGTERM or stopped: over at the limit, with all the facts."""
    check_timeout(pool(2), *STUCK[kind])


def test_a_timeout_holds_under_every_start_method(pool: MakePool, context: Any) -> None:
    """However its worker was started, a C loop is over at its limit."""
    check_timeout(pool(2, context), *STUCK["C loop"])


def test_a_new_worker_is_at_work_moments_after_a_timeout(pool: MakePool) -> None:
    """The only worker was killed for its task; the next one is answered a fifth of a second later."""
    executor = pool(1)
    error_of(executor.options(timeout=0.3).submit(tasks.hold_the_gil))
    began = monotonic()
    assert executor.submit(tasks.echo, 1).result(LIMIT_S) == 1
    assert monotonic() - began < REFILL_S + SLACK_S


def test_the_queue_does_not_count_for_a_timeout(pool: MakePool) -> None:
    """Five tasks of 0.6 s under a timeout of 1.2 s on one worker: none of them fails."""
    executor = pool(1, timeout=1.2 + SLACK_S)
    assert [f.result(LIMIT_S) for f in [executor.submit(tasks.nap, 0.6, n) for n in range(5)]] == list(range(5))


def test_the_start_of_a_worker_does_not_count_for_a_timeout(pool: MakePool) -> None:
    """An initializer that takes longer than the timeout of a task does not cost the task its time."""
    executor = pool(1, initializer=tasks.nap, initargs=(0.5 + SLACK_S,), timeout=0.2 + SLACK_S)
    assert executor.submit(tasks.echo, 1).result(LIMIT_S) == 1


def test_a_task_that_is_over_in_time_leaves_its_worker_alone(pool: MakePool) -> None:
    """Hundreds of tasks under a timeout run in one and the same worker."""
    executor = pool(1, timeout=LIMIT_S)
    assert len({f.result(LIMIT_S) for f in [executor.submit(os.getpid) for _ in range(300)]}) == 1


# ------------------------------------------------------------------ deadlines


def test_a_deadline_counts_every_attempt(pool: MakePool, tmp_path: Path) -> None:
    """A task that fails every 0.3 s and is tried again is over at its deadline, and says what it tried."""
    executor = pool(1, retry=Retry(attempts=100, wait=0.3), deadline=1)
    began = monotonic()
    future = executor.submit(tasks.fail_until, tmp_path / "log", 1000)
    error = error_of(future)
    assert 0.9 < monotonic() - began < 1 + LATE_S + SLACK_S
    assert type(error) is TaskTimeout
    assert (error.limit, error.seconds) == ("deadline", 1.0)
    assert 1 <= len(future.attempts) <= 4
    assert len(future.attempts) <= len(tasks.noted(tmp_path / "log"))
    assert tuple(error.attempts) == future.attempts
    assert all(isinstance(attempt.error, ValueError) for attempt in future.attempts)


def test_a_deadline_counts_the_queue(pool: MakePool, tmp_path: Path) -> None:
    """A task that waits behind another one until its deadline fails there and then, and never runs."""
    gate, log = tmp_path / "gate", tmp_path / "log"
    executor = pool(1)
    first = executor.submit(tasks.wait_for, gate, "first")
    running(first)
    began = monotonic()
    late = executor.options(deadline=0.5).submit(tasks.note, log, "late")
    error = error_of(late)
    assert 0.4 < monotonic() - began < 0.5 + LATE_S + SLACK_S
    assert type(error) is TaskTimeout
    assert (error.limit, error.pid) == ("deadline", None)
    assert "had not begun" in str(error)
    gate.touch()
    assert first.result(LIMIT_S) == "first"
    assert is_usable(executor)
    assert not tasks.noted(log)


def test_a_deadline_stops_a_running_task(pool: MakePool) -> None:
    """A task that runs at its deadline is stopped; its neighbour in the other worker goes on."""
    executor = pool(2)
    neighbour = executor.submit(tasks.nap, 1.0, "neighbour")
    began = monotonic()
    error = error_of(executor.options(deadline=0.7).submit(tasks.hold_the_gil))
    assert 0.6 < monotonic() - began < 0.7 + LATE_S + SLACK_S
    assert type(error) is TaskTimeout
    assert error.limit == "deadline"
    assert error.pid is not None
    assert until(lambda: is_gone(error.pid or 0), "its worker is gone") < SLACK_S
    assert neighbour.result(LIMIT_S) == "neighbour"


def test_the_sooner_of_two_limits_counts(pool: MakePool) -> None:
    """Under a timeout and a deadline a task is over at the first of them."""
    executor = pool(1)
    for limits, name in (({"timeout": 0.3, "deadline": 60}, "timeout"), ({"timeout": 60, "deadline": 0.3}, "deadline")):
        error = error_of(executor.options(**limits).submit(tasks.nap, tasks.LIMIT_S))
        assert type(error) is TaskTimeout
        assert error.limit == name


def test_a_limit_among_short_tasks_hits_only_the_stuck_one(pool: MakePool) -> None:
    """One task of three hundred is stuck: it alone fails, and those sent along with it are answered."""
    executor = pool(2, timeout=0.5 + SLACK_S)
    futures: list[Future[Any]] = [executor.submit(tasks.echo, n) for n in range(300)]
    wait(futures, LIMIT_S)
    futures = [executor.submit(tasks.nap, tasks.LIMIT_S if n == 100 else 0, n) for n in range(300)]
    assert type(error_of(futures[100])) is TaskTimeout
    assert [f.result(LIMIT_S) for n, f in enumerate(futures) if n != 100] == [n for n in range(300) if n != 100]


# ----------------------------------------------------------- kill and cancel


def test_kill_ends_a_running_task(pool: MakePool, context: Any, tmp_path: Path) -> None:
    """``kill()`` of a running task kills its worker, and only that; the future is cancelled."""
    gate = tmp_path / "gate"
    executor = pool(2, context)
    neighbour = executor.submit(tasks.wait_for, gate, "neighbour")
    future = executor.submit(tasks.hold_the_gil)
    running(neighbour, future)
    pid, began = future.worker_pid, monotonic()
    assert pid is not None
    assert future.kill()
    with pytest.raises(CancelledError):
        future.result(LIMIT_S)
    assert monotonic() - began < LATE_S + SLACK_S
    assert future.cancelled()
    assert until(lambda: is_gone(pid), "its worker is gone") < SLACK_S
    gate.touch()
    assert neighbour.result(LIMIT_S) == "neighbour"
    assert is_usable(executor)


def test_kill_ends_a_task_that_waits_or_backs_off(pool: MakePool, tmp_path: Path) -> None:
    """``kill()`` of a queued task, and of one between two attempts, cancels it; of a finished one: False."""
    gate, log = tmp_path / "gate", tmp_path / "log"
    executor = pool(1)
    done = executor.submit(tasks.echo, 1)
    assert done.result(LIMIT_S) == 1
    assert not done.kill()
    between = executor.options(retry=Retry(attempts=2, wait=tasks.LIMIT_S)).submit(tasks.fail_until, log, 1000)
    until(lambda: between.attempts, "the first attempt failed")
    first = executor.submit(tasks.wait_for, gate)
    running(first)
    queued = executor.submit(tasks.note, log, "queued")
    for future in (between, queued):
        assert future.kill()
        with pytest.raises(CancelledError):
            future.result(LIMIT_S)
    gate.touch()
    first.result(LIMIT_S)
    assert is_usable(executor)
    assert "queued" not in tasks.noted(log)
    assert len(tasks.noted(log)) == 1


def test_a_pending_task_can_be_cancelled_and_a_running_one_cannot(pool: MakePool, tmp_path: Path) -> None:
    """``cancel()`` means what it means in the standard library, for each state."""
    gate, log = tmp_path / "gate", tmp_path / "log"
    executor = pool(1)
    first = executor.submit(tasks.wait_for, gate, "first")
    running(first)
    pending = executor.submit(tasks.note, log, "pending")
    assert not pending.running()
    assert pending.cancel()
    assert pending.cancel()
    assert (pending.cancelled(), pending.done(), pending.running()) == (True, True, False)
    with pytest.raises(CancelledError):
        pending.result(LIMIT_S)
    assert not first.cancel()
    assert first.running()
    gate.touch()
    assert first.result(LIMIT_S) == "first"
    assert not first.cancel()
    assert is_usable(executor)
    assert not tasks.noted(log)


def test_what_was_sent_ahead_can_be_cancelled_until_it_begins(pool: MakePool, tmp_path: Path) -> None:
    """Of six tasks, most of them already at the worker, only the running one cannot be cancelled."""
    gate, log = tmp_path / "gate", tmp_path / "log"
    executor = pool(1)
    wait([executor.submit(tasks.echo, n) for n in range(300)], LIMIT_S)  # it sees that tasks are short
    futures = [executor.submit(tasks.note_and_wait, log, n, gate) for n in range(6)]
    running(futures[0])
    assert not any(future.running() for future in futures[1:])
    assert [future.cancel() for future in futures] == [False, True, True, True, True, True]
    gate.touch()
    assert futures[0].result(LIMIT_S) == 0
    assert is_usable(executor)
    assert tasks.noted(log) == ["0"]


def test_cancelling_while_tasks_begin_never_lies(pool: MakePool, tmp_path: Path) -> None:
    """Every one of two thousand short tasks either says it is cancelled and never ran, or is answered."""
    log = tmp_path / "log"
    executor = pool(2)
    wait([executor.submit(tasks.echo, n) for n in range(300)], LIMIT_S)
    futures = [executor.submit(tasks.note, log, n) for n in range(2000)]
    said = [future.cancel() for future in reversed(futures)][::-1]
    wait(futures, LIMIT_S)
    ran = set(map(int, tasks.noted(log)))
    for n, future in enumerate(futures):
        assert future.cancelled() == said[n] == (n not in ran), f"task {n} of {future!r}"
        assert said[n] or future.result(LIMIT_S) == n


def test_a_pool_in_which_nothing_moves_stops_what_runs(pool: MakePool) -> None:
    """Both workers are stuck: their tasks end at the stall timeout, and what waited is done."""
    executor = pool(2, stall_timeout=0.5)
    stuck = [executor.submit(tasks.nap, tasks.LIMIT_S) for _ in range(2)]
    waiting = executor.submit(abs, -1)
    for future in stuck:
        error = error_of(future)
        assert type(error) is TaskTimeout
        assert (error.limit, error.seconds) == ("stall_timeout", 0.5)
        assert "nothing in the pool had moved for 0.5 s" in str(error)
    assert waiting.result(LIMIT_S) == 1


def test_a_pool_that_moves_stops_nobody(pool: MakePool) -> None:
    """Short tasks that come and go keep a long one from being taken for stalled."""
    executor = pool(2, stall_timeout=1.0)
    long = executor.submit(tasks.nap, 2.0, "done")
    for _ in range(10):
        assert executor.submit(tasks.nap, 0.2, "short").result(LIMIT_S) == "short"
    assert long.result(LIMIT_S) == "done"


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-1, ValueError), ("soon", TypeError), (True, TypeError)]
)
def test_a_stall_timeout_is_checked_at_the_call(value: Any, error: type[Exception]) -> None:
    """A number of seconds, more than none."""
    with pytest.raises(error, match="stall_timeout"):
        SafePoolExecutor(1, stall_timeout=value)
