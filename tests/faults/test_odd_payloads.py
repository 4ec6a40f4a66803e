"""Objects that misbehave, however and wherever they are looked at, spoil their own future only, and tell why."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import process
from pathlib import Path
from typing import Any

import pytest

from safepool import ResultUnreadable, Retry, SafePoolExecutor, TaskTimeout, TaskUnreadable, WorkerDied
from tests.faults import tasks
from tests.pool import tasks as plain
from tests.pool.test_deaths import error_of, is_usable, running
from tests.support import LIMIT_S, SLACK_S, until

MakePool = Callable[..., SafePoolExecutor]


class Odd(BaseException):
    """No ``Exception``."""


SHY: list[type[BaseException]] = [tasks.BadStr, tasks.BadExit, tasks.BadTraceback, tasks.BadNotes]
ALL = [*SHY, Odd, GeneratorExit]


def calmly(act: Callable[..., Any], *args: Any) -> Any:
    """What ``act`` returns; whatever it raises is an ordinary failure of this test."""
    try:
        return act(*args)
    except BaseException as error:
        kind = type(error).__name__
    raise AssertionError(f"{kind} escaped from {act!r}")


class Steady:
    """A pool of one worker that must stay the same one."""

    def __init__(self, executor: SafePoolExecutor) -> None:
        self.executor = executor
        self._pid = executor.submit(os.getpid).result(LIMIT_S)

    def check(self) -> None:
        assert self.executor.submit(os.getpid).result(LIMIT_S) == self._pid, "its worker died"


@pytest.fixture
def steady(pool: MakePool) -> Any:
    made = Steady(pool(1))
    yield made
    made.check()


# ------------------------------------------------------------------ exceptions


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_a_task_raises_it(steady: Steady, cls: type[BaseException]) -> None:
    """An exception that cannot be shown, or refuses what is usual, arrives as itself, with its remote traceback."""
    for view in (steady.executor, steady.executor.options(retry=Retry(attempts=2))):
        error = error_of(view.submit(tasks.throw, cls))
        assert type(error) is cls
        assert error.args == ("x",)
        assert type(error.__cause__) is process._RemoteTraceback  # type: ignore[attr-defined]
        assert "in throw" in str(error.__cause__)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_the_argument_raises_it_when_it_is_read(steady: Steady, cls: type[BaseException]) -> None:
    """The task fails as unreadable and names the class of the exception."""
    error = error_of(steady.executor.submit(plain.echo, tasks.Throws(cls)))
    assert type(error) is TaskUnreadable
    assert cls.__name__ in str(error)
    assert "in throw" in str(error.__cause__)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_the_result_raises_it_when_it_is_read(steady: Steady, cls: type[BaseException]) -> None:
    """Whoever asks gets the same error each time, which names the class; a retry policy is not upset by it either."""
    for view in (steady.executor, steady.executor.options(retry=Retry(attempts=2))):
        future = view.submit(tasks.return_throws, cls)
        error = calmly(error_of, future)
        assert type(error) is ResultUnreadable
        assert cls.__name__ in str(error)
        assert error_of(future) is error


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_the_argument_or_result_raises_it_when_it_is_pickled(steady: Steady, cls: type[BaseException]) -> None:
    """Here or in the worker: the future gets that very error, and submit raises nothing."""
    for future in (
        calmly(steady.executor.submit, plain.echo, plain.Unsendable(cls("x"))),
        steady.executor.submit(tasks.make, plain.Unsendable, cls("x")),
    ):
        error = error_of(future)
        assert type(error) is cls
        assert error.args == ("x",)


def test_an_exception_that_cannot_be_pickled_or_made_again(steady: Steady) -> None:
    """What comes instead says so and has the words of what was raised."""
    error = error_of(steady.executor.submit(tasks.throw, tasks.BadReduce, "words"))
    assert type(error) is SystemExit
    assert "BadReduce: words" in str(error.__cause__)
    error = error_of(steady.executor.submit(tasks.throw, tasks.BadInit, "again"))
    assert type(error) is KeyError  # raised by the task itself, which failed to make it
    error = error_of(steady.executor.submit(tasks.throw, tasks.NotMadeAgain, "words"))
    assert type(error) is ResultUnreadable
    assert "only words" in str(error)
    assert "NotMadeAgain: words" in str(error.__cause__)


def test_exceptions_with_too_much_to_say(steady: Steady) -> None:
    """Fifty megabytes of words, half a character, a long chain and a circle of causes arrive."""
    error = error_of(steady.executor.submit(tasks.long_words, 50_000_000))
    assert type(error) is ValueError
    assert len(error.args[0]) == 50_000_000
    assert len(str(error.__cause__)) < 5_000_000
    error = error_of(steady.executor.submit(tasks.odd_words))
    assert error.args == ("half a pair: \ud800",)
    assert "half a pair" in str(error.__cause__)
    assert error_of(steady.executor.submit(tasks.chain, 2000)).args == (1999,)
    assert error_of(steady.executor.submit(tasks.circle)).args == (1,)


def test_recursion_without_end(steady: Steady) -> None:
    """A task that calls itself for ever gets RecursionError; so does a result that refers to ever deeper ones."""
    assert type(error_of(steady.executor.submit(tasks.recurse, 0))) is RecursionError


# --------------------------------------------------------------------- objects


def test_objects_that_refuse_every_question(steady: Steady) -> None:
    """Neither true nor false, not comparable, without a length: they travel both ways, alone and in containers."""
    executor = steady.executor
    assert executor.submit(plain.echo, tasks.Grumpy(7)).result(LIMIT_S).number == 7
    assert executor.submit(tasks.make, tasks.Grumpy, 8).result(LIMIT_S).number == 8
    assert [one.number for one in executor.map(plain.echo, [tasks.Grumpy(n) for n in range(4)], chunksize=2)] == [
        0,
        1,
        2,
        3,
    ]
    assert executor.submit(plain.keywords, a=tasks.Grumpy(9)).result(LIMIT_S)["a"].number == 9


def test_a_class_that_can_be_neither_hashed_nor_compared(steady: Steady) -> None:
    """Its instances are sent, or refused, but never cost a worker."""
    for future in (
        steady.executor.submit(plain.echo, tasks.Hashless()),
        steady.executor.submit(tasks.make, tasks.Hashless),
    ):
        error = future.exception(LIMIT_S)
        assert error is None or (type(error) is RuntimeError and "hash" in str(error))


def test_a_callable_that_answers_no_question(steady: Steady) -> None:
    """A callable without a name, whose every missing attribute raises, is run or refused through its future."""
    future = calmly(steady.executor.submit, tasks.Nameless())
    error = future.exception(LIMIT_S)
    assert error is None or "no " in str(error)
    assert error is not None or future.result(0) == 5


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt], ids=lambda cls: cls.__name__)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_objects_that_raise_when_they_are_dropped(
    steady: Steady, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As argument, as result and in an exception: what their end raises reaches nobody."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    executor = steady.executor
    assert executor.submit(tasks.size_of, [tasks.Dying(error)]).result(LIMIT_S) == 1
    assert type(executor.submit(tasks.make, tasks.Dying, error).result(LIMIT_S)) is tasks.Dying
    assert type(error_of(executor.submit(tasks.throw, ValueError, tasks.Dying(error)))) is ValueError
    steady.check()


def test_buffers_and_other_special_things(steady: Steady) -> None:
    """Buffers travel, a memoryview as bytes; a generator, a future and a pool are refused, each by its own future."""
    executor = steady.executor
    assert executor.submit(plain.echo, bytearray(b"abc")).result(LIMIT_S) == bytearray(b"abc")
    assert executor.submit(plain.echo, memoryview(b"abc")).result(LIMIT_S) == b"abc"
    assert executor.submit(memoryview, b"abc").result(LIMIT_S) == b"abc"
    for call in (
        (tasks.generator,),
        (plain.echo, tasks.generator()),
        (plain.echo, executor.submit(plain.echo, 1)),
        (plain.echo, executor),
    ):
        error = error_of(executor.submit(*call))
        assert type(error).__name__ in ("TypeError", "PicklingError"), repr(error)
    assert is_usable(executor)


# ------------------------------------------------------------ those that take long


def test_an_exception_that_takes_for_ever_to_show(pool: MakePool) -> None:
    """Whoever shows it waits; the pool, which notes it as an attempt, works for all others meanwhile."""
    executor = pool(2)
    view = executor.options(retry=Retry(attempts=2))
    try:
        failing = view.submit(tasks.throw, tasks.SlowToShow, os.getpid())
        others = [executor.submit(plain.nap, 0.01, n) for n in range(50)]
        assert [future.result(LIMIT_S / 3) for future in others] == list(range(50))
        assert executor.submit(plain.echo, 1).result(LIMIT_S / 3) == 1
    finally:
        tasks.SlowToShow.gate.set()
    assert type(error_of(failing)) is tasks.SlowToShow


def test_an_argument_that_takes_for_ever_to_read(pool: MakePool, tmp_path: Path) -> None:
    """The limit of a task includes the reading of its arguments."""
    executor = pool(1, timeout=0.3 + SLACK_S)
    slow = executor.submit(plain.echo, tasks.SlowToRead(tmp_path / "ready"))
    behind = executor.submit(plain.echo, "behind")
    assert type(error_of(slow)) is TaskTimeout
    assert (tmp_path / "ready").exists()
    assert behind.result(LIMIT_S) == "behind"


def test_a_result_that_takes_for_ever_to_pickle(pool: MakePool) -> None:
    """The limit of a task includes the pickling of its result."""
    executor = pool(1, timeout=0.3 + SLACK_S)
    slow, behind = executor.submit(tasks.SlowToPickle), executor.submit(plain.echo, "behind")
    assert type(error_of(slow)) is TaskTimeout
    assert behind.result(LIMIT_S) == "behind"


def test_a_result_that_takes_long_to_read_here(pool: MakePool) -> None:
    """While one thread unpickles it, the pool works for all others, and kill_workers() does not wait."""
    executor = pool(1)
    entered, leave = threading.Event(), threading.Event()
    gates.append((entered, leave))
    try:
        future = executor.submit(tasks.make, plain.Unreadable, pass_gate)
        until(future.done, "its answer is here")
        reader = threading.Thread(target=future.result)
        reader.start()
        assert entered.wait(LIMIT_S)
        assert is_usable(executor)
        assert future.done()
        executor.kill_workers()
        executor.shutdown()
    finally:
        leave.set()
        gates.clear()
    reader.join(LIMIT_S)
    assert future.result(0) == "passed"


gates: list[tuple[threading.Event, threading.Event]] = []


def pass_gate() -> str:
    for entered, leave in gates:
        entered.set()
        leave.wait(LIMIT_S)
    return "passed"


def test_a_call_whose_pickling_submits(pool: MakePool) -> None:
    """Pickling an argument may use the very pool that it is for: no lock is held then."""
    executor = pool(1)
    inner: list[Any] = []

    class Submitting:
        def __reduce__(self) -> Any:
            inner.append(executor.submit(plain.echo, "inner"))
            assert inner[-1].result(LIMIT_S) == "inner"
            return str, ("outer",)

    assert executor.submit(plain.echo, Submitting()).result(LIMIT_S) == "outer"
    assert inner


def test_a_chunk_with_one_bad_item(pool: MakePool) -> None:
    """In a chunk the bad item spoils its chunk, and only that."""
    executor = pool(1)
    items = [1, 2, 3, tasks.EndsWhenRead("exit"), 5, 6]
    chunks = [executor.map(plain.echo, items[n : n + 3], chunksize=3) for n in (0, 3)]
    assert list(chunks[0]) == [1, 2, 3]
    with pytest.raises(WorkerDied):
        list(chunks[1])
    assert is_usable(executor)


# ------------------------------------------------------------------------- size


@pytest.mark.slow
def test_hundreds_of_megabytes(pool: MakePool) -> None:
    """300 MB there and back, while small tasks pass; and the worker that sends as much is killed: one task is lost."""
    executor = pool(2)
    data = os.urandom(1 << 20) * 300
    big = executor.submit(plain.echo, data)
    assert [executor.submit(plain.echo, n).result(LIMIT_S) for n in range(50)] == list(range(50))
    assert big.result(4 * LIMIT_S) == data
    del data, big
    sent = executor.submit(bytes, 300 << 20)
    running(sent)
    until(sent.done, "it is answered", 4 * LIMIT_S)
    assert len(sent.result(0)) == 300 << 20
    victim = executor.submit(tasks.end_in_bytes, "SIGKILL", 300 << 20)
    assert victim.exception(4 * LIMIT_S) is None or type(error_of(victim)) is WorkerDied
    until(lambda: is_usable(executor), "usable")
