"""Whatever can be sent is sent, without a main guard; what cannot spoils one future and tells why."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import process
from pathlib import Path
from typing import Any

import pytest

from safepool import ResultUnreadable, SafePoolExecutor, TaskUnreadable, WorkerDied
from tests.conftest import CONTEXTS
from tests.pool import tasks
from tests.pool.test_deaths import error_of, is_usable
from tests.support import LIMIT_S, run_script

MakePool = Callable[..., SafePoolExecutor]

BIG_BYTES = 40_000_000
DEEP = 200_000


def told(error: BaseException) -> str:
    """The text that came with an exception from the worker."""
    assert type(error.__cause__) is process._RemoteTraceback  # type: ignore[attr-defined]
    return str(error.__cause__)


# ----------------------------------------------------------- what can be sent


def test_functions_without_a_name_travel(pool: MakePool, context: Any) -> None:
    """Lambdas, closures, functions of functions, partials and bound methods are run."""
    executor, offset = pool(1, context), 10

    def inner(x: int) -> int:
        return x + offset

    assert executor.submit(lambda x: x + 1, 1).result(LIMIT_S) == 2
    assert executor.submit(lambda x: x + offset, 1).result(LIMIT_S) == 11
    assert executor.submit(inner, 2).result(LIMIT_S) == 12
    assert executor.submit(functools.partial(inner, x=3)).result(LIMIT_S) == 13
    assert executor.submit([3, 1, 2].index, 2).result(LIMIT_S) == 2
    assert executor.submit(tasks.echo, inner).result(LIMIT_S)(5) == 15
    assert list(executor.map(lambda x: x * offset, range(5), chunksize=2, timeout=LIMIT_S)) == [0, 10, 20, 30, 40]


def test_a_closure_is_sent_as_it_is_now(pool: MakePool) -> None:
    """A variable of a closure that changes between two calls has its new value in the second."""
    executor, offset = pool(1), 1

    def inner() -> int:
        return offset

    assert executor.submit(inner).result(LIMIT_S) == 1
    offset = 2
    assert executor.submit(inner).result(LIMIT_S) == 2


SCALE = 1


def test_a_global_of_a_lambda_is_sent_as_it_is_now(pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lambda of a module sees the globals that the module has when it is submitted."""
    executor = pool(1)
    scaled = lambda: SCALE  # noqa: E731  (it must be one and the same object)
    assert executor.submit(scaled).result(LIMIT_S) == 1
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 2)
    assert executor.submit(scaled).result(LIMIT_S) == 2


def test_a_class_of_a_function_travels_and_stays_itself(pool: MakePool, context: Any) -> None:
    """An instance of a class that exists only here comes back as one of that very class."""

    class Point:
        def __init__(self, x: int) -> None:
            self.x = x

        def double(self) -> Point:
            return Point(2 * self.x)

    executor = pool(1, context)
    assert isinstance(executor.submit(tasks.echo, Point(1)).result(LIMIT_S), Point)
    doubled = executor.submit(Point.double, Point(2)).result(LIMIT_S)
    assert isinstance(doubled, Point)
    assert doubled.x == 4
    assert executor.submit(Point(3).double).result(LIMIT_S).x == 6


def test_big_data_travels_both_ways(pool: MakePool, context: Any) -> None:
    """Forty megabytes arrive whole in the worker, and from it."""
    executor = pool(1, context)
    data = os.urandom(BIG_BYTES)
    assert executor.submit(tasks.digest, data).result(LIMIT_S) == tasks.digest(data)
    assert executor.submit(tasks.big, BIG_BYTES).result(LIMIT_S) == tasks.big(BIG_BYTES)
    assert executor.submit(tasks.echo, data).result(LIMIT_S) == data


def test_small_answers_pass_big_ones(pool: MakePool) -> None:
    """While one worker sends forty megabytes, and more are queued, the other one's tasks go on."""
    executor = pool(2)
    large = [executor.submit(tasks.big, BIG_BYTES) for _ in range(3)]
    assert [executor.submit(tasks.echo, n).result(LIMIT_S) for n in range(50)] == list(range(50))
    assert [len(future.result(LIMIT_S)) for future in large] == [BIG_BYTES] * 3


def test_an_argument_may_be_changed_after_submit(pool: MakePool) -> None:
    """What the task sees is the argument at the moment of ``submit``."""
    executor = pool(1)
    blocker = executor.submit(tasks.nap, 0.2)
    value = [1, 2]
    future = executor.submit(tasks.echo, value)
    value.append(3)
    assert future.result(LIMIT_S) == [1, 2]
    assert blocker.result(LIMIT_S) is None


@pytest.mark.parametrize("name", CONTEXTS)
def test_locks_and_queues_travel_to_the_initializer(pool: MakePool, name: str) -> None:
    """multiprocessing's lock and queue, given in ``initargs``, work in every worker."""
    import multiprocessing

    of = multiprocessing.get_context("forkserver" if name == "default" else name)
    lock, queue = of.Lock(), of.Queue()
    executor = pool(2, None if name == "default" else of, tasks.share, (lock, queue))
    with lock:
        futures = [executor.submit(tasks.use_shared, word) for word in "abc"]
    assert [future.result(LIMIT_S) for future in futures] == [None] * 3
    assert sorted(queue.get(timeout=LIMIT_S) for _ in "abc") == ["a", "b", "c"]
    executor.shutdown()
    queue.close()
    queue.join_thread()


# ------------------------------------------------------------------ __main__

MAIN = """
import collections, dataclasses, enum, functools, multiprocessing, sys
import sibling
from safepool import SafePoolExecutor

print("once", flush=True)
context = None if sys.argv[-1] == "default" else multiprocessing.get_context(sys.argv[-1])
T = 60


@dataclasses.dataclass
class Point:
    x: int

    def double(self):
        return Point(2 * self.x)


class Color(enum.Enum):
    RED = 1


Pair = collections.namedtuple("Pair", "one two")


class Odd(Exception):
    def __init__(self, one, two):
        super().__init__(one, two)


model = None
calls = 0
scale = 10


def init(value):
    global model
    model = value


def task(x):
    return model * x


def count():
    global calls
    calls += 1
    return calls


def helper(x):
    return sibling.triple(x)


def scaled(x):
    return helper(x) * scale


def move(point, color, pair):
    assert isinstance(point, Point) and color is Color.RED and isinstance(pair, Pair)
    return [point.double(), color, pair]


def fail():
    raise Odd("one", "two")


def recurse(n):
    return n and n + recurse(n - 1)


executor = SafePoolExecutor(1, context, init, (7,))
assert executor.submit(task, 6).result(T) == 42, "the initializer's global"
assert [executor.submit(count).result(T) for _ in range(3)] == [1, 2, 3], "a global that a task assigns stays"
assert [executor.submit(functools.partial(count)).result(T) for _ in range(2)] == [4, 5], "within something else too"
assert calls == 0
assert executor.submit(scaled, 1).result(T) == 30
assert executor.submit(functools.partial(scaled, 1)).result(T) == 30
scale = 100
assert executor.submit(functools.partial(scaled, 1)).result(T) == 300, "a global that is rebound, within something"
assert executor.submit(scaled, 1).result(T) == 300, "a global that is rebound here is rebound there"
assert executor.submit(task, 6).result(T) == 42, "the initializer's global, still"
point, color, pair = executor.submit(move, Point(2), Color.RED, Pair(1, 2)).result(T)
assert type(point) is Point and point == Point(4) and color is Color.RED and type(pair) is Pair
assert executor.submit(Point(5).double).result(T) == Point(10)
error = executor.submit(fail).exception(T)
assert type(error) is Odd and error.args == ("one", "two"), repr(error)
assert "in fail" in str(error.__cause__)
assert executor.submit(recurse, 10).result(T) == 55
assert list(executor.map(lambda x: x + scale, range(3), timeout=T)) == [100, 101, 102]
executor.shutdown()
print("done", flush=True)
"""

SIBLING = """
def triple(x):
    return 3 * x
"""


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_script_needs_no_main_guard(tmp_path: Path, name: str) -> None:
    """Functions, classes, globals and initializers of a script work in the workers; the script runs once."""
    (tmp_path / "sibling.py").write_text(SIBLING)
    done = run_script(tmp_path / "script.py", MAIN, name)
    assert (done.stdout.split(), done.stderr, done.returncode) == (["once", "done"], "", 0)


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize("way", ["-c", "-m", "stdin"])
def test_a_program_without_a_file_works_too(tmp_path: Path, way: str, name: str) -> None:
    """The same holds for ``python -c``, for a module run with ``-m`` and for a program on stdin."""
    (tmp_path / "sibling.py").write_text(SIBLING)
    (tmp_path / "program.py").write_text(MAIN)
    words = {"-c": ["-c", MAIN, name], "-m": ["-m", "program", name], "stdin": ["-", name]}[way]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        input=MAIN if way == "stdin" else "",
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (done.stdout.split(), done.returncode) == (["once", "done"], 0), done.stderr
    assert done.stderr == ""


# ---------------------------------------------------------- what cannot be sent


def test_an_argument_that_cannot_be_pickled(pool: MakePool) -> None:
    """That future alone gets the error of pickling, with its text; its neighbours are answered."""
    executor = pool(1)
    before = executor.submit(tasks.echo, "before")
    error = error_of(executor.submit(tasks.echo, tasks.a_lock()))
    assert type(error) is TypeError
    assert "cannot pickle '_thread.lock' object" in str(error)
    assert "cannot pickle '_thread.lock' object" in told(error)
    assert before.result(LIMIT_S) == "before"
    assert is_usable(executor)


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), RecursionError("no"), OSError(5, "no")], ids=repr)
def test_whatever_pickling_raises_arrives_at_the_future(pool: MakePool, error: BaseException) -> None:
    """An object that raises while it is pickled, here or in the worker, spoils its own future only."""
    executor = pool(1)
    for future in (
        executor.submit(tasks.echo, tasks.Unsendable(error)),
        executor.submit(tasks.make, tasks.Unsendable, error),
    ):
        arrived = error_of(future)
        assert type(arrived) is type(error)
        assert arrived.args == error.args
        assert is_usable(executor)


def test_data_that_is_nested_too_deeply(pool: MakePool) -> None:
    """What is too deep for a pickle is an error of that task, on either way."""
    executor = pool(1)
    deep = tasks.nested_list(DEEP)
    for future in (executor.submit(tasks.echo, deep), executor.submit(tasks.nested_list, DEEP)):
        assert isinstance(error_of(future), RecursionError)
        assert is_usable(executor)


def test_a_result_that_cannot_be_pickled(pool: MakePool, context: Any) -> None:
    """The future gets the error of pickling; the worker goes on."""
    executor = pool(1, context)
    pid = executor.submit(os.getpid).result(LIMIT_S)
    error = error_of(executor.submit(tasks.a_lock))
    assert type(error) is TypeError
    assert "cannot pickle '_thread.lock' object" in str(error)
    assert "cannot pickle '_thread.lock' object" in told(error)
    assert executor.submit(os.getpid).result(LIMIT_S) == pid


def test_an_exception_that_cannot_be_pickled(pool: MakePool) -> None:
    """The future gets the error of pickling, and the text of the exception that was raised."""
    executor = pool(1)
    pid = executor.submit(os.getpid).result(LIMIT_S)
    error = error_of(executor.submit(tasks.make_and_raise, tasks.Holder, "the original words"))
    assert "cannot pickle '_thread.lock' object" in str(error)
    assert "the original words" in told(error)
    assert "raise cls(*args)" in told(error)
    assert executor.submit(os.getpid).result(LIMIT_S) == pid


@pytest.mark.parametrize(
    ("call", "words"),
    [((tasks.TwoArguments, "this", "that"), "this and that"), ((tasks.Frozen, 37), "37")],
    ids=["two arguments", "frozen"],
)
def test_an_exception_that_cannot_be_rebuilt(pool: MakePool, call: tuple[Any, ...], words: str) -> None:
    """The future gets an error that says so, with the text of the exception that was raised; the worker goes on."""
    executor = pool(1)
    pid = executor.submit(os.getpid).result(LIMIT_S)
    future = executor.submit(tasks.make_and_raise, *call)
    error = error_of(future)
    assert type(error) is ResultUnreadable
    assert isinstance(error, process.BrokenProcessPool)
    assert str(future) in str(error)
    assert words in told(error)
    assert "raise cls(*args)" in told(error)
    assert error_of(future) is error
    assert executor.submit(os.getpid).result(LIMIT_S) == pid


def test_an_exception_that_takes_no_attributes(pool: MakePool) -> None:
    """One that refuses every attribute arrives as itself, under a retry policy too, and costs no worker."""
    executor = pool(1)
    pid = executor.submit(os.getpid).result(LIMIT_S)
    for view in (executor, executor.options(retry=1)):
        error = error_of(view.submit(tasks.make_and_raise, tasks.Closed, "closed"))
        assert type(error) is tasks.Closed
        assert error.args == ("closed",)
        assert "raise cls(*args)" in told(error)
    assert executor.submit(os.getpid).result(LIMIT_S) == pid


@pytest.mark.parametrize("error", [ValueError("bad data"), SystemExit(2)], ids=repr)
def test_a_result_that_cannot_be_read_here(pool: MakePool, error: BaseException) -> None:
    """Unpickling here fails whoever asks for that result, and nobody else."""
    executor = pool(1)
    future = executor.submit(tasks.make, tasks.Unreadable, tasks.raise_error, error)
    after = executor.submit(tasks.echo, "after")
    assert after.result(LIMIT_S) == "after"
    assert type(error_of(future)) is ResultUnreadable
    assert type(error).__name__ in str(error_of(future))
    assert is_usable(executor)


@pytest.mark.parametrize("error", [ValueError("bad data"), SystemExit(2), KeyboardInterrupt()], ids=repr)
def test_a_task_that_cannot_be_read_in_the_worker(pool: MakePool, error: BaseException) -> None:
    """Unpickling in the worker fails that task alone, with the text; the worker goes on."""
    executor = pool(1)
    pid = executor.submit(os.getpid).result(LIMIT_S)
    arrived = error_of(executor.submit(tasks.echo, tasks.Unreadable(tasks.raise_error, error)))
    assert type(arrived) is TaskUnreadable
    assert isinstance(arrived, process.BrokenProcessPool)
    assert type(error).__name__ in str(arrived)
    assert type(error).__name__ in told(arrived)
    assert executor.submit(os.getpid).result(LIMIT_S) == pid


def test_a_task_that_ends_its_worker_while_it_is_read(pool: MakePool) -> None:
    """A worker that dies while it unpickles costs that one task."""
    executor = pool(1)
    assert type(error_of(executor.submit(tasks.echo, tasks.Unreadable(os._exit, 3)))) is WorkerDied
    assert is_usable(executor)


def test_exceptions_come_as_they_are(pool: MakePool) -> None:
    """One that is false, one with notes and a group of them arrive as themselves, with the remote text."""
    executor = pool(1)
    noted = ValueError("noted")
    noted.add_note("a note")
    group = ExceptionGroup("several", [KeyError("a"), OSError(2, "b")])
    for error in (tasks.Falsy("falsy"), noted, group):
        arrived = error_of(executor.submit(tasks.raise_error, error))
        assert type(arrived) is type(error)
        assert repr(arrived) == repr(error)
        assert getattr(arrived, "__notes__", []) == getattr(error, "__notes__", [])
        assert "raise error" in told(arrived)
    with pytest.raises(tasks.Falsy):
        executor.submit(tasks.make_and_raise, tasks.Falsy).result(LIMIT_S)


def test_an_exception_may_be_a_result(pool: MakePool) -> None:
    """A task that returns an exception has not failed."""
    future = pool(1).submit(tasks.echo, ValueError("a value"))
    assert future.exception(LIMIT_S) is None
    assert isinstance(future.result(LIMIT_S), ValueError)


# ------------------------------------- fork: the worker has a __main__ of its own

FORKED = """
import enum, multiprocessing
from safepool import SafePoolExecutor

class Point:
    pass

class Color(enum.Enum):
    RED = 1

def look(point, color):
    return isinstance(point, Point), color is Color.RED

executor = SafePoolExecutor(1, multiprocessing.get_context("fork"))
executor.submit(pow, 2, 3).result(60)
print(executor.submit(look, Point(), Color.RED).result(60), flush=True)
"""


def test_classes_of_a_script_stay_themselves_in_workers_that_were_forked_before(tmp_path: Path) -> None:
    """A forked worker knows the classes of the script already, and takes instances for what they are."""
    done = run_script(tmp_path / "script.py", FORKED)
    assert (done.stdout, done.stderr) == ("(True, True)\n", "")


UNSENT = """
import multiprocessing, sys, threading
from safepool import SafePoolExecutor

lock = multiprocessing.Lock()
handle = open(sys.argv[0])

def touch():
    with lock:
        return handle.name == sys.argv[0]

def pass_by(n):
    return n if n else touch()

context = None if sys.argv[1] == "default" else multiprocessing.get_context(sys.argv[1])
with SafePoolExecutor(1, context) as executor:
    print(executor.submit(pass_by, 7).result(30))
    error = executor.submit(pass_by, 0).exception(30)
    print(error if error is None else str(error).partition("(")[0])
"""


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_global_that_cannot_be_sent_costs_only_who_uses_it(tmp_path: Path, name: str) -> None:
    """A function may name a lock or a file of the script: a forked worker has it, any other says what is missing."""
    done = run_script(tmp_path / "script.py", UNSENT, name)
    told = "None" if name == "fork" else "the global 'lock' of __main__ cannot be sent to a worker "
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"7\n{told}\n")


SLOTTED = """
import sys
from dataclasses import dataclass
from safepool import SafePoolExecutor
import multiprocessing

@dataclass(slots=True)
class Point:
    x: int
    __y: int = 2

class Name:
    __slots__ = "word"

def move(point, name):
    assert not hasattr(point, "__dict__")
    point.x += 1
    return point, name

def in_child(context):
    name = Name()
    name.word = "here"
    with SafePoolExecutor(1, context) as executor:
        point, name = executor.submit(move, Point(1), name).result(30)
    assert type(point) is Point and type(name) is Name
    print(point, name.word, flush=True)

if __name__ == "__main__":
    context = None if sys.argv[1] == "default" else multiprocessing.get_context(sys.argv[1])
    in_child(context)
    for outer in ("spawn", "forkserver"):
        child = multiprocessing.get_context(outer).Process(target=in_child, args=(context,))
        child.start()
        child.join(30)
        assert child.exitcode == 0
"""


@pytest.mark.parametrize("name", CONTEXTS)
def test_classes_with_slots_travel_also_from_a_child_of_the_script(tmp_path: Path, name: str) -> None:
    """Slots stay slots and come home as the same class; in a child of multiprocessing's the script has another name."""
    done = run_script(tmp_path / "script.py", SLOTTED, name)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["Point(x=2, _Point__y=2) here"] * 3


HELD = """
import multiprocessing, threading
from safepool import SafePoolExecutor

class Registry(type):
    known = {}
    def __new__(cls, name, bases, space):
        made = super().__new__(cls, name, bases, space)
        cls.known[space["key"]] = made
        return made

class Plugin(metaclass=Registry):
    key = "a"
    lock = threading.Lock()
    def run(self):
        with self.lock:
            return Registry.known["a"] is Plugin

big, number = b"x" * 50_000_000, 1

def use(plugin):
    return plugin.run(), len(big)

def look():
    return number

with SafePoolExecutor(1, multiprocessing.get_context("fork")) as executor:
    futures = [executor.submit(use, Plugin()) for _ in range(20)]
    waiting = list(executor._watchdog._pending.futures.values())
    sizes = [future._payload.size_bytes() for future in waiting if future._payload]
    assert max(sizes, default=0) < 1000, sizes
    print({future.result(30) for future in futures}, executor.submit(look).result(30))
    for number in (2, 1):
        print(executor.submit(look).result(30), executor.submit(lambda: number + 1).result(30))
"""


def test_a_forked_worker_is_told_only_the_names_of_what_it_has(tmp_path: Path) -> None:
    """Under "fork" whatever the script held then can be used, big or impossible to pickle; what is rebound travels."""
    done = run_script(tmp_path / "script.py", HELD)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "{(True, 50000000)} 1\n2 3\n1 2\n")
