"""Signal handlers of the user's may run at any moment, wait for the pool, shut it down, or raise: nothing hangs.

CPython runs them on the main thread, after a call and at the start of a function.  A profiler is called just there:
so each test goes through all of these moments, one after another, and does there what a handler might do.
"""

from __future__ import annotations

import concurrent.futures
import sys
import threading
from collections.abc import Callable, Iterator
from time import monotonic
from types import FrameType
from typing import Any

import numpy
import pytest

from safepool import Retry, SafePoolExecutor, as_completed, wait
from tests.pool import tasks
from tests.support import LIMIT_S, SLACK_S

MakePool = Callable[..., SafePoolExecutor]
BIG = numpy.zeros(300_000)
MOST_MOMENTS = 2000
FINALIZERS = ("__del__", "_remove", "unraisable_hook")  # ours and those of ``weakref``; what pytest has called then


class Interrupted(BaseException):
    """What a handler raises."""


class Moment:
    """Calls ``act`` once, at the moment of that number."""

    def __init__(self, number: int, act: Callable[[], None], is_lost: Callable[[FrameType], bool]) -> None:
        self.number = number
        self._is_lost = is_lost
        self.seen = 0
        self.where = ""
        self._act = act

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in ("call", "c_return") or self._is_lost(frame):
            return
        self.seen += 1
        if self.seen == self.number:
            sys.setprofile(None)
            name = getattr(argument, "__name__", "")
            self.where = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}, {event} {name}"
            self._act()


def _nothing_is_lost(frame: FrameType) -> bool:
    return False


def _what_is_raised_is_lost(frame: FrameType | None) -> bool:
    """In a finalizer, CPython forgets it; in the start of a thread, that is locked for ever."""
    while frame is not None:
        if frame.f_code is threading.Thread.start.__code__ or frame.f_code.co_name in FINALIZERS:
            return True
        frame = frame.f_back
    return False


def moments(
    do: Callable[[], object],
    act: Callable[[], None],
    step: int = 1,
    is_lost: Callable[[FrameType], bool] = _nothing_is_lost,
) -> Iterator[str]:
    """Does it again and again, and each time ``act`` at a later moment of it; where that was."""
    for number in range(1, MOST_MOMENTS, step):
        moment = Moment(number, act, is_lost)
        before = sys.getprofile()
        try:
            sys.setprofile(moment)
            do()
        except (Interrupted, RuntimeError):  # or the pool is shut down
            pass
        finally:
            sys.setprofile(before)
        if not moment.where:
            assert number > 3, "there were no moments"
            return
        yield moment.where
    raise AssertionError("there are too many moments")


def some(executor: SafePoolExecutor) -> list[Any]:
    return [executor.submit(tasks.nap, 0.002, n) for n in range(4)]


#: What the main thread does meanwhile.
WAYS: dict[str, Callable[[SafePoolExecutor], object]] = {
    "submit": lambda executor: executor.submit(tasks.echo, 1),
    "result": lambda executor: executor.submit(tasks.nap, 0.002, 1).result(LIMIT_S),
    "running": lambda executor: executor.submit(tasks.nap, 0.002, 1).running(),
    "callback": lambda executor: executor.submit(tasks.nap, 0.002, 1).add_done_callback(id),
    "cancel": lambda executor: [future.cancel() for future in some(executor)],
    "kill": lambda executor: executor.submit(tasks.nap, 0.01, 1).kill(),
    "as_completed": lambda executor: list(as_completed(some(executor), LIMIT_S)),
    "wait": lambda executor: wait(some(executor), LIMIT_S),
    "the stdlib's as_completed": lambda executor: list(concurrent.futures.as_completed(some(executor), LIMIT_S)),
    "the stdlib's wait": lambda executor: concurrent.futures.wait(some(executor), LIMIT_S),
    "map": lambda executor: list(executor.map(tasks.echo, range(10))),
    "big": lambda executor: executor.submit(tasks.echo, BIG).result(LIMIT_S),
    "retry": lambda executor: executor.options(retry=Retry(attempts=2)).submit(tasks.echo, 3).result(LIMIT_S),
}
way = pytest.mark.parametrize("way", WAYS)


@way
def test_a_handler_waits_for_the_pool(pool: MakePool, way: str) -> None:
    """It gets its result at once, wherever it came; and so does whoever was interrupted."""
    executor = pool(2)
    assert executor.submit(tasks.echo, 0).result(LIMIT_S) == 0

    def act() -> None:
        assert executor.submit(tasks.echo, 5).result(LIMIT_S) == 5

    began = monotonic()
    for where in moments(lambda: WAYS[way](executor), act):
        assert monotonic() - began < LIMIT_S / 2, where
        began = monotonic()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it may be in a finalizer
@pytest.mark.parametrize("way", sorted(WAYS.keys() - {"big"}))
def test_a_handler_raises(pool: MakePool, way: str) -> None:
    """The pool goes on as if nothing had happened, and ends as ever.

    (But what is raised right after a descriptor was opened, as for something big, leaves that open, as in any program.)
    """
    executor = pool(2)
    assert executor.submit(tasks.echo, 0).result(LIMIT_S) == 0

    def act() -> None:
        raise Interrupted

    for where in moments(lambda: WAYS[way](executor), act, 2, _what_is_raised_is_lost):
        began = monotonic()
        futures = [executor.submit(tasks.echo, n) for n in range(3)]
        assert [future.result(LIMIT_S) for future in futures] == [0, 1, 2], where
        assert len(list(as_completed(futures, LIMIT_S))) == 3, where
        assert monotonic() - began < LIMIT_S / 2, where
    executor.shutdown()


@pytest.mark.parametrize("way", ["result", "cancel", "as_completed", "the stdlib's as_completed", "the stdlib's wait"])
def test_a_handler_shuts_the_pool_down(pool: MakePool, way: str) -> None:
    """As that of SIGTERM does; it need not wait for whoever it has interrupted, and that one has its results."""
    executors = [pool(1)]

    def act() -> None:
        began = monotonic()
        executors[0].shutdown()
        assert monotonic() - began < 5 + SLACK_S  # (a job that blocks is waited for for ten seconds)

    for _ in moments(lambda: WAYS[way](executors[0]), act, 5):
        executors[0].shutdown()
        executors[0] = pool(1)
        assert executors[0].submit(tasks.echo, 0).result(LIMIT_S) == 0


def test_a_handler_submits_first(pool: MakePool) -> None:
    """Within the very first submit: there is one watchdog, and both get their results."""
    executors = [pool(1)]

    def act() -> None:
        assert executors[0].submit(tasks.echo, 5).result(LIMIT_S) == 5

    for where in moments(lambda: executors[0].submit(tasks.echo, 1).result(LIMIT_S), act, 3):
        assert executors[0].submit(tasks.echo, 2).result(LIMIT_S) == 2, where
        executors[0].shutdown()
        executors[0] = pool(1)


def test_a_handler_shuts_down_within_the_first_submit(pool: MakePool) -> None:
    """It returns, and whoever submitted is answered, or refused."""
    executors = [pool(1)]

    def act() -> None:
        began = monotonic()
        executors[0].shutdown()
        assert monotonic() - began < 5 + SLACK_S

    for _ in moments(lambda: executors[0].submit(tasks.echo, 1).result(LIMIT_S), act, 3):
        executors[0].shutdown()
        executors[0] = pool(1)
