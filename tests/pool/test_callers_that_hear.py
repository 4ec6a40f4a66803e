"""Who waits for a task that it has sent itself hears the answer itself; nothing is lost if anything comes between."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy
import pytest

from safepool import PoolEvent, SafeFuture, SafePoolExecutor, WorkerDied
from safepool import _events as e
from safepool._core import Core
from safepool._links import Links
from safepool._loans import Loan
from safepool.policy import PoolPolicy
from tests.pool import tasks
from tests.pool.test_deaths import error_of
from tests.support import LIMIT_S, SLACK_S, until

MakePool = Callable[..., SafePoolExecutor]
AWHILE_S = 0.3
MOST_TRIES = 20


class Interrupted(BaseException):
    """What a signal handler of the user's raises."""


@pytest.fixture(autouse=True)
def heard(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What came of each attempt to hear: a test in which none was made has shown nothing."""
    found: list[bool] = []
    hear = Loan.hear

    def note(self: Loan, future: Any, limit_s: float) -> bool:
        found.append(False)
        found[-1] = hear(self, future, limit_s)
        return found[-1]

    monkeypatch.setattr(Loan, "hear", note)
    return found


def _lent(executor: SafePoolExecutor) -> SafePoolExecutor:
    """With a worker that callers may send to."""
    for _ in range(3):
        executor.submit(tasks.echo, 0).result(LIMIT_S)
        until(lambda: executor._watchdog._loans, "a worker is lent")
    return executor


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def _hearing(
    thread: ThreadPoolExecutor, executor: SafePoolExecutor, gate: Path, value: int = 0
) -> tuple[SafeFuture, Future[Any]]:
    """A task that has begun, waits for ``gate``, and whose submitter is hearing its worker; and what that comes to."""
    begun = _begun(gate)
    for _ in range(MOST_TRIES):
        made: list[SafeFuture] = []

        def work(made: list[SafeFuture] = made) -> Any:
            made.append(executor.submit(wait_for, str(gate), value))
            return made[0].result(LIMIT_S)

        outcome = thread.submit(work)
        end = time.monotonic() + SLACK_S
        while time.monotonic() < end:
            if begun.exists() and any(not loan.is_left for loan in executor._watchdog._loans):
                return made[0], outcome  # (one that has not begun is cancelled, and sent again after a death)
            time.sleep(0.001)
        gate.touch()  # the watchdog was awake just then
        outcome.result(LIMIT_S)
        gate.unlink()
        begun.unlink()
        _lent(executor)
    raise AssertionError("nobody hears a worker")


def leave() -> int:
    return os.posix_spawn("/bin/sleep", ["sleep", "60"], os.environ)


def a_list(number: int) -> list[int]:
    return [number]


def _begun(gate: Path) -> Path:
    return gate.with_name(f"{gate.name}-begun")


def wait_for(gate: str, value: int = 0) -> int:
    """As that of ``tasks``, for an argument that is plain; who asks can see that it has begun."""
    _begun(Path(gate)).touch()
    return int(tasks.wait_for(Path(gate), value))


def test_one_at_a_time_wakes_nobody(
    pool: MakePool, context: Any, heard: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of many round trips, plain and pickled; the core learns of them later, all at once."""
    told: list[int] = []
    note = Links.note_answers

    def note_answers(links: Links, worker: int, count: int, total_s: float) -> None:
        told.append(count)
        note(links, worker, count, total_s)

    monkeypatch.setattr(Links, "note_answers", note_answers)
    executor = pool(2, context)
    for _ in range(MOST_TRIES):
        _lent(executor)
        assert [executor.submit(tasks.echo, n).result(LIMIT_S) for n in range(100)] == list(range(100))
        assert [executor.submit(a_list, n).result(LIMIT_S) for n in range(100)] == [[n] for n in range(100)]
        if sum(heard) > 200:
            break
    assert sum(heard) > 200
    until(lambda: not executor._watchdog._loans, "the last loan is called in")
    # (A loan may be called in just when its answer was heard: then the core learns of that task as of any other.)
    assert 100 < sum(told) <= sum(heard)
    assert "0 tasks" in repr(executor)


def test_what_is_more_than_a_result_is_the_watchdogs(pool: MakePool) -> None:
    """An error, something big, something left behind, a death: each as always, and in time."""
    executor = _lent(pool(1))
    began = time.monotonic()
    assert type(error_of(executor.submit(divmod, 1, 0))) is ZeroDivisionError
    assert executor.submit(numpy.zeros, 1_000_000).result(LIMIT_S).shape == (1_000_000,)
    future = executor.submit(leave)
    assert future.result(LIMIT_S) > 0
    until(lambda: future.leftovers, "what it left is told")
    _lent(executor)
    assert type(error_of(executor.submit(os._exit, 7))) is WorkerDied
    assert executor.submit(tasks.echo, 1).result(LIMIT_S) == 1
    assert time.monotonic() - began < 1.0 + 4 * SLACK_S


def test_a_limit_of_the_caller_is_kept(pool: MakePool, heard: list[bool], tmp_path: Path) -> None:
    """``result(timeout)`` raises in time, and later the result is there."""
    executor, gate = pool(1), tmp_path / "gate"
    for _ in range(MOST_TRIES):
        _lent(executor)
        heard.clear()
        future = executor.submit(wait_for, str(gate), 5)
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            future.result(AWHILE_S)
        assert AWHILE_S <= time.monotonic() - began < AWHILE_S + SLACK_S
        gate.touch()
        assert future.result(LIMIT_S) == 5
        gate.unlink()
        if heard[:1] == [False]:
            return
    pytest.fail("nobody has heard a worker")


def test_others_call_the_loan_in(pool: MakePool, thread: ThreadPoolExecutor, tmp_path: Path) -> None:
    """Scenario 2: another thread has work for the watchdog; who was hearing is told as soon as its task is done."""
    executor = _lent(pool(2))
    future, outcome = _hearing(thread, executor, tmp_path / "gate", 7)
    assert not future.done()
    assert [executor.submit(tasks.echo, n).result(LIMIT_S) for n in range(50)] == list(range(50))
    until(future.running, "it runs")
    assert future.worker_pid is not None
    (tmp_path / "gate").touch()
    began = time.monotonic()
    assert outcome.result(LIMIT_S) == 7
    assert time.monotonic() - began < SLACK_S


def test_others_may_wait_for_the_same_future(pool: MakePool, thread: ThreadPoolExecutor, tmp_path: Path) -> None:
    """By a callback, or ``as_completed``: whoever hears it tells them."""
    executor = _lent(pool(1))
    future, outcome = _hearing(thread, executor, tmp_path / "gate", 7)
    told: list[Any] = []
    future.add_done_callback(told.append)
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(lambda: list(as_completed([future], LIMIT_S)))
        (tmp_path / "gate").touch()
        assert waiting.result(LIMIT_S) == [future]
    assert outcome.result(LIMIT_S) == 7
    until(lambda: told == [future], "it is called back")


@pytest.mark.parametrize("how", ["kill", "kill_workers", "death"])
def test_it_may_end_otherwise(pool: MakePool, thread: ThreadPoolExecutor, how: str, tmp_path: Path) -> None:
    """Killed by another thread, with the pool, or with its worker: who hears it learns that at once."""
    executor = _lent(pool(1))
    future, outcome = _hearing(thread, executor, tmp_path / "gate")
    began = time.monotonic()
    if how == "kill":
        assert future.kill()
    elif how == "kill_workers":
        executor.kill_workers()
    else:
        os.kill(next(iter(executor._processes)), signal.SIGKILL)
    error = outcome.exception(LIMIT_S)
    assert isinstance(error, CancelledError if how == "kill" else Exception)
    assert time.monotonic() - began < 2 * SLACK_S
    assert future.done()


def test_cancel_and_shutdown_find_it_running(pool: MakePool, thread: ThreadPoolExecutor, tmp_path: Path) -> None:
    """As they find any other."""
    executor = _lent(pool(1))
    future, outcome = _hearing(thread, executor, tmp_path / "gate", 3)
    assert not future.cancel()
    (tmp_path / "gate").touch()
    executor.shutdown()
    assert outcome.result(LIMIT_S) == 3


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no signal comes at a moment of one's choice")
def test_a_handler_that_raises_anywhere(pool: MakePool) -> None:
    """Scenario 3: whatever it interrupts, no later task hangs, none is lost, and each result is its own."""
    executor = _lent(pool(2))
    rng = random.Random(4)
    armed = False

    def interrupt(*_: Any) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    gc.disable()  # what is raised in a callback of the collector is lost
    try:
        for n in range(400):
            future: Any = None
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 3e-4))
                future = executor.submit(tasks.echo, n)
                assert future.result(LIMIT_S) == n
                armed = False
            except Interrupted:
                interrupted += 1
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            if future is not None:
                assert future.result(LIMIT_S) == n
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.enable()
    assert interrupted > 20
    assert executor.submit(tasks.echo, 1).result(LIMIT_S) == 1


def test_many_threads_one_task_at_a_time(pool: MakePool, heard: list[bool]) -> None:
    """More than there are workers: each has its own result."""
    executor = _lent(pool(2))

    def work(thread: int) -> list[int]:
        return [executor.submit(tasks.echo, (thread << 20) + n).result(LIMIT_S) for n in range(300)]

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(work, range(4)))
    assert found == [[(thread << 20) + n for n in range(300)] for thread in range(4)]
    assert heard


def test_what_it_returned_is_not_kept(pool: MakePool, heard: list[bool]) -> None:
    """By the loan, which lives on."""
    executor = _lent(pool(1))
    for _ in range(100):
        future = executor.submit(tasks.a_set)
        result = weakref.ref(future.result(LIMIT_S))
        if heard[-1]:
            del future
            assert result() is None
            return
        _lent(executor)
    pytest.fail("nothing was heard")


def test_observers_are_told(pool: MakePool, heard: list[bool]) -> None:
    """All that is done, those that were heard included."""
    seen: list[PoolEvent] = []
    executor = _lent(pool(1, on_event=seen.append))
    for n in range(200):
        executor.submit(tasks.echo, n).result(LIMIT_S)
    executor.shutdown()
    assert sum(heard) > 50
    counts: Counter[str] = Counter()
    for event in seen:
        counts[event.what] += event.done
    assert +counts == {"returned": 203}


@pytest.mark.parametrize("policy", [{"stall_timeout": 60}, {"max_tasks_per_child": 1000}], ids=str)
def test_not_where_somebody_counts_or_watches(pool: MakePool, heard: list[bool], policy: dict[str, Any]) -> None:
    """Tasks that are heard by callers are learnt of late."""
    executor = pool(1, **policy)
    assert [executor.submit(tasks.echo, n).result(LIMIT_S) for n in range(100)] == list(range(100))
    assert not any(heard)


def test_the_core_learns_how_long_they_took() -> None:
    """And nothing else changes; of a worker that is gone it learns nothing."""
    core = Core(PoolPolicy(1, None, "heal", start_all=False, take_back=True))
    core.handle(e.TasksSubmitted(0.0, (1,), plain=True))
    core.handle(e.WorkerReady(0.1, 1))
    core.handle(e.Received(0.2, 1, (1,), run_s=0.1))
    before = core.snapshot()
    assert core.handle(e.AnsweredDirectly(0.3, 1, 1000, 0.001)) == []
    assert core.mean_s() == pytest.approx(0.8 * 0.1 + 0.2 * 0.001)
    assert core.handle(e.AnsweredDirectly(0.4, 9, 1000, 0.001)) == []
    after = core.snapshot()
    assert (after.tasks, after.workers) == (before.tasks, before.workers)


def test_many_loans_are_called_in_together(pool: MakePool) -> None:
    """Several callers hear at once, and one more has work for the watchdog: all come back."""
    executor = _lent(pool(4))
    barrier = threading.Barrier(4, timeout=LIMIT_S)

    def work(n: int) -> list[Any]:
        found = []
        for at in range(60):
            barrier.wait()
            found.append(executor.submit(tasks.nap, 0.002 if n else 0, at).result(LIMIT_S))
        return found

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, range(4))) == [list(range(60))] * 4
