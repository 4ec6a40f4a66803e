"""Races and traps that were found in this pool, each as the scenario that once broke it."""

from __future__ import annotations

import concurrent.futures
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import psutil
import pytest

from safepool import PoolBroken, SafePoolExecutor, TaskTimeout, WorkerStartError, _payload, _seats, as_completed
from safepool._watchdog import Watchdog
from safepool.errors import Attempt, with_attempts
from tests.conftest import CONTEXTS
from tests.pool import tasks
from tests.support import LIMIT_S, run_script, until

Pool = Callable[..., SafePoolExecutor]


class Guarded(Exception):
    """Allows no attribute to be set."""

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)


def raise_guarded() -> None:
    raise Guarded("it says so")


def refuse_connection() -> None:
    raise ConnectionRefusedError("the database is not there")


def test_two_threads_wait_for_mixtures_in_opposite_order(pool: Pool) -> None:
    """The stdlib's wait() locks futures in the order of their ids: no two of ours may share a lock."""
    executor = pool(1)
    with ThreadPoolExecutor(1) as threads:
        for _ in range(50):
            mixed: list[Future[Any]] = [executor.submit(abs, 1), threads.submit(abs, 1), executor.submit(abs, 1)]
            locks = {id(f._condition._lock) for f in mixed}  # type: ignore[attr-defined]
            assert len(locks) == 3
            assert not concurrent.futures.wait(mixed, LIMIT_S).not_done


def test_limits_of_months_are_limits(pool: Pool) -> None:
    """A selector sleeps some weeks at most; a timeout may be longer."""
    view = pool(1).options(timeout=90 * 86400, deadline=1e12)
    assert view.submit(tasks.nap, 0.05, 7).result(LIMIT_S) == 7


def test_a_closed_process_object_is_no_trouble(pool: Pool) -> None:
    """A user who finds a worker in ``_processes`` may kill, join and close it."""
    executor = pool(2)
    assert executor.submit(abs, -1).result(LIMIT_S) == 1
    for process in executor._processes.values():
        process.kill()
        process.join(LIMIT_S)
        with suppress(ValueError):
            process.close()
    assert executor.submit(abs, -2).result(LIMIT_S) == 2


def test_processes_may_be_gone_through_while_workers_come_and_go(pool: Pool) -> None:
    """Iterating ``_processes`` sees a moment of it; it never fails because the pool heals."""
    executor = pool(2, max_tasks_per_child=1)
    futures = [executor.submit(abs, n) for n in range(30)]
    while not all(future.done() for future in futures):
        for pid, process in executor._processes.items():
            assert pid == process.pid
    assert [future.result(LIMIT_S) for future in futures] == list(range(30))


def test_an_initializer_may_fail_with_any_error(pool: Pool) -> None:
    """An error of a connection in the initializer is not taken for the end of ours."""
    error = pool(1, initializer=refuse_connection).submit(abs, 1).exception(LIMIT_S)
    assert isinstance(error, WorkerStartError)
    assert "the database is not there" in str(error)
    assert "refuse_connection" in str(error)


def test_a_task_sent_to_a_stopped_worker_is_done_by_another(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle worker is stopped and gets a task: it never begins, so no limit of the task would start."""
    monkeypatch.setattr(_seats, "ACK_LIMIT_S", 0.5)
    executor = pool(1)
    pid = executor.submit(os.getpid).result(LIMIT_S)
    os.kill(pid, signal.SIGSTOP)
    assert executor.submit(os.getpid).result(LIMIT_S) != pid


def test_a_stopped_fork_server_delays_starts_only(pool: Pool) -> None:
    """While no worker can be launched, running and waiting tasks keep their limits."""
    executor = pool(2)
    executor.submit(abs, 1).result(LIMIT_S)
    server = next(c for c in psutil.Process().children() if "safepool._launch" in " ".join(c.cmdline()))
    running = executor.options(timeout=0.5).submit(tasks.nap, LIMIT_S)
    until(running.running, "it runs")
    os.kill(server.pid, signal.SIGSTOP)
    try:
        waiting = [executor.options(deadline=0.7).submit(tasks.nap, LIMIT_S) for _ in range(3)]
        for future in [running, *waiting]:
            assert isinstance(future.exception(5.0), TaskTimeout)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert executor.submit(abs, -3).result(LIMIT_S) == 3


def test_callbacks_of_a_cancelled_task_run_once(pool: Pool, tmp_path: Path) -> None:
    """cancel() ends the future here, and the watchdog hears of it later: that is one end, not two."""
    executor = pool(1)
    executor.submit(tasks.wait_for, tmp_path / "gate")
    called: list[object] = []
    futures = [executor.submit(abs, n) for n in range(5)]
    for future in futures:
        future.add_done_callback(called.append)
        assert future.cancel()
    (tmp_path / "gate").touch()
    assert executor.submit(abs, -1).result(LIMIT_S) == 1
    executor.shutdown()
    assert called == futures


def test_one_callback_that_exits_leaves_the_others(pool: Pool) -> None:
    """SystemExit of a callback is logged; the next callback of the same future is called."""
    called = threading.Event()

    def leave(_: object) -> None:
        raise SystemExit(3)

    future = pool(1).submit(tasks.nap, 0.1)
    future.add_done_callback(leave)
    future.add_done_callback(lambda _: called.set())
    assert called.wait(LIMIT_S)


def test_no_future_comes_out_twice(pool: Pool) -> None:
    """A future that is both reported and found by looking is yielded once."""
    executor = pool(2)
    futures = [executor.submit(tasks.nap, 0.001) for _ in range(500)]
    found = list(as_completed(futures, timeout=LIMIT_S, stall_timeout=0.05 * LIMIT_S))
    assert len(found) == len(set(found)) == 500


def test_an_error_that_allows_no_attribute_travels(pool: Pool) -> None:
    """Neither the worker nor the future may fail because they cannot decorate an exception."""
    error = pool(1).submit(raise_guarded).exception(LIMIT_S)
    assert isinstance(error, Guarded)
    assert "raise_guarded" in str(error.__cause__)


def test_attempts_survive_pickling() -> None:
    """The final exception and the last of its attempts are one object, here and after a journey."""
    error = TaskTimeout("too slow", seconds=1.0, task="x")
    with_attempts(error, [Attempt(1, "timeout", 7, None), Attempt(2, "timeout", 8, error)])
    again = pickle.loads(pickle.dumps(error))
    assert [attempt.number for attempt in again.attempts] == [1, 2]
    assert again.attempts[-1].error is again
    assert (again.seconds, str(again)) == (1.0, "too slow")


def test_calls_of_one_function_share_its_pickle() -> None:
    """A queue of calls does not hold their function, and the globals it carries, once for each."""
    first, second = (_payload.dumps_call(tasks.echo, (n,), {}) for n in range(2))
    assert first.function is second.function


def test_a_fork_may_shut_down_its_copy_of_a_pool() -> None:
    """In a forked child another thread may have held the pool's lock: shutdown does not wait for it."""
    with SafePoolExecutor(1) as executor:
        executor.submit(abs, 1).result(LIMIT_S)
        held, release = threading.Event(), threading.Event()

        def hold() -> None:
            with executor._lock:
                held.set()
                release.wait(LIMIT_S)

        thread = threading.Thread(target=hold)
        thread.start()
        assert held.wait(LIMIT_S)
        pid = os.fork()
        if pid == 0:
            signal.alarm(10)
            executor.shutdown()
            os._exit(0)
        release.set()
        thread.join(LIMIT_S)
        assert os.waitpid(pid, 0)[1] == 0


def test_whoever_leaves_a_future_does_not_hide_it_from_others(pool: Pool) -> None:
    """Our ``as_completed`` and the stdlib's ``wait`` on the same futures, from several threads: each is told of all."""
    executor = pool(2)
    executor.submit(abs, 1).result(LIMIT_S)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(15):
            futures = [executor.submit(tasks.nap, 0.0002) for _ in range(100)]
            with ThreadPoolExecutor(4) as threads:
                ours = [threads.submit(lambda: len(list(as_completed(futures, timeout=LIMIT_S)))) for _ in range(3)]
                theirs = threads.submit(concurrent.futures.wait, futures, LIMIT_S)
                assert not theirs.result().not_done
                assert [future.result() for future in ours] == [100] * 3
    finally:
        sys.setswitchinterval(before)


def test_forks_that_meet_leave_no_lock_behind() -> None:
    """One thread's fork is held up in a hook, another thread forks: afterwards pools start as quickly as before."""
    script = Path(__file__).with_name("forks_that_meet.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "free\n")


@pytest.mark.parametrize("slow_s", [0.0, 0.05])
def test_no_thread_of_a_pool_is_left_when_shutdown_returns(slow_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever counts threads right after a pool finds none of its own, though a launch returns only just then."""
    launch = Watchdog._launch

    def slow(self: Watchdog, worker: int) -> None:
        launch(self, worker)
        sleep(slow_s)

    monkeypatch.setattr(Watchdog, "_launch", slow)
    for _ in range(20):
        with SafePoolExecutor(2) as executor:
            executor.submit(abs, -1).result(LIMIT_S)
            name = executor._watchdog.name
        assert not [thread for thread in threading.enumerate() if thread.name.startswith(f"{name}-")]


def test_an_orderly_end_lets_initializers_end(context: Any, tmp_path: Path) -> None:
    """A worker that is not needed any more, and still sets itself up, is not killed with what it holds."""
    log = tmp_path / "log"
    with SafePoolExecutor(2, context, tasks.note_twice, (log,)) as executor:
        list(executor.map(abs, range(4)))
    noted = tasks.noted(log)
    assert noted.count("begun") == noted.count("ended") > 0


def test_a_signal_that_interrupts_submit_does_not_put_the_pool_to_sleep(pool: Pool) -> None:
    """A handler raises while the watchdog is being woken; the user catches that and goes on with the pool."""
    executor = pool(1)
    assert executor.submit(abs, -1).result(LIMIT_S) == 1
    watchdog = executor._watchdog
    real, interrupted = watchdog._wake_w, threading.Event()

    class Interrupted:
        def send(self, data: bytes) -> int:
            if interrupted.is_set():
                return real.send(data)
            interrupted.set()
            raise KeyboardInterrupt

    until(lambda: not watchdog._awake, "the watchdog sleeps")
    watchdog._wake_w = Interrupted()  # type: ignore[assignment]
    try:
        with pytest.raises(KeyboardInterrupt):
            executor.submit(sum, [-2])  # (a plain call would go straight to the idle worker)
        assert executor.submit(abs, -3).result(LIMIT_S) == 3
    finally:
        watchdog._wake_w = real


def test_an_iterator_that_is_never_begun_leaves_the_futures(pool: Pool) -> None:
    """``as_completed`` that nobody goes through keeps no future alive, and no result."""
    executor = pool(1)
    gc.disable()
    try:
        future = executor.submit(abs, -1)
        assert as_completed([future])
        watched = weakref.ref(future)
        assert future.result(LIMIT_S) == 1
        del future
        until(lambda: watched() is None, "it is gone")
    finally:
        gc.enable()


SHARED = """
import multiprocessing, sys
from safepool import SafePoolExecutor

def take(*things):
    global value, array, pipe
    value, array, pipe = things

def use(n):
    with value.get_lock():
        value.value += n
    array[0] = 7
    pipe.send(n)
    return array[0]

if __name__ == "__main__":
    context = None if sys.argv[1] == "default" else multiprocessing.get_context(sys.argv[1])
    made = context or multiprocessing.get_context("spawn")
    reader, writer = made.Pipe(False)
    things = made.Value("i", 0), made.Array("i", 2), writer
    with SafePoolExecutor(1, context, take, things) as executor:
        assert list(executor.map(use, [1, 2])) == [7, 7]
    print(things[0].value, things[1][0], reader.recv() + reader.recv())
"""


@pytest.mark.parametrize("name", CONTEXTS)
def test_shared_memory_and_pipes_reach_an_initializer_of_the_script(tmp_path: Path, name: str) -> None:
    """What multiprocessing sends to a process it starts arrives as itself, also where functions travel by value."""
    done = run_script(tmp_path / "script.py", SHARED, name)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "3 7 3\n")


def test_a_fork_cannot_stop_a_task_of_its_parent(pool: Pool) -> None:
    """In a child that the program forks, ``cancel`` and ``kill`` say False and the answer is refused at once."""
    executor = pool(1)
    futures = [executor.submit(tasks.nap, 0.5, n) for n in range(2)]
    until(futures[0].running, "it runs")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        began = monotonic()
        words: list[object] = [futures[0].cancel(), futures[0].kill(), futures[1].kill()]
        try:
            futures[0].result(LIMIT_S)
        except PoolBroken:
            words.append(monotonic() - began < 0.5)
        os.write(writer, repr(words).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert pipe.read() == "[False, False, False, True]"
    os.waitpid(pid, 0)
    assert [future.result(LIMIT_S) for future in futures] == [0, 1]


def test_the_module_itself_is_a_context(tmp_path: Path) -> None:
    """``mp_context=multiprocessing`` is as safe as the context that it stands for: no main guard is needed."""
    text = """
import multiprocessing
from safepool import SafePoolExecutor

multiprocessing.set_start_method("spawn")
with SafePoolExecutor(1, multiprocessing) as executor:
    print(executor.submit(lambda: 7).result(30))
"""
    done = run_script(tmp_path / "script.py", text)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "7\n")


class Two:
    """An integer of another library's."""

    def __index__(self) -> int:
        return 2


def test_integers_of_other_libraries_are_integers(pool: Pool) -> None:
    """Sizes may come from numpy; a float or a bool is no size."""
    executor = pool(Two())
    assert executor._max_workers == 2
    assert list(executor.map(abs, range(5), chunksize=Two())) == [0, 1, 2, 3, 4]  # type: ignore[arg-type]
    for wrong in (2.0, True, "2"):
        with pytest.raises(TypeError, match="must be an integer"):
            SafePoolExecutor(wrong)  # type: ignore[arg-type]


def test_a_task_that_nobody_has_read_yet_is_queued(pool: Pool) -> None:
    """The words of a timeout right after ``submit`` do not say that the task is settled."""
    executor = pool(1)
    with pytest.raises(TimeoutError, match=r"it is (queued|sent|running)"):
        executor.submit(tasks.nap, 0.2).result(0)


def test_a_watchdog_that_starts_slowly_is_not_taken_for_dead(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an overloaded machine a thread may take its time to start, while another one looks at the pool."""
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name.endswith("watchdog"):
            sleep(0.4)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    executor = pool(1)
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(executor.submit, abs, -3)
        while not future.done():
            assert dict(executor._processes) is not None
        assert future.result().result(LIMIT_S) == 3
    assert executor._broken is False
