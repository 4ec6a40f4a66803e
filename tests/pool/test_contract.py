"""The contract of ``concurrent.futures``: the same arguments, words, states and endings, and those of ours."""

from __future__ import annotations

import logging
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor, process, wait
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from safepool import PoolTerminated, Retry, SafePoolExecutor
from tests.conftest import CONTEXTS
from tests.pool import tasks
from tests.pool.test_deaths import error_of, is_usable, running
from tests.support import LIMIT_S, SLACK_S, is_gone, run_script, until

MakePool = Callable[..., SafePoolExecutor]

AT_ONCE_S = 0.2
EXIT_S = 10.0  # until a program with a stuck task is over, its start and that of its workers included


# ---------------------------------------------------------------- constructor

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_workers": 0}, ValueError, "max_workers must be greater than 0"),
    ({"max_workers": -1}, ValueError, "max_workers must be greater than 0"),
    ({"max_workers": True}, TypeError, "max_workers must be an integer; got True"),
    ({"max_workers": 2.0}, TypeError, "max_workers must be an integer; got 2.0"),
    ({"max_workers": "2"}, TypeError, "max_workers must be an integer; got '2'"),
    ({"initializer": 3}, TypeError, "initializer must be a callable"),
    ({"initargs": 3}, TypeError, "initargs"),
    ({"max_tasks_per_child": 0}, ValueError, "max_tasks_per_child must be >= 1"),
    ({"max_tasks_per_child": "x"}, TypeError, "max_tasks_per_child must be an integer"),
    ({"max_tasks_per_child": 1.5}, TypeError, "max_tasks_per_child must be an integer"),
    ({"max_tasks_per_child": True}, TypeError, "max_tasks_per_child must be an integer"),
    ({"mp_context": "spawn"}, TypeError, "mp_context"),
    ({"timeout": 0}, ValueError, "timeout must be greater than 0; got 0"),
    ({"timeout": -1.5}, ValueError, "timeout must be greater than 0; got -1.5"),
    ({"timeout": "5"}, TypeError, "timeout must be a number of seconds; got '5'"),
    ({"timeout": True}, TypeError, "timeout must be a number of seconds; got True"),
    ({"timeout": math.nan}, TypeError, "timeout must be a number of seconds; got nan"),
    ({"deadline": 0}, ValueError, "deadline must be greater than 0; got 0"),
    ({"deadline": []}, TypeError, "deadline must be a number of seconds; got []"),
    ({"retry": -1}, ValueError, "retry must be >= 0; got -1"),
    ({"retry": True}, TypeError, "retry must be a number of further attempts, a Retry or a tenacity.Retrying;"),
    ({"retry": 1.5}, TypeError, "a Retry or a tenacity.Retrying; got 1.5"),
    ({"retry": "3"}, TypeError, "a Retry or a tenacity.Retrying; got '3'"),
    ({"on_worker_death": "ignore"}, ValueError, 'on_worker_death must be "heal" or "break"; got \'ignore\''),
    ({"name": 3}, TypeError, "name must be a str or None; got 3"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_argument_is_refused(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    """Every wrong argument raises at once, with the type and the words of the standard library where it has them."""
    with pytest.raises(error) as caught:
        SafePoolExecutor(**arguments)
    assert type(caught.value) is error
    assert words in str(caught.value)


def test_new_arguments_are_keywords() -> None:
    """The first four arguments are those of the standard library; what is new cannot be given by position."""
    with pytest.raises(TypeError, match="positional"):
        SafePoolExecutor(1, None, None, (), 3)  # type: ignore[misc]


RETRY_WRONG: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"attempts": 0}, ValueError),
    ({"attempts": 1.5}, TypeError),
    ({"on": "error"}, ValueError),
    ({"on": ("error", "boredom")}, ValueError),
    ({"errors": 3}, TypeError),
    ({"errors": ("ValueError",)}, TypeError),
    ({"deaths": 0}, ValueError),
    ({"wait": -1}, ValueError),
    ({"wait": "long"}, TypeError),
]


@pytest.mark.parametrize(("arguments", "error"), RETRY_WRONG, ids=str)
def test_a_wrong_retry_policy_is_refused(arguments: dict[str, Any], error: type[Exception]) -> None:
    """A retry policy is checked when it is made, and the error names the argument."""
    with pytest.raises(error, match=next(iter(arguments))):
        Retry(**arguments)


def test_the_constructor_starts_nothing(pool: MakePool) -> None:
    """Before the first task there is no process and no thread."""
    threads = threading.enumerate()
    executor = pool(4, timeout=1, retry=3)
    assert threading.enumerate() == threads
    assert dict(executor._processes) == {}
    assert executor._executor_manager_thread is None
    executor.shutdown()


def test_no_limit_can_be_written_as_infinity(pool: MakePool) -> None:
    """An infinite timeout and deadline mean that there is none."""
    assert pool(1, timeout=math.inf, deadline=math.inf).submit(tasks.nap, 0, 1).result(LIMIT_S) == 1


def test_it_is_the_executor_that_everybody_checks_for(pool: MakePool) -> None:
    """A pool is a ``ProcessPoolExecutor`` and an ``Executor``; its views are executors, its futures are futures."""
    executor = pool(1)
    assert isinstance(executor, ProcessPoolExecutor)
    assert isinstance(executor.options(timeout=1), Executor)
    assert isinstance(executor.submit(tasks.echo, 1), Future)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pool_cannot_be_pickled(pool: MakePool, protocol: int) -> None:
    """A pool, and a view of it, refuse to travel, and say what to do."""
    executor = pool(1)
    for thing in (executor, executor.options(timeout=1)):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(thing, protocol)


# -------------------------------------------------------------- options, submit


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"timeuot": 1}, TypeError, "unknown option 'timeuot'; a task may have: timeout, deadline, retry, name"),
        ({"timeout": 0}, ValueError, "timeout must be greater than 0"),
        ({"deadline": "1"}, TypeError, "deadline must be a number of seconds"),
        ({"retry": object}, TypeError, "retry must be"),
        ({"name": b"x"}, TypeError, "name must be a str"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused(pool: MakePool, options: dict[str, Any], error: type[Exception], words: str) -> None:
    """``options()`` checks at once, and an unknown option is answered with the known ones."""
    with pytest.raises(error) as caught:
        pool(1).options(**options)
    assert words in str(caught.value)


def test_options_add_up(pool: MakePool) -> None:
    """A view of a view keeps what it does not change, and the pool itself stays as it was."""
    executor = pool(1, timeout=LIMIT_S)
    view = executor.options(name="one").options(timeout=0.3)
    stuck = view.submit(tasks.nap, tasks.LIMIT_S)
    assert stuck.name == "one"
    assert isinstance(error_of(stuck), TimeoutError)
    assert executor.submit(tasks.echo, 1).name == "echo"
    assert list(view.map(tasks.echo, [1, 2], timeout=LIMIT_S)) == [1, 2]
    with executor.options(name="two") as same:
        assert same.submit(tasks.echo, 2).result(LIMIT_S) == 2
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(tasks.echo, 3)


def test_every_keyword_belongs_to_the_function(pool: MakePool) -> None:
    """``submit`` takes nothing out of the keywords, whatever their names are."""
    names = {"self": 1, "fn": 2, "timeout": 3, "retry": 4, "args": 5, "chunk": 6, "options": 7}
    assert pool(1).submit(tasks.keywords, **names).result(LIMIT_S) == names


def test_submit_wants_something_to_call(pool: MakePool) -> None:
    """A function by keyword, none at all, or one that cannot be called is a ``TypeError`` at once."""
    executor = pool(1)
    with pytest.raises(TypeError):
        executor.submit(fn=tasks.echo)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        executor.submit()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="callable"):
        executor.submit(3)  # type: ignore[arg-type]


def test_many_threads_submit_at_once(pool: MakePool) -> None:
    """Eight threads that submit two hundred tasks each get all their own answers."""
    executor, answers = pool(2), {}

    def submit(thread: int) -> None:
        futures = [executor.submit(tasks.echo, (thread, n)) for n in range(200)]
        answers[thread] = [future.result(LIMIT_S) for future in futures]

    threads = [threading.Thread(target=submit, args=(n,), daemon=True) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert answers == {n: [(n, m) for m in range(200)] for n in range(8)}


def test_a_pool_inside_a_task(pool: MakePool, context: Any) -> None:
    """A task may have a pool of its own, of any kind."""
    executor = pool(1, context)
    for method in (None, "spawn"):
        assert executor.submit(tasks.pool_in_a_pool, method, [1, 2, 3]).result(LIMIT_S) == [1, 4, 9]


# ------------------------------------------------------------------------ map


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"chunksize": 0}, ValueError, "chunksize must be >= 1."),
        ({"chunksize": -1}, ValueError, "chunksize must be >= 1."),
        ({"chunksize": 1.5}, TypeError, "chunksize must be an integer"),
        ({"buffersize": 0}, ValueError, "buffersize must be None or > 0"),
        ({"buffersize": "1"}, TypeError, "buffersize must be an integer or None"),
        ({"timeuot": 1}, TypeError, "timeuot"),
    ],
    ids=str,
)
def test_a_wrong_argument_of_map_is_refused(
    pool: MakePool, arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    """``map`` refuses wrong arguments at the call, and submits nothing."""
    executor = pool(1)
    with pytest.raises(error) as caught:
        executor.map(tasks.echo, [1], **arguments)
    assert words in str(caught.value)
    assert executor._executor_manager_thread is None


@pytest.mark.parametrize("chunksize", [1, 3, 100])
@pytest.mark.parametrize("buffersize", [None, 1, 2])
def test_map_keeps_the_order(pool: MakePool, chunksize: int, buffersize: int | None) -> None:
    """Results come in the order of the items, of the shortest iterable, however they are cut."""
    sums = pool(2).map(
        tasks.add, range(20), range(100, 130), timeout=LIMIT_S, chunksize=chunksize, buffersize=buffersize
    )
    assert list(sums) == [100 + 2 * n for n in range(20)]


def test_map_of_nothing(pool: MakePool) -> None:
    """No item, no result."""
    assert list(pool(1).map(tasks.echo, [], timeout=LIMIT_S)) == []


def test_map_begins_at_the_call(pool: MakePool, tmp_path: Path) -> None:
    """Nobody has to ask for the first result before the work begins."""
    log = tmp_path / "log"
    results = pool(1).map(tasks.note, [log] * 3, "abc")
    until(lambda: tasks.noted(log) == ["a", "b", "c"], "all three tasks ran")
    assert list(results) == ["a", "b", "c"]


class Endless:
    """1, 2, 3 ... and how many were taken."""

    taken = 0

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        self.taken += 1
        return self.taken


@pytest.mark.parametrize("chunksize", [1, 4])
def test_map_is_lazy_with_a_buffersize(pool: MakePool, chunksize: int) -> None:
    """From an endless iterable ``map`` takes no more than ``buffersize`` tasks' items in advance."""
    endless = Endless()
    results = pool(2).map(tasks.echo, endless, timeout=LIMIT_S, chunksize=chunksize, buffersize=3)
    assert endless.taken == 3 * chunksize
    for n in range(1, 101):
        assert next(results) == n
        assert endless.taken <= n + (3 + 1) * chunksize
    results.close()  # type: ignore[attr-defined]


def test_map_times_out(pool: MakePool) -> None:
    """``timeout`` counts from the call; the iterator raises ``TimeoutError`` and is over."""
    began = monotonic()
    results = pool(1).map(tasks.nap, [0, tasks.LIMIT_S], timeout=0.3 + SLACK_S)
    assert next(results) is None
    with pytest.raises(TimeoutError) as caught:
        next(results)
    assert 0.3 + SLACK_S <= monotonic() - began < 0.3 + 2 * SLACK_S + AT_ONCE_S
    assert "after -" not in str(caught.value)
    assert list(results) == []


@pytest.mark.parametrize("chunksize", [1, 2])
def test_the_first_error_ends_a_map(pool: MakePool, chunksize: int) -> None:
    """The error of an item comes in its place, and nothing after it."""
    executor = pool(1)
    results = executor.map(tasks.fail_at, range(6), [2] * 6, chunksize=chunksize, timeout=LIMIT_S)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="item 2"):
        next(results)
    assert list(results) == []
    assert is_usable(executor)


def test_leaving_a_map_cancels_what_has_not_begun(pool: MakePool, tmp_path: Path) -> None:
    """An iterator that is given up after its first result cancels the items that wait."""
    first, others, log = tmp_path / "first", tmp_path / "others", tmp_path / "log"
    executor = pool(1)
    first.touch()
    results = executor.map(tasks.note_and_wait, [log] * 5, range(5), [first] + [others] * 4, timeout=LIMIT_S)
    assert next(results) == 0
    until(lambda: tasks.noted(log) == ["0", "1"], "the second item runs")
    results.close()  # type: ignore[attr-defined]
    others.touch()
    assert is_usable(executor)
    assert tasks.noted(log) == ["0", "1"]


# ------------------------------------------------------------------- shutdown


def test_shutdown_waits_for_everything(pool: MakePool, context: Any) -> None:
    """``shutdown()`` returns when all work is done, every worker gone and every callback has run."""
    executor, called = pool(2, context), []
    futures = [executor.submit(tasks.nap, 0.02, n) for n in range(10)]
    for future in futures:
        future.add_done_callback(lambda future: called.append(future.result(0)))
    running(futures[0])
    pids = list(executor._processes)
    executor.shutdown()
    assert all(future.done() for future in futures)
    assert sorted(called) == list(range(10))
    assert all(is_gone(pid) for pid in pids)
    executor.shutdown()
    executor.shutdown(wait=False, cancel_futures=True)


def test_after_shutdown_nothing_is_accepted(pool: MakePool) -> None:
    """``submit`` and ``map`` say so in the words of the standard library, whether or not the pool ever worked."""
    used, unused = pool(1), pool(1)
    used.submit(tasks.echo, 1).result(LIMIT_S)
    for executor in (used, unused):
        executor.shutdown()
        for act in (lambda e=executor: e.submit(tasks.echo, 1), lambda e=executor: e.map(tasks.echo, [1])):
            with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
                act()


def test_shutdown_without_waiting_returns_at_once(pool: MakePool, tmp_path: Path) -> None:
    """``shutdown(wait=False)`` returns while tasks run and wait, and all of them are answered."""
    gate = tmp_path / "gate"
    executor = pool(1)
    futures = [executor.submit(tasks.wait_for, gate, n) for n in range(5)]
    running(futures[0])
    began = monotonic()
    executor.shutdown(wait=False)
    assert monotonic() - began < AT_ONCE_S + SLACK_S
    gate.touch()
    assert [future.result(LIMIT_S) for future in futures] == list(range(5))


def test_shutdown_without_waiting_when_workers_retire(pool: MakePool) -> None:
    """Tasks that need further workers after ``shutdown(wait=False)`` get them."""
    executor = pool(1, max_tasks_per_child=1)
    futures = [executor.submit(tasks.echo, n) for n in range(5)]
    executor.shutdown(wait=False)
    assert [future.result(LIMIT_S) for future in futures] == list(range(5))


def test_shutdown_can_cancel_what_waits(pool: MakePool, tmp_path: Path) -> None:
    """With ``cancel_futures`` the running task ends well and the waiting ones are cancelled at once."""
    gate = tmp_path / "gate"
    executor = pool(1)
    futures = [executor.submit(tasks.wait_for, gate, n) for n in range(5)]
    running(futures[0])
    executor.shutdown(wait=False, cancel_futures=True)
    assert len(wait(futures[1:], LIMIT_S).done) == 4
    assert all(future.cancelled() for future in futures[1:])
    assert not futures[0].done()
    gate.touch()
    assert futures[0].result(LIMIT_S) == 0


def test_a_second_shutdown_may_cancel(pool: MakePool, tmp_path: Path) -> None:
    """Whoever asked only to finish may ask later to cancel."""
    gate = tmp_path / "gate"
    executor = pool(1)
    futures = [executor.submit(tasks.wait_for, gate, n) for n in range(3)]
    running(futures[0])
    executor.shutdown(wait=False)
    executor.shutdown(wait=False, cancel_futures=True)
    assert len(wait(futures[1:], LIMIT_S).done) == 2
    gate.touch()
    executor.shutdown()
    assert [future.cancelled() for future in futures] == [False, True, True]


def test_threads_may_shut_down_at_once(pool: MakePool, tmp_path: Path) -> None:
    """Several threads that wait for the end of a pool all see it."""
    gate = tmp_path / "gate"
    executor = pool(1)
    future = executor.submit(tasks.wait_for, gate, 1)
    threads = [threading.Thread(target=executor.shutdown, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: executor._shutdown_thread, "the pool takes nothing more")
    gate.touch()
    for thread in threads:
        thread.join(LIMIT_S)
    assert not any(thread.is_alive() for thread in threads)
    assert future.result(0) == 1


def test_a_with_block_waits_and_lets_errors_through(pool: MakePool) -> None:
    """At the end of ``with`` all is done, also when the block raises."""
    executor = pool(2)
    futures = [executor.submit(tasks.nap, 0.1, n) for n in range(4)]
    with pytest.raises(KeyError), executor:
        raise KeyError
    assert [future.result(0) for future in futures] == list(range(4))


# ------------------------------------------------------- end of the workers


@pytest.mark.parametrize("verb", ["terminate_workers", "kill_workers"])
def test_ending_the_workers_is_quick_and_resolves_everything(pool: MakePool, tmp_path: Path, verb: str) -> None:
    """Even with a task that ignores SIGTERM it returns within a second, and every future is done."""
    executor = pool(2)
    ready = [tmp_path / "one", tmp_path / "two"]
    deaf = [executor.submit(tasks.ignore_sigterm, path) for path in ready]
    waiting = [executor.submit(tasks.echo, n) for n in range(20)]
    until(lambda: all(path.exists() for path in ready), "both tasks ignore SIGTERM")
    pids = list(executor._processes)
    began = monotonic()
    getattr(executor, verb)()
    assert monotonic() - began < 1
    assert all(future.done() for future in deaf + waiting)
    assert [type(error_of(future)) for future in deaf] == [PoolTerminated, PoolTerminated]
    assert isinstance(error_of(deaf[0]), process.BrokenProcessPool)
    assert all(future.cancelled() for future in waiting)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(tasks.echo, 1)
    until(lambda: all(is_gone(pid) for pid in pids), "the workers are gone", 3 + 2 * SLACK_S)


@pytest.mark.parametrize("verb", ["terminate_workers", "kill_workers"])
def test_ending_the_workers_is_always_allowed(pool: MakePool, verb: str) -> None:
    """Before the first task, with idle workers, after the end and a second time it does no harm."""
    unused, idle = pool(1), pool(1)
    idle.submit(tasks.echo, 1).result(LIMIT_S)
    for executor in (unused, idle):
        getattr(executor, verb)()
        getattr(executor, verb)()
        executor.shutdown()
        getattr(executor, verb)()


def test_killing_while_workers_start(pool: MakePool, context: Any) -> None:
    """Workers that are only being started are ended too, and their tasks resolved."""
    executor = pool(2, context)
    futures = [executor.submit(tasks.echo, n) for n in range(5)]
    executor.kill_workers()
    assert all(future.done() for future in futures)
    executor.shutdown()


# ------------------------------------------------------------------ callbacks


def test_a_callback_that_raises_is_logged(pool: MakePool, caplog: pytest.LogCaptureFixture) -> None:
    """Its error goes to the log; the other callbacks and the pool go on."""
    executor, called = pool(1), []
    gate = threading.Event()

    def bad(future: Future[Any]) -> None:
        raise ValueError("a bad callback")

    future = executor.submit(tasks.nap, 0.1)
    future.add_done_callback(bad)
    future.add_done_callback(called.append)
    future.add_done_callback(lambda _: gate.set())
    with caplog.at_level(logging.ERROR, "concurrent.futures"):
        assert gate.wait(LIMIT_S)
    assert called == [future]
    assert "a bad callback" in caplog.text
    assert is_usable(executor)


def test_a_callback_that_blocks_stops_nobody(pool: MakePool) -> None:
    """While one callback waits, other tasks are run and their results arrive."""
    executor = pool(1)
    entered, leave = threading.Event(), threading.Event()

    def block(future: Future[Any]) -> None:
        entered.set()
        leave.wait(LIMIT_S)

    executor.submit(tasks.echo, 1).add_done_callback(block)
    try:
        assert entered.wait(LIMIT_S)
        assert is_usable(executor)
    finally:
        leave.set()


def test_a_callback_may_submit(pool: MakePool) -> None:
    """Each callback submits the next task; the chain comes to its end, deaths in between included."""
    executor, done = pool(2), threading.Event()
    results: list[int] = []

    def follow(future: Future[Any]) -> None:
        if future.exception(0) is None:
            results.append(future.result(0))
        step = len(results)
        if step == 50:
            done.set()
        elif step % 10 == 9 and future.exception(0) is None:
            executor.submit(tasks.send_self, signal.SIGKILL).add_done_callback(follow)
        else:
            executor.submit(tasks.echo, step).add_done_callback(follow)

    executor.submit(tasks.echo, 0).add_done_callback(follow)
    assert done.wait(LIMIT_S)
    assert results == list(range(50))


def test_a_callback_may_shut_down(pool: MakePool) -> None:
    """``shutdown()`` in a callback does not wait for itself."""
    executor, done = pool(1), threading.Event()

    def shut_down(future: Future[Any]) -> None:
        executor.shutdown()
        executor.kill_workers()
        done.set()

    executor.submit(tasks.echo, 1).add_done_callback(shut_down)
    assert done.wait(LIMIT_S)
    executor.shutdown()


def test_a_callback_added_too_late_is_called_at_once(pool: MakePool) -> None:
    """On a future that is done, a callback runs in the thread that adds it."""
    future, called = pool(1).submit(tasks.echo, 1), []
    future.result(LIMIT_S)
    future.add_done_callback(lambda _: called.append(threading.current_thread()))
    assert called == [threading.current_thread()]


# ------------------------------------------------- drop, exit, fork, import


def test_a_dropped_pool_finishes_and_leaves() -> None:
    """A pool that nobody holds any more finishes its work; then its processes and threads end."""
    executor = SafePoolExecutor(1)
    futures = [executor.submit(tasks.nap, 0.05, n) for n in range(5)]
    running(futures[0])
    thread, dropped, processes = executor._executor_manager_thread, weakref.ref(executor), executor._processes
    del executor
    assert dropped() is None
    assert [future.result(LIMIT_S) for future in futures] == list(range(5))
    assert thread is not None
    thread.join(LIMIT_S)
    assert not thread.is_alive()
    assert dict(processes) == {}


EXIT = """
import multiprocessing, os, sys, time
from safepool import SafePoolExecutor

def say(words):
    print(words + chr(10), end="", flush=True)  # one write, also where stdout is not buffered

def task(n):
    time.sleep(0.05)
    if n == 2 and "dies" in sys.argv:
        os._exit(9)
    say(f"task {n}")
    return n

def told(future):
    error = future.exception()
    say(f"callback {future.result() if error is None else error.exitcode}")

context = None if sys.argv[1] == "default" else multiprocessing.get_context(sys.argv[1])
turnover = {"max_tasks_per_child": 2} if "retires" in sys.argv else {}
executor = SafePoolExecutor(1 if "dies" in sys.argv else 2, context, **turnover)
for n in range(6):
    executor.submit(task, n).add_done_callback(told)
"""


@pytest.mark.parametrize("trouble", ["none", "dies", "retires"])
@pytest.mark.parametrize("name", CONTEXTS)
def test_the_exit_of_the_interpreter_finishes_the_work(tmp_path: Path, name: str, trouble: str) -> None:
    """A script that only submits has all its output, status 0 and nothing on stderr, even if workers must be replaced.

    From Python 3.12 on no thread can be started, and in 3.12 no process forked, once a script is at its end.
    """
    if (name, trouble) == ("fork", "retires"):
        pytest.skip("fork refuses workers that retire")
    if (name, trouble) == ("fork", "dies") and sys.version_info[:2] == (3, 12):
        pytest.skip("3.12 forks nobody now, and no other worker has the functions of the script")
    done = run_script(tmp_path / "script.py", EXIT, name, trouble)
    assert (done.returncode, done.stderr) == (0, "")
    spoken = [n for n in range(6) if (n, trouble) != (2, "dies")]
    told = [9 if (n, trouble) == (2, "dies") else n for n in range(6)]
    assert sorted(done.stdout.splitlines()) == sorted(
        [*(f"task {n}" for n in spoken), *(f"callback {n}" for n in told)]
    )


STUCK = """
import sys, time
from safepool import SafePoolExecutor

executor = SafePoolExecutor(1)
future = executor.submit(time.sleep, 600)
while not future.running():
    time.sleep(0.01)
print(future.worker_pid, flush=True)
{end}
"""


@pytest.mark.parametrize(
    ("end", "status", "words"),
    [
        ("raise ValueError('the user raised')", 1, "ValueError: the user raised"),
        ("executor.kill_workers(); sys.exit(3)", 3, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)", -signal.SIGINT, "KeyboardInterrupt"),
    ],
    ids=["raises", "kills", "interrupted"],
)
def test_a_stuck_task_does_not_hold_a_program_that_failed(tmp_path: Path, end: str, status: int, words: str) -> None:
    """After an exception, or Ctrl-C, the interpreter exits in bounded time and the worker is gone."""
    began = monotonic()
    done = run_script(tmp_path / "script.py", STUCK.format(end=end))
    assert monotonic() - began < EXIT_S
    assert done.returncode == status
    assert words in done.stderr
    assert done.stderr.count("Traceback") == bool(words)
    until(lambda: is_gone(int(done.stdout)), "the worker is gone")


GROUP = """
import time
from safepool import SafePoolExecutor

with SafePoolExecutor(2) as executor:
    futures = [executor.submit(time.sleep, 1) for _ in range(2)]
    while not all(future.running() for future in futures):
        time.sleep(0.01)
    print(*executor._processes, flush=True)
    for future in futures:
        future.result(60)
"""


def test_ctrl_c_for_the_whole_group_is_quiet(tmp_path: Path) -> None:
    """Ctrl-C reaches every process of the program; there is one traceback, that of the user's own code."""
    script = tmp_path / "script.py"
    script.write_text(GROUP)
    program = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert program.stdout is not None
    pids = list(map(int, program.stdout.readline().split()))
    os.killpg(program.pid, signal.SIGINT)
    _, told = program.communicate(timeout=LIMIT_S)
    assert program.returncode == -signal.SIGINT
    assert told.count("Traceback") == 1
    assert told.rstrip().endswith("KeyboardInterrupt")
    until(lambda: all(is_gone(pid) for pid in pids), "the workers are gone")


LATE = """
import atexit, threading
from safepool import SafePoolExecutor

executor = SafePoolExecutor(1)
assert executor.submit(pow, 2, 3).result(30) == 8

def late():
    try:
        executor.submit(pow, 2, 3)
    except RuntimeError as error:
        print(error, flush=True)

atexit.register(late)
"""


def test_no_task_is_accepted_when_the_interpreter_exits(tmp_path: Path) -> None:
    """Whoever submits too late is told so, and the program ends."""
    done = run_script(tmp_path / "script.py", LATE)
    assert (done.returncode, done.stderr) == (0, "")
    assert "cannot schedule new futures after" in done.stdout


FORK = """
import os, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of fork() in a program with threads, from 3.12 on
from safepool import SafePoolExecutor

executor = SafePoolExecutor(1)
future = executor.submit(pow, 2, 3)
assert future.result(30) == 8
pending = executor.submit(__import__("time").sleep, 0.5)
pid = os.fork()
if pid == 0:
    for act in (lambda: executor.submit(pow, 2, 3), lambda: pending.result(30)):
        try:
            act()
        except RuntimeError as error:
            print("child:", error, flush=True)
    executor.shutdown()
    executor.kill_workers()
    with SafePoolExecutor(1) as own:
        print("own:", own.submit(pow, 2, 5).result(30), flush=True)
    os._exit(0)  # multiprocessing's own exit would complain of the parent's children
print("status:", os.waitpid(pid, 0)[1], flush=True)
print("parent:", executor.submit(pow, 2, 4).result(30), flush=True)
"""


def test_a_forked_child_may_not_use_the_pool_of_its_parent(tmp_path: Path) -> None:
    """In a fork of the program the pool refuses to work, a pool of its own works, and the parent's is unharmed."""
    done = run_script(tmp_path / "script.py", FORK)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.partition(":")[0] for line in lines] == ["child", "child", "own", "status", "parent"]
    assert lines[2:] == ["own: 32", "status: 0", "parent: 16"]
    assert "fork" in lines[0]
    assert "fork" in lines[1]


HEAVY = ("concurrent.futures", "loky", "multiprocessing", "psutil", "tenacity", "cloudpickle", "logging", "asyncio")


def test_the_import_is_cheap() -> None:
    """``import safepool`` loads nothing heavy; the first name that is used does."""
    text = f"import sys, safepool; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_futures_that_were_cancelled_say_so(pool: MakePool, tmp_path: Path) -> None:
    """``result`` and ``exception`` of a cancelled future raise ``CancelledError``, its callbacks are called."""
    gate, called = tmp_path / "gate", []
    executor = pool(1)
    first = executor.submit(tasks.wait_for, gate)
    running(first)
    future = executor.submit(tasks.echo, 1)
    future.add_done_callback(called.append)
    assert future.cancel()
    assert called == [future]
    for ask in (future.result, future.exception):
        with pytest.raises(CancelledError):
            ask(LIMIT_S)
    gate.touch()
