"""Small calls share tickets, and each is a task of its own all the same: cancelled, blamed, limited and told alone."""

from __future__ import annotations

import mmap
import os
import resource
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, as_completed, wait
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from safepool import CAPABILITIES, Retry, SafePoolExecutor, TaskTimeout, WorkerDied, _batches, _os, _together
from safepool import _events as e
from safepool._batches import SLOW_S, Calls, Journal
from safepool._launch import Processes
from safepool._link import SURE_S, Heard, Link
from safepool._links import Links
from safepool._pending import Pending
from safepool._wire import Board, plain_in, token_of
from tests.pool.runs import log, note, noted  # noqa: F401  (the first is a fixture)
from tests.pool.test_deaths import error_of
from tests.support import LIMIT_S, SLACK_S, until, write_down

MakePool = Callable[..., SafePoolExecutor]
MANY = 2_000
AT = 700  # the task that is special


@pytest.fixture(autouse=True)
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tasks each batch had: a test in which there was none has shown nothing."""
    found: list[int] = []

    class Futures(_together.Futures):
        __slots__ = ()

        def __init__(self, futures: Any) -> None:
            found.append(len(futures))
            super().__init__(futures)

    monkeypatch.setattr(_together, "Futures", Futures)
    return found


def die_at(number: int) -> int:
    note(number)
    if number == AT:
        os._exit(7)
    return number


def raise_at(number: int) -> int:
    if number == AT:
        raise ValueError(f"no {number}")
    return number


def list_at(number: int) -> Any:
    return [number] if number == AT else number


def wait_at(number: int, at: int, gate: str) -> int:
    """That one waits until there is a file ``gate``."""
    note(number)
    end = time.monotonic() + LIMIT_S
    while number == at and not os.path.exists(gate) and time.monotonic() < end:
        time.sleep(0.001)
    return number


def slow_then_wait(number: int, gate: str) -> int:
    """The first takes long enough for its worker to ask for the token; the second one waits."""
    if number == 0:
        time.sleep(2 * SLOW_S)
    return wait_at(number, 1, gate)


def fail_once(number: int, folder: str) -> int:
    """Of each seventh number the first attempt raises."""
    path = Path(folder) / str(number)
    if number % 7 == 0 and not path.exists():
        path.touch()
        raise KeyError(number)
    return number


def _warm(executor: SafePoolExecutor) -> None:
    """It knows that calls are short."""
    for _ in range(3):
        wait([executor.submit(abs, n) for n in range(500)], LIMIT_S)


def test_many_calls_share_tickets_under_every_start_method(pool: MakePool, context: Any, sizes: list[int]) -> None:
    """And each future has its own result."""
    executor = pool(2, context)
    _warm(executor)
    futures = [executor.submit(pow, n, 2) for n in range(MANY)]
    assert [future.result(LIMIT_S) for future in futures] == [n**2 for n in range(MANY)]
    assert max(sizes) > 20


def test_a_death_costs_one_and_none_runs_twice(pool: MakePool, context: Any, sizes: list[int]) -> None:
    """What was finished before it is told, what had not begun is run by others; the error names the task."""
    executor = pool(2, context)
    _warm(executor)
    futures = [executor.submit(die_at, n) for n in range(MANY)]
    error = error_of(futures[AT])
    assert type(error) is WorkerDied
    assert error.exitcode == 7
    assert str(futures[AT]) in str(error)
    assert [f.result(LIMIT_S) for n, f in enumerate(futures) if n != AT] == [n for n in range(MANY) if n != AT]
    assert noted() == Counter(range(MANY))
    assert max(sizes) > 20


def test_an_error_and_what_is_not_plain_cost_nobody_else(pool: MakePool, sizes: list[int]) -> None:
    """An exception with its traceback, and a result that must be pickled."""
    executor = pool(2)
    _warm(executor)
    futures: list[Future[Any]] = [executor.submit(raise_at, n) for n in range(MANY)]
    lists: list[Future[Any]] = [executor.submit(list_at, n) for n in range(MANY)]
    error = error_of(futures[AT])
    assert type(error) is ValueError
    assert " in raise_at" in str(error.__cause__)
    assert sum(future.result(LIMIT_S) for n, future in enumerate(futures) if n != AT) == sum(range(MANY)) - AT
    assert lists[AT].result(LIMIT_S) == [AT]
    assert max(sizes) > 20


def test_who_is_slow_holds_up_nobody(pool: MakePool, sizes: list[int], tmp_path: Path) -> None:
    """What ended before it is told while it runs, what comes after it is run by others; it alone is running."""
    executor, gate = pool(2), tmp_path / "gate"
    _warm(executor)
    futures = [executor.submit(wait_at, n, AT, str(gate)) for n in range(MANY)]
    done = list(as_completed(futures[:AT] + futures[AT + 1 :], LIMIT_S))
    assert len(done) == MANY - 1
    until(futures[AT].running, "it runs")
    assert futures[AT].worker_pid is not None
    assert not gate.exists()
    gate.touch()
    assert futures[AT].result(LIMIT_S) == AT
    assert noted() == Counter(range(MANY))
    assert max(sizes) > 20


def test_the_second_slow_one_holds_up_nobody_either(pool: MakePool, sizes: list[int], tmp_path: Path) -> None:
    """Its worker has asked for the token once, and has put it there anew."""
    executor, gate = pool(2), tmp_path / "gate"
    _warm(executor)
    for _ in range(5):
        sizes.clear()
        futures = [executor.submit(slow_then_wait, n, str(gate)) for n in range(MANY)]
        wait(futures[:1] + futures[2:], LIMIT_S)
        assert [n for n, future in enumerate(futures) if not future.done()] == [1]
        gate.touch()
        assert futures[1].result(LIMIT_S) == 1
        gate.unlink()


def test_cancel_reaches_what_shares_a_ticket(pool: MakePool, sizes: list[int], tmp_path: Path) -> None:
    """At once, and exactly: what is cancelled never runs, what says that it cannot be does."""
    executor, gate = pool(2), tmp_path / "gate"
    _warm(executor)
    futures = [executor.submit(wait_at, n, AT, str(gate)) for n in range(MANY)]
    cancelled = [n for n in range(MANY) if futures[n].cancel()]
    gate.touch()
    wait(futures, LIMIT_S)
    executor.shutdown()
    assert all(futures[n].cancelled() for n in cancelled)
    assert noted() == Counter(set(range(MANY)).difference(cancelled))


def test_what_waits_behind_a_slow_one_can_be_cancelled(pool: MakePool, tmp_path: Path) -> None:
    """In the moment in which it was sent along with it."""
    executor, gate = pool(1), tmp_path / "gate"
    for _ in range(20):
        _warm(executor)
        futures = [executor.submit(wait_at, n, 5, str(gate)) for n in range(100)]
        until(lambda futures=futures: futures[4].done() or futures[5].running(), "those before it are done")
        assert futures[99].cancel()
        assert not futures[5].done()
        gate.touch()
        wait(futures, LIMIT_S)
        gate.unlink()
    executor.shutdown()
    assert noted()[99] == 0
    assert noted()[98] == 20


def test_kill_hits_the_one_that_runs(pool: MakePool, tmp_path: Path) -> None:
    """And those that were sent along with it run elsewhere, once."""
    executor, gate = pool(2), tmp_path / "gate"
    _warm(executor)
    futures = [executor.submit(wait_at, n, AT, str(gate)) for n in range(MANY)]
    until(futures[AT].running, "it runs")
    assert futures[AT].kill()
    until(futures[AT].cancelled, "it is cancelled")
    assert sum(future.result(LIMIT_S) for n, future in enumerate(futures) if n != AT) == sum(range(MANY)) - AT
    assert noted() == Counter(range(MANY))


def test_a_timeout_hits_the_one_that_is_slow(pool: MakePool, tmp_path: Path) -> None:
    """Its clock starts when it begins, also within a batch."""
    executor, gate = pool(2), tmp_path / "gate"
    _warm(executor)
    limited = executor.options(timeout=6 * SLACK_S)  # the worker that takes over imports this module within it
    futures = [limited.submit(wait_at, n, AT, str(gate)) for n in range(MANY)]
    assert type(error_of(futures[AT])) is TaskTimeout
    assert sum(future.result(LIMIT_S) for n, future in enumerate(futures) if n != AT) == sum(range(MANY)) - AT
    assert noted() == Counter(range(MANY))


def test_each_has_attempts_of_its_own(pool: MakePool, sizes: list[int], tmp_path: Path) -> None:
    """A retry policy is asked about those that failed, and no others."""
    executor = pool(2)
    _warm(executor)
    patient = executor.options(retry=Retry(attempts=2))
    futures: list[Any] = [patient.submit(fail_once, n, str(tmp_path)) for n in range(MANY)]
    assert [future.result(LIMIT_S) for future in futures] == list(range(MANY))
    assert [n for n, future in enumerate(futures) if future.attempts] == list(range(0, MANY, 7))
    assert max(sizes) > 1


def leave_at(number: int) -> int:
    if number == AT:
        os.posix_spawn("/bin/sleep", ["sleep", "60"], os.environ)
    return number


@pytest.mark.skipif(not hasattr(os, "posix_spawn"), reason="there are no leftovers to be told of")
def test_what_one_leaves_is_told_of_that_one(pool: MakePool) -> None:
    """And of no other that shares its ticket."""
    executor = pool(2)
    _warm(executor)
    futures: list[Any] = [executor.submit(leave_at, n) for n in range(MANY)]
    wait(futures, LIMIT_S)
    until(lambda: any(future.leftovers for future in futures), "it is told")
    assert [n for n, future in enumerate(futures) if future.leftovers] == [AT]
    assert "sleep" in futures[AT].leftovers[0].command


def test_a_result_that_was_dropped_is_not_kept(pool: MakePool, tmp_path: Path) -> None:
    """By a batch that is not answered as a whole, because one of it is slow."""
    executor, gate = pool(1), tmp_path / "gate"
    _warm(executor)
    futures = [executor.submit(wait_at, n, 50, str(gate)) for n in range(100)]
    assert futures[10].result(LIMIT_S) == 10
    alive = weakref.ref(futures[10])
    futures[10] = futures[11]
    until(lambda: alive() is None, "nobody has it any more")
    gate.touch()
    wait(futures, LIMIT_S)


def test_a_worker_that_dies_when_all_are_known_and_none_is_told(pool: MakePool) -> None:
    """What is left of its batch names a task that was in it."""
    executor = pool(1)
    futures = [executor.submit(abs, n) for n in range(3)]
    batch = _together.Futures(list(futures))
    assert list(batch.take_early([0, 1, 2], 1, [])) == [future._task for future in futures]
    assert batch._task == futures[2]._task
    assert list(batch.tasks()) == []
    assert batch.one() is None


def _never(error: BaseException) -> bytes:
    raise AssertionError from error


def test_no_time_lies_between_two_tasks() -> None:
    """Scenario 2 of ``_batches``: a worker that is held up after a quick task asks for the token all the same."""
    asked: list[int] = []
    calls = Calls([(n,) for n in range(3)], 0)

    def tidy_up(at: int) -> bool:
        time.sleep(2 * SLOW_S if at == 0 else 0)
        return True

    def may_go_on() -> bool:
        asked.append(1)
        return False

    _, _, body, is_tidy = _batches.run(
        Journal(None), 1, abs, calls,
        failure=_never, send=print, send_big=None, tidy_up=tidy_up, may_go_on=may_go_on, shortest_s=0.0,
    )  # fmt: skip
    assert is_tidy
    assert asked == [1]
    assert plain_in(body) == [0]


@contextmanager
def _a_board() -> Iterator[tuple[Any, Any, Journal]]:
    """A board, the token of the batch 1 and the worker's journal."""
    board, token = _os.open_board(Board.BYTES), _os.open_token()
    try:
        with mmap.mmap(board.fileno(), Board.BYTES) as memory:
            journal = Journal(memory)
            _os.put_token(token, token_of(1, 0))
            journal.begin(1)
            yield board, token, journal
            journal.head.release()
    finally:
        _os.close(board)
        _os.close(token)


class _OfAParent(Link):
    """The parent's side of a worker that this test plays."""

    def __init__(self, board: Any, token: Any, futures: list[Any]) -> None:
        self._board, self._token = board, token
        self._sent = {1: _together.Futures(futures)}
        self._seen = None, 0.0
        self._held = self._wanted = 0


@pytest.mark.skipif("board" not in CAPABILITIES, reason="tasks do not share tickets here")
@pytest.mark.parametrize("asks_again", [False, True])
def test_a_token_of_a_later_task_is_worth_nothing(pool: MakePool, asks_again: bool) -> None:
    """(a) The parent sees one task run for long, (b) it ends, and the token is there anew, (c) the parent takes it.

    It keeps it, for what comes after the task that runs then.
    """
    executor = pool(1)
    futures = [executor.submit(abs, n) for n in range(10)]
    with _a_board() as (board, token, journal):
        link = _OfAParent(board, token, futures)
        for n in range(3):
            write_down(journal, n)
        assert link.take_rest(0.0) == ()
        time.sleep(2 * SURE_S)
        if asks_again:
            _os.put_token(token, token_of(1, 1))
        rest = link.take_rest(0.0)
        later = rest
        if asks_again:
            journal.asked()
            assert link.take_rest(0.0) == ()
            time.sleep(2 * SURE_S)
            later = link.take_rest(0.0)
    assert (rest == ()) is asks_again
    assert later == tuple(future._task for future in futures[4:])


@pytest.mark.skipif("board" not in CAPABILITIES, reason="tasks do not share tickets here")
def test_only_what_was_seen_twice_counts(pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """(a) The parent reads the board, (b) it waits for its turn to run, (c) it looks at the clock: too late."""
    futures = [pool(1).submit(abs, n) for n in range(10)]
    where = Link._where

    def slow(link: Any) -> Any:
        found = where(link)
        time.sleep(2 * SURE_S)
        return found

    with _a_board() as (board, token, _):
        link = _OfAParent(board, token, futures)
        assert link.take_rest(0.0) == ()
        monkeypatch.setattr(Link, "_where", slow)
        assert link.take_rest(0.0) == ()
        assert link.take_rest(0.0) == tuple(future._task for future in futures[1:])


def test_a_board_says_first_that_it_is_of_no_batch() -> None:
    """While it is turned: else a part that was sent seems to be one of which nothing has ended."""
    stores: list[tuple[int, int]] = []

    class Head(list[int]):
        def __setitem__(self, at: Any, value: Any) -> None:
            stores.append((at, value))

    journal = Journal(None)
    journal.head = Head()
    journal.begin(3)
    assert stores[0] == (_batches.NUMBER, 0)
    assert stores[-1] == (_batches.NUMBER, 3)


def test_the_rest_is_returned_before_later_answers() -> None:
    """Scenario 2 of ``_links``: the core takes answers in the order in which it has sent the tasks."""
    events: deque[Any] = deque()
    links = Links(events, Pending(), Processes())
    heard = Heard([1, 2, 9], [], None, 0.001, [], [3, 4], None)
    link = SimpleNamespace(
        hear=lambda **_: heard, worker=1, is_deaf=False, has_to_write=lambda: False, has_batch=lambda: False
    )
    links.hear(link)  # type: ignore[arg-type]
    assert [(type(event), getattr(event, "tasks", None) or event.finished) for event in events] == [
        (e.TakenBack, (3, 4)), (e.Received, (1, 2, 9)),
    ]  # fmt: skip


def leave_often(number: int) -> int:
    if number % 10 == 0:
        os.posix_spawn("/bin/sleep", ["sleep", "60"], os.environ)
    return number


@pytest.mark.skipif("keeper" not in CAPABILITIES, reason="there are no leftovers to be told of")
def test_what_is_left_is_told_however_early_the_result_is_known(pool: MakePool) -> None:
    """Scenario 1 of ``_links``: somebody looks at the board again and again."""
    executor = pool(1)
    for _ in range(5):
        _warm(executor)
        futures: list[Any] = [executor.submit(leave_often, n) for n in range(100)]
        while not all(future.done() for future in futures):
            executor._watchdog.look(wait=True)
        assert [n for n, future in enumerate(futures) if future.leftovers] == list(range(0, 100, 10))


def out_of_descriptors(number: int) -> int:
    if number == AT:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        if os.fork() == 0:
            time.sleep(60)
    return number


@pytest.mark.skipif("keeper" not in CAPABILITIES, reason="there are no leftovers to be told of")
def test_a_worker_that_stops_after_a_task_has_not_begun_the_next(pool: MakePool) -> None:
    """It cannot see what that has left, and ends: nobody is blamed for it."""
    executor = pool(2)
    _warm(executor)
    futures = [executor.submit(out_of_descriptors, n) for n in range(MANY)]
    assert [future.result(LIMIT_S) for future in futures] == list(range(MANY))
