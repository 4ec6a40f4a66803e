"""A task is tried again exactly as its policy says, and nothing of what was tried is forgotten."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import tenacity

from safepool import PoisonTask, Retry, SafePoolExecutor, TaskTimeout, WorkerDied
from tests.pool import tasks
from tests.pool.test_deaths import error_of, is_usable, running
from tests.support import LIMIT_S, SLACK_S, until

MakePool = Callable[..., SafePoolExecutor]

ANSWER_LIMIT_S = 60.0  # for a policy to think


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Where each attempt of a task notes the pid of its worker."""
    return tmp_path / "log"


def causes(attempts: Any) -> list[tuple[int, str]]:
    return [(attempt.number, attempt.cause) for attempt in attempts]


# ---------------------------------------------------------------- how often


def test_by_default_nothing_is_tried_again(pool: MakePool, log: Path) -> None:
    """Without a policy a task runs once, whatever becomes of it."""
    executor = pool(1, timeout=0.5)
    for fn in (tasks.fail_until, tasks.die_until, tasks.sleep_until):
        future = executor.submit(fn, log, 1000)
        error_of(future)
        assert future.attempts == ()
    assert len(tasks.noted(log)) == 3


@pytest.mark.parametrize(
    "retry",
    [2, Retry(attempts=3), tenacity.Retrying(stop=tenacity.stop_after_attempt(3))],
    ids=["number", "retry", "tenacity"],
)
def test_the_third_attempt_succeeds(pool: MakePool, log: Path, retry: Any) -> None:
    """Two failed attempts, then the result; the future tells of both."""
    executor = pool(1)
    future = executor.options(retry=retry).submit(tasks.fail_until, log, 2)
    assert future.result(LIMIT_S) == 3
    assert causes(future.attempts) == [(1, "error"), (2, "error")]
    assert [str(attempt.error) for attempt in future.attempts] == ["attempt 1", "attempt 2"]
    assert [str(attempt.pid) for attempt in future.attempts] == tasks.noted(log)[:2]
    assert str(future.worker_pid) == tasks.noted(log)[2]


@pytest.mark.parametrize(
    "retry",
    [2, Retry(attempts=3), tenacity.Retrying(stop=tenacity.stop_after_attempt(3), reraise=True)],
    ids=["number", "retry", "tenacity"],
)
def test_the_last_error_tells_of_all_attempts(pool: MakePool, log: Path, retry: Any) -> None:
    """After the last attempt its error arrives, with all attempts on it, the earlier ones as notes too."""
    future = pool(1, retry=retry).submit(tasks.fail_until, log, 1000)
    error = error_of(future)
    assert type(error) is ValueError
    assert str(error) == "attempt 3"
    assert causes(future.attempts) == [(1, "error"), (2, "error"), (3, "error")]
    assert error.attempts == future.attempts  # type: ignore[attr-defined]
    assert [str(attempt.error) for attempt in future.attempts] == ["attempt 1", "attempt 2", "attempt 3"]
    pids = tasks.noted(log)
    assert error.__notes__ == [
        f"safepool: attempt {n} (worker {pids[n - 1]}): error: ValueError('attempt {n}')" for n in (1, 2)
    ]
    assert len(pids) == 3


def test_an_option_can_switch_it_off(pool: MakePool, log: Path) -> None:
    """A view with ``retry=None``, or 0, of a pool that tries again runs its tasks once."""
    executor = pool(1, retry=5)
    for retry in (None, 0):
        error_of(executor.options(retry=retry).submit(tasks.fail_until, log, 1000))
    assert len(tasks.noted(log)) == 2


# ------------------------------------------------------------- of which cause

BY_CAUSE: dict[str, tuple[Callable[..., int], type[BaseException]]] = {
    "error": (tasks.fail_until, ValueError),
    "timeout": (tasks.sleep_until, TaskTimeout),
    "death": (tasks.die_until, WorkerDied),
}


@pytest.mark.parametrize("cause", BY_CAUSE)
def test_each_cause_can_be_tried_again(pool: MakePool, log: Path, cause: str) -> None:
    """An error, a timeout or a death is tried again if the policy names it, and noted as what it was."""
    fn, error_type = BY_CAUSE[cause]
    executor = pool(1, timeout=0.2 + SLACK_S)
    future = executor.options(retry=Retry(attempts=3, on=(cause,))).submit(fn, log, 2)  # type: ignore[arg-type]
    assert future.result(LIMIT_S) == 3
    assert causes(future.attempts) == [(1, cause), (2, cause)]
    assert [type(attempt.error) for attempt in future.attempts] == [error_type] * 2
    assert [str(attempt.pid) for attempt in future.attempts] == tasks.noted(log)[:2]
    assert len(set(tasks.noted(log))) == (1 if cause == "error" else 3)


@pytest.mark.parametrize("cause", BY_CAUSE)
def test_a_cause_that_is_not_named_is_final(pool: MakePool, log: Path, cause: str) -> None:
    """A policy for the two other causes leaves this one as it is."""
    fn, error_type = BY_CAUSE[cause]
    others = tuple(other for other in BY_CAUSE if other != cause)
    executor = pool(1, timeout=0.2 + SLACK_S, retry=Retry(attempts=5, on=others))  # type: ignore[arg-type]
    future = executor.submit(fn, log, 1000)
    assert type(error_of(future)) is error_type
    assert len(tasks.noted(log)) == 1
    assert causes(future.attempts) == [(1, cause)]


@pytest.mark.parametrize("cause", ["timeout", "death"])
def test_the_last_attempt_of_each_cause_tells_of_all(pool: MakePool, log: Path, cause: str) -> None:
    """When the attempts are used up by timeouts or deaths, the error has all of them, and the facts of the last."""
    fn, error_type = BY_CAUSE[cause]
    executor = pool(1, timeout=0.2 + SLACK_S, retry=Retry(attempts=2, deaths=5))
    error = error_of(executor.submit(fn, log, 1000))
    assert type(error) is error_type
    assert causes(error.attempts) == [(1, cause), (2, cause)]  # type: ignore[attr-defined]
    assert str(error.pid) == tasks.noted(log)[1]  # type: ignore[attr-defined]
    assert len(error.__notes__) == 1


def test_deaths_are_capped_apart(pool: MakePool, log: Path) -> None:
    """A task may fail more often than it may take down workers; the error of the last death has every attempt."""
    executor = pool(1, retry=Retry(attempts=100, deaths=2))
    future = executor.submit(tasks.die_until, log, 1000)
    error = error_of(future)
    assert type(error) is PoisonTask
    assert (error.deaths, error.exitcode) == (2, -signal.SIGKILL)
    assert causes(future.attempts) == [(1, "death"), (2, "death")]
    assert error.attempts == future.attempts


@pytest.mark.parametrize(
    ("errors", "runs"),
    [(ValueError, 3), (KeyError, 1), ((KeyError, ValueError), 3), (lambda error: "1" in str(error), 2)],
    ids=["this", "another", "several", "function"],
)
def test_only_errors_that_are_named_are_tried_again(pool: MakePool, log: Path, errors: Any, runs: int) -> None:
    """``errors`` may be a class, several, or a function of the exception."""
    future = pool(1, retry=Retry(attempts=3, errors=errors)).submit(tasks.fail_until, log, 1000)
    assert str(error_of(future)) == f"attempt {runs}"
    assert len(tasks.noted(log)) == runs


# --------------------------------------------------------------------- when


@pytest.mark.parametrize(
    "wait_s",
    [0.3, tenacity.wait_fixed(0.3), tenacity.wait_incrementing(0.3, 0)],
    ids=["seconds", "fixed", "incrementing"],
)
def test_a_policy_may_wait(pool: MakePool, log: Path, wait_s: Any) -> None:
    """Between two attempts the task waits so long, and its worker works for others."""
    executor = pool(1)
    began = monotonic()
    future = executor.options(retry=Retry(attempts=3, wait=wait_s)).submit(tasks.fail_until, log, 2)
    until(lambda: future.attempts, "the first attempt failed")
    until(lambda: not future.running(), "it waits")
    assert is_usable(executor)
    assert future.result(LIMIT_S) == 3
    assert 0.6 <= monotonic() - began < 0.6 + 2 * SLACK_S


def test_a_policy_may_wait_for_long(pool: MakePool, log: Path) -> None:
    """However long it takes from one attempt to the next, the policy goes on where it was."""
    future = pool(1, retry=Retry(attempts=4, wait=1.2)).submit(tasks.fail_until, log, 2)
    assert future.result(LIMIT_S) == 3
    assert causes(future.attempts) == [(1, "error"), (2, "error")]


def test_a_task_that_waits_can_be_cancelled(pool: MakePool, log: Path) -> None:
    """Between two attempts a task is pending, and ``cancel`` works at once."""
    executor = pool(1, retry=Retry(wait=tasks.LIMIT_S))
    future = executor.submit(tasks.fail_until, log, 1000)
    until(lambda: future.attempts and not future.running(), "it waits")
    assert future.cancel()
    executor.shutdown()
    assert future.cancelled()
    assert len(tasks.noted(log)) == 1


def test_shutdown_waits_for_further_attempts(pool: MakePool, log: Path) -> None:
    """What was submitted is tried to its end."""
    executor = pool(1, retry=Retry(wait=0.1))
    future = executor.submit(tasks.fail_until, log, 2)
    executor.shutdown()
    assert future.result(0) == 3


def test_shutdown_can_cancel_further_attempts(pool: MakePool, log: Path) -> None:
    """With ``cancel_futures`` a task between two attempts is cancelled, not waited for."""
    executor = pool(1, retry=Retry(wait=tasks.LIMIT_S))
    future = executor.submit(tasks.fail_until, log, 1000)
    until(lambda: future.attempts and not future.running(), "it waits")
    began = monotonic()
    executor.shutdown(cancel_futures=True)
    assert future.cancelled()
    assert monotonic() - began < LIMIT_S / 2


def test_a_deadline_ends_a_wait(pool: MakePool, log: Path) -> None:
    """A task whose next attempt would come after its deadline fails at the deadline."""
    executor = pool(1, retry=Retry(wait=tasks.LIMIT_S), deadline=0.6)
    began = monotonic()
    error = error_of(executor.submit(tasks.fail_until, log, 1000))
    assert 0.5 < monotonic() - began < 0.7 + SLACK_S
    assert type(error) is TaskTimeout
    assert error.limit == "deadline"
    assert causes(error.attempts) == [(1, "error")]
    assert any("ValueError('attempt 1')" in note for note in error.__notes__)


# ----------------------------------------------------------------- tenacity


def test_tenacity_predicates_on_exceptions(pool: MakePool, log: Path) -> None:
    """``retry_if_exception_type`` decides which errors are tried again."""
    several = tenacity.stop_after_attempt(3)
    yes = tenacity.Retrying(stop=several, retry=tenacity.retry_if_exception_type(ValueError), reraise=True)
    no = tenacity.Retrying(stop=several, retry=tenacity.retry_if_exception_type(KeyError), reraise=True)
    executor = pool(1)
    assert str(error_of(executor.options(retry=no).submit(tasks.fail_until, log, 1000))) == "attempt 1"
    assert str(error_of(executor.options(retry=yes).submit(tasks.fail_until, log, 1000))) == "attempt 4"


def test_tenacity_predicates_on_results(pool: MakePool, log: Path) -> None:
    """``retry_if_result`` decides which results are tried again; the future has the one that is accepted."""
    policy = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(5), retry=tenacity.retry_if_result(lambda number: number < 3)
    )
    future = pool(1, retry=policy).submit(tasks.attempt, log)
    assert future.result(LIMIT_S) == 3
    assert causes(future.attempts) == [(1, "result"), (2, "result")]


def test_results_that_are_never_accepted(pool: MakePool, log: Path) -> None:
    """When the attempts are used up by results, the future has tenacity's ``RetryError`` with all of them."""
    policy = tenacity.Retrying(stop=tenacity.stop_after_attempt(2), retry=tenacity.retry_if_result(lambda _: True))
    future = pool(1, retry=policy).submit(tasks.attempt, log)
    error = error_of(future)
    assert type(error) is tenacity.RetryError
    assert causes(error.attempts) == [(1, "result"), (2, "result")]  # type: ignore[attr-defined]
    assert len(tasks.noted(log)) == 2


def test_one_tenacity_policy_serves_many_tasks(pool: MakePool, tmp_path: Path) -> None:
    """Tasks under the same ``Retrying`` count their attempts apart, and its own counts stay as they were."""
    policy = tenacity.Retrying(stop=tenacity.stop_after_attempt(3))
    executor = pool(2, retry=policy)
    futures = [executor.submit(tasks.fail_until, tmp_path / str(n), 2) for n in range(20)]
    assert [future.result(LIMIT_S) for future in futures] == [3] * 20
    assert policy.statistics == {}


def test_tenacity_retries_deaths_and_timeouts_too(pool: MakePool, tmp_path: Path) -> None:
    """A ``Retrying`` sees ``WorkerDied`` and ``TaskTimeout`` as the exceptions that they are."""
    policy = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(3), retry=tenacity.retry_if_exception_type((WorkerDied, TaskTimeout))
    )
    executor = pool(1, retry=policy, timeout=0.2 + SLACK_S)
    assert executor.submit(tasks.die_until, tmp_path / "death", 2).result(LIMIT_S) == 3
    assert executor.submit(tasks.sleep_until, tmp_path / "timeout", 2).result(LIMIT_S) == 3


# ------------------------------------------------------------ bad policies


def test_a_predicate_that_raises_is_told(pool: MakePool, log: Path) -> None:
    """Its error arrives at the future, with the attempt it was asked about; the pool goes on."""

    def bad(error: BaseException) -> bool:
        raise ZeroDivisionError("a bad policy")

    executor = pool(1)
    future = executor.options(retry=Retry(errors=bad)).submit(tasks.fail_until, log, 1000)
    error = error_of(future)
    assert type(error) is ZeroDivisionError
    assert causes(error.attempts) == [(1, "error")]  # type: ignore[attr-defined]
    assert isinstance(future.attempts[0].error, ValueError)
    assert is_usable(executor)


def test_a_predicate_may_use_the_pool(pool: MakePool, log: Path) -> None:
    """A policy that submits, and waits for the answer, does not block anything it needs."""
    executor = pool(1)

    def ask(error: BaseException) -> bool:
        return bool(executor.submit(tasks.echo, True).result(LIMIT_S))

    assert executor.options(retry=Retry(errors=ask)).submit(tasks.fail_until, log, 1).result(LIMIT_S) == 2


@pytest.mark.slow
def test_a_predicate_that_blocks_is_not_waited_for(pool: MakePool, tmp_path: Path) -> None:
    """After its time a policy that thinks is passed over: the outcome stands, and others get their answers."""
    leave = threading.Event()
    executor = pool(2)
    try:
        policy = Retry(errors=lambda error: leave.wait(2 * ANSWER_LIMIT_S))
        blocked = executor.options(retry=policy).submit(tasks.fail_until, tmp_path / "blocked", 1000)
        others = [executor.options(retry=2).submit(tasks.fail_until, tmp_path / str(n), 2) for n in range(10)]
        began = monotonic()
        assert is_usable(executor)
        assert [future.result(LIMIT_S) for future in others] == [3] * 10
        assert str(error_of(blocked, ANSWER_LIMIT_S + LIMIT_S)) == "attempt 1"
        assert ANSWER_LIMIT_S - 1 < monotonic() - began < ANSWER_LIMIT_S + 1 + SLACK_S
    finally:
        leave.set()


def test_many_tasks_that_are_tried_again(pool: MakePool, tmp_path: Path) -> None:
    """Errors, deaths and timeouts among many tasks: each is tried as often as it needs."""
    executor = pool(2, retry=Retry(attempts=4, deaths=4), timeout=0.5 + SLACK_S)
    kinds = [tasks.fail_until, tasks.die_until, tasks.fail_until, tasks.sleep_until] * 2
    futures = [executor.submit(fn, tmp_path / str(n), n % 3) for n, fn in enumerate(kinds)]
    assert [future.result(LIMIT_S) for future in futures] == [n % 3 + 1 for n in range(len(kinds))]
    assert [len(future.attempts) for future in futures] == [n % 3 for n in range(len(kinds))]


def test_the_attempts_of_a_killed_task_end(pool: MakePool, log: Path) -> None:
    """``kill()`` is stronger than any policy: the task is not tried again."""
    executor = pool(1, retry=10)
    future = executor.submit(tasks.sleep_until, log, 1000)
    running(future)
    assert future.kill()
    until(future.cancelled, "it is cancelled")
    assert is_usable(executor)
    assert len(tasks.noted(log)) <= 1
