"""Whoever else reaps the children: deaths are noticed, told as far as they are known, and nothing is kept of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import process
from pathlib import Path
from typing import Any

import psutil
import pytest

from safepool import SafePoolExecutor, TaskTimeout, WorkerDied
from tests.faults import tasks
from tests.pool import tasks as plain
from tests.pool.test_deaths import error_of, is_usable, running
from tests.support import LIMIT_S, PROMPT_S, SLACK_S, is_gone, run_script, until

MakePool = Callable[..., SafePoolExecutor]

DEATHS = 2


def reap_everybody(*_: object) -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


@contextmanager
def ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


@contextmanager
def handled() -> Iterator[None]:
    before = signal.signal(signal.SIGCHLD, reap_everybody)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


@contextmanager
def a_thread() -> Iterator[None]:
    """Reaps children within a millisecond of their death."""
    over = threading.Event()

    def reap() -> None:
        while not over.wait(0.001):
            reap_everybody()

    thread = threading.Thread(target=reap)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(LIMIT_S)


REAPERS: dict[str, Callable[[], Any]] = {"ignored": ignored, "handler": handled, "thread": a_thread}


@pytest.fixture(params=REAPERS)
def reaper(request: pytest.FixtureRequest) -> Iterator[str]:
    """Somebody who reaps, until the end of the test; the fork servers' children are not ours and are safe from him."""
    # He would reap the servers and trackers of multiprocessing too, if they died; they do not.
    with REAPERS[request.param]():
        yield request.param


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.usefixtures("reaper")
def test_deaths_are_noticed_and_nothing_is_kept(pool: MakePool, context: Any) -> None:
    """Each death costs its task alone, is told soon with what is known, and leaves no descriptor and no object."""
    executor = pool(2, context)
    assert is_usable(executor)
    error_of(executor.submit(os._exit, 1))
    until(lambda: len(executor._processes) >= 1 and is_usable(executor), "healed")
    for _ in range(DEATHS):
        neighbour = executor.submit(plain.nap, 0.1, "neighbour")
        error = executor.submit(os._exit, 7).exception(PROMPT_S + SLACK_S)
        assert type(error) is WorkerDied
        assert error.exitcode in (7, None)
        assert "7" in str(error) or "unknown" in str(error)
        assert neighbour.result(LIMIT_S) == "neighbour"
    executor.shutdown()
    assert not executor._processes
    assert not [child for child in process._children if child.name.startswith(executor._watchdog.name)]


@pytest.mark.usefixtures("reaper")
def test_retired_workers_leave_nothing(pool: MakePool, retiring_context: Any) -> None:
    """A worker for each task: neither descriptors nor objects of the former ones pile up."""
    executor = pool(1, retiring_context, max_tasks_per_child=1)
    pids = [executor.submit(os.getpid).result(LIMIT_S) for _ in range(2)]
    links = executor._watchdog._links
    until(lambda: len(links.by_worker) == 1 and not links.launching, "there is one worker, not none")
    before = descriptors()
    pids += [executor.submit(os.getpid).result(LIMIT_S) for _ in range(6)]
    assert len(set(pids)) == 8
    # Two workers at a time, and what their launch needs for a moment, but not six of them.
    until(lambda: descriptors() <= before + 4, "descriptors are given back")
    executor.shutdown()


@pytest.mark.usefixtures("reaper")
def test_limits_and_kills_hold(pool: MakePool, context: Any, tmp_path: Path) -> None:
    """A timeout, kill() and kill_workers() end workers that somebody else reaps."""
    executor = pool(2, context)
    error = error_of(executor.options(timeout=0.3).submit(plain.hold_the_gil))
    assert type(error) is TaskTimeout
    assert error.pid is not None
    until(lambda: is_gone(error.pid or 0), "its worker is gone")
    future = executor.submit(plain.nap, LIMIT_S)
    running(future)
    assert future.kill()
    until(future.done, "it is done", PROMPT_S + SLACK_S)
    assert is_usable(executor)
    left = executor.submit(plain.nap, LIMIT_S)
    running(left)
    executor.kill_workers()
    assert left.done()
    executor.shutdown()
    assert not executor._processes


@pytest.mark.usefixtures("reaper")
def test_the_death_of_an_idle_worker(pool: MakePool, context: Any) -> None:
    """An idle worker whose status nobody gets to know is replaced; no task hears of it."""
    executor = pool(1, context)
    pid = executor.submit(os.getpid).result(LIMIT_S)
    os.kill(pid, signal.SIGKILL)
    until(lambda: pid not in executor._processes, "it is buried")
    assert executor.submit(os.getpid).result(LIMIT_S) != pid


@pytest.mark.usefixtures("reaper")
def test_an_initializer_that_exits_breaks_the_pool(pool: MakePool, context: Any) -> None:
    """Starts that fail with an unknown status end in a broken pool, in bounded time."""
    executor = pool(1, context, initializer=plain.exit_in_initializer)
    assert "in a row failed to start" in str(error_of(executor.submit(plain.echo, 1)))


# ----------------------------------------------------------- the fork server

SERVER = """
import multiprocessing, os, signal, sys, time
import psutil
from safepool import SafePoolExecutor

def reap(*_):
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass

way, name = sys.argv[1:]
if way != "default":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN if way == "ignored" else reap)
context = None if name == "default" else multiprocessing.get_context(name)
executor = SafePoolExecutor(2, context)
assert executor.submit(pow, 2, 3).result(20) == 8
long, short = executor.submit(time.sleep, 60), executor.submit(time.sleep, 1)
while not (long.running() and short.running()):
    time.sleep(0.01)
for child in psutil.Process().children():
    if "forkserver" in " ".join(child.cmdline()):
        child.kill()
        while psutil.pid_exists(child.pid) and child.status() != "zombie":
            time.sleep(0.01)
os.kill(long.worker_pid, signal.SIGKILL)
error = long.exception(20)
print(type(error).__name__, error.exitcode)
print(short.result(20))
print([executor.submit(pow, 2, n).result(20) for n in range(5)])
executor.shutdown()
"""


@pytest.mark.parametrize("name", ["default", pytest.param("forkserver", marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", ["default", "ignored", "handler"])
def test_a_fork_server_that_is_killed(tmp_path: Path, way: str, name: str) -> None:
    """Its workers go on, no death is told with an exit code that is not its own, and a new server is started."""
    done = run_script(tmp_path / "script.py", SERVER, way, name)
    assert (done.returncode, done.stderr) == (0, "")
    first, *rest = done.stdout.splitlines()
    assert first in ("WorkerDied -9", "WorkerDied None")
    assert rest == ["None", "[1, 2, 4, 8, 16]"]


def test_a_pool_that_reaps_takes_no_child_of_the_user(pool: MakePool) -> None:
    """The exit status of a child of the program's own is left to the program, whatever dies in the pool."""
    executor = pool(2, multiprocessing.get_context("spawn"))
    assert is_usable(executor)
    children = [os.posix_spawn("/bin/sh", ["sh", "-c", f"exit {n}"], {}) for n in (3, 4, 5)]
    for _ in range(2):
        assert type(error_of(executor.submit(tasks.end, "SIGKILL"))) is WorkerDied
    executor.shutdown()
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [3, 4, 5]


def test_the_programs_child_watcher_is_left_alone() -> None:
    """No handler for SIGCHLD is installed or removed by using a pool."""
    assert psutil.Process().is_running()
    before = signal.getsignal(signal.SIGCHLD)
    with SafePoolExecutor(1) as executor:
        assert type(error_of(executor.submit(os._exit, 1))) is WorkerDied
        assert signal.getsignal(signal.SIGCHLD) is before
    assert signal.getsignal(signal.SIGCHLD) is before
