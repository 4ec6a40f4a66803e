"""Pebble's pool on ours: the same words, the same outcomes, and none of the hangs."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

import safepool
from tests.pool import tasks
from tests.support import LIMIT_S, run_script, until

pebble = pytest.importorskip("pebble")
THEIRS = pebble.ProcessPool


@pytest.fixture
def make_pool() -> Iterator[Any]:
    with safepool.patch(summary=False):
        made: list[Any] = []

        def make(*args: Any, **kwargs: Any) -> Any:
            made.append(pebble.ProcessPool(*args, **kwargs))
            return made[-1]

        yield make
        for pool in made:
            pool.stop()
            pool.join(LIMIT_S)
    assert pebble.ProcessPool is THEIRS


def test_it_is_pebbles_and_ours(make_pool: Any) -> None:
    """Programs look at types: the pool, its futures and the errors are Pebble's and ours."""
    pool = make_pool(1)
    future = pool.schedule(os._exit, args=(3,))
    assert isinstance(pool, THEIRS)
    assert isinstance(future, pebble.ProcessFuture)
    assert isinstance(future, safepool.SafeFuture)
    error = future.exception(LIMIT_S)
    assert isinstance(error, pebble.ProcessExpired)
    assert isinstance(error, safepool.WorkerDied)
    assert (error.exitcode, error.pid) == (3, future.worker_pid)


def test_schedule_and_submit(make_pool: Any) -> None:
    """Arguments as a sequence and a mapping; or, with the timeout in between, one by one."""
    with make_pool(max_workers=2) as pool:
        assert pool.schedule(divmod, args=(7, 2)).result(LIMIT_S) == (3, 1)
        assert pool.schedule(int, args=["ff"], kwargs={"base": 16}).result(LIMIT_S) == 255
        assert pool.submit(int, None, "ff", base=16).result(LIMIT_S) == 255
        assert pool.active
    assert not pool.active
    with pytest.raises(RuntimeError, match="not active"):
        pool.schedule(abs, args=(1,))


def test_a_task_that_leaves_with_exit_code_0_is_over(make_pool: Any) -> None:
    """Under Pebble 5.2 its future is never done; here it fails as that of any other death."""
    pool = make_pool(2)
    futures = [pool.schedule(os._exit, args=(0,)), *(pool.schedule(abs, args=(-n,)) for n in range(5))]
    assert wait(futures, LIMIT_S).not_done == set()
    assert isinstance(futures[0].exception(), pebble.ProcessExpired)
    assert [future.result() for future in futures[1:]] == [0, 1, 2, 3, 4]


def test_a_timeout_counts_from_the_start_and_kills(make_pool: Any) -> None:
    """What waits is not charged; what runs too long is a ``TimeoutError``, and the next one runs."""
    pool = make_pool(1)
    late = pool.schedule(tasks.hold_the_gil, timeout=0.5)
    queued = pool.schedule(tasks.nap, args=(0.2, "done"), timeout=5)
    assert isinstance(late.exception(LIMIT_S), TimeoutError)
    assert queued.result(LIMIT_S) == "done"


def test_of_two_limits_the_shorter_counts() -> None:
    """That of the policy, and that of the program."""
    for policy, own in ((0.4, 600), (600, 0.4)):
        with safepool.patch(summary=False, timeout=policy):
            pool = pebble.ProcessPool(1)
            with pool:
                error = pool.schedule(tasks.nap, args=(tasks.LIMIT_S,), timeout=own).exception(LIMIT_S)
            assert isinstance(error, safepool.TaskTimeout)
            assert error.seconds == 0.4


def test_cancelling_kills_what_runs(make_pool: Any) -> None:
    """At once for whoever asks; and the seat is free for the next one."""
    pool = make_pool(1)
    called = []
    running, queued = (pool.schedule(tasks.nap, args=(tasks.LIMIT_S,)) for _ in range(2))
    running.add_done_callback(called.append)
    until(running.running, "the first task has begun")
    for future in (queued, running):
        assert future.cancel()
        assert future.cancelled()
        assert future.cancel()
        with pytest.raises(CancelledError):
            future.result()
    assert called == [running]
    done = pool.schedule(abs, args=(-1,))
    assert done.result(LIMIT_S) == 1
    assert not done.cancel()


def test_a_timeout_tells_its_limit_as_pebbles_does(make_pool: Any) -> None:
    """``error.args[1]``, as in Pebble's documentation; a budget that is used up is one of no time."""
    pool = make_pool(1)
    for limit in (0.3, -0.5):
        error = pool.schedule(tasks.nap, args=(tasks.LIMIT_S,), timeout=limit).exception(LIMIT_S)
        assert isinstance(error, TimeoutError)
        assert isinstance(error.args[0], str)
        assert error.args[1] == max(limit, 0.001)
        assert str(error) == error.args[0]


def test_its_errors_travel(make_pool: Any) -> None:
    """A task that hands on the error of a pool of its own."""
    for future in (make_pool(1).schedule(os._exit, args=(3,)), make_pool(1).schedule(tasks.nap, (9,), timeout=0.1)):
        error = future.exception(LIMIT_S)
        there = pickle.loads(pickle.dumps(error))
        assert (type(there), str(there), there.pid) == (type(error), str(error), error.pid)


def test_an_explicit_context_is_honoured(make_pool: Any) -> None:
    """Under "fork" workers have what the program had, wherever it was."""
    held.append("one")
    try:
        pool = make_pool(1, context=multiprocessing.get_context("fork"))
        assert pool.schedule(_what_is_held).result(LIMIT_S) == ["one"]
    finally:
        held.clear()


held: list[str] = []


def _what_is_held() -> list[str]:
    return held


def test_decorated_functions_of_a_script_run_on_a_pool(tmp_path: Path) -> None:
    """Pebble sends their names, to be looked up in the script."""
    text = """
import safepool
safepool.patch(summary=False)
import pebble
pool = pebble.ProcessPool(1)
@pebble.concurrent.process(pool=pool)
def double(n):
    return 2 * n
if __name__ == "__main__":
    print(double(4).result())
    pool.close(); pool.join()
"""
    done = run_script(tmp_path / "script.py", text)
    assert (done.returncode, done.stdout, done.stderr) == (0, "8\n", "")


@pytest.mark.parametrize("before", ["importlib.util.find_spec('pebble')", "sys.modules['pebble'] = None", "pass"])
def test_it_is_patched_when_it_is_loaded_whatever_was_asked_before(tmp_path: Path, before: str) -> None:
    """Somebody only asks whether it is there, or fails to import it at first."""
    text = f"""
import importlib.util, sys, safepool
with safepool.patch(summary=False):
    {before}
    try: import pebble
    except ImportError: del sys.modules["pebble"]
    import pebble
    print(pebble.ProcessPool.__mro__[1].__name__, pebble.pool.ProcessPool is pebble.ProcessPool)
print(pebble.ProcessPool.__mro__[1].__name__)
"""
    done = run_script(tmp_path / "script.py", text)
    assert (done.stdout, done.stderr) == ("_ProcessPool True\nBasePool\n", "")


def test_work_of_a_thread_that_outlives_the_main_one_is_done(tmp_path: Path) -> None:
    """Pebble ends its workers when all threads have ended, and calls back nobody then."""
    text = """
import safepool, threading, time
safepool.patch(summary=False)
import pebble
begun = threading.Event()
def use():
    with pebble.ProcessPool(1) as pool:
        pool.schedule(abs, args=(1,)).result(20)
        begun.set()  # (from Python 3.12 on no pool can be started after the end of the main thread)
        time.sleep(0.5)
        print([pool.schedule(abs, args=(-n,)).result(20) for n in range(3)], flush=True)
threading.Thread(target=use).start()
pool = pebble.ProcessPool(1)
pool.schedule(time.sleep, args=(600,)).add_done_callback(lambda future: print("called", future, flush=True))
begun.wait(20)
"""
    done = run_script(tmp_path / "script.py", text)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0, 1, 2]\n", "")


def test_errors_carry_the_traceback_as_text(make_pool: Any) -> None:
    """As Pebble's README shows it: ``error.traceback``."""
    error = make_pool(1).schedule(int, args=("no number",)).exception(LIMIT_S)
    assert isinstance(error, ValueError)
    assert "no number" in error.traceback
    assert "Traceback" in error.traceback


def _reciprocal(number: int) -> float:
    if number == 7:
        os._exit(0)
    return 1 / number


def test_map_gives_each_result_or_error_in_turn(make_pool: Any) -> None:
    """An error, or a death, costs its chunk only."""
    future = make_pool(2).map(_reciprocal, [1, 0, 2, 7, 4])
    results, found = future.result(LIMIT_S), []
    for _ in range(5):
        try:
            found.append(next(results))
        except (ZeroDivisionError, pebble.ProcessExpired) as error:
            found.append(type(error).__mro__[-3].__name__)
    with pytest.raises(StopIteration):
        next(results)
    assert [found[0], found[2], found[4]] == [1.0, 0.5, 0.25]
    assert isinstance(found[1], str)
    assert isinstance(found[3], str)
    assert list(make_pool(1).map(abs, [-1, -2, -3], chunksize=2).result(LIMIT_S)) == [1, 2, 3]
    assert list(make_pool(1).map(abs, []).result(LIMIT_S)) == []


def test_close_finishes_and_stop_does_not(make_pool: Any) -> None:
    """``join`` before either is an error; after ``close`` it may run out of time."""
    pool = make_pool(1)
    running = pool.schedule(tasks.nap, args=(0.6, "done"))
    with pytest.raises(RuntimeError, match="still running"):
        pool.join()
    pool.close()
    with pytest.raises(TimeoutError):
        pool.join(0.05)
    pool.join(LIMIT_S)
    assert running.result(0) == "done"
    pool = make_pool(1)
    running, queued = (pool.schedule(tasks.nap, args=(tasks.LIMIT_S,)) for _ in range(2))
    until(running.running, "the first task has begun")
    began = monotonic()
    pool.stop()
    assert running.cancelled()
    assert queued.cancelled()
    assert not pool.active
    pool.join(LIMIT_S)
    assert monotonic() - began < 5


def test_workers_are_replaced_after_max_tasks(make_pool: Any) -> None:
    """Also where the program asks for "fork", from which a pool with threads cannot take one worker after another."""
    for options in ({}, {"context": multiprocessing.get_context("fork")}):
        pool = make_pool(1, max_tasks=2, **options)
        assert len({pool.schedule(os.getpid).result(LIMIT_S) for _ in range(4)}) == 2


def test_a_program_that_forgets_its_pool_ends(tmp_path: Path) -> None:
    """Pebble does not finish what was scheduled when the program ends, and so do we not."""
    text = """
import safepool, pebble, time
safepool.patch()
pool = pebble.ProcessPool(1)
pool.schedule(time.sleep, args=(600,))
time.sleep(0.3)
print("bye")
"""
    began = monotonic()
    done = run_script(tmp_path / "script.py", text)
    assert (done.returncode, done.stdout) == (0, "bye\n")
    assert monotonic() - began < 15
    sleep(0)


def test_the_summary_has_the_words_of_the_error() -> None:
    """Of a task of Pebble's pool as of any other: the exit status of its worker, say."""
    with safepool.patch(summary=False) as patched:
        pool = pebble.ProcessPool(1)
        future = pool.schedule(os._exit, args=(3,))
        assert isinstance(future.exception(LIMIT_S), pebble.ProcessExpired)
        pool.close()
        pool.join(LIMIT_S)
        (failure,) = patched.summary()["failures"]
    assert failure["task"] == str(future)
    assert "exit code 3" in failure["why"]
