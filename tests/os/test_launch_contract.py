"""The launch verb: whatever starts a worker, it keeps this contract."""

from __future__ import annotations

import multiprocessing
import os
import selectors
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

import safepool
from safepool import SafePoolExecutor, WorkerDied, _os, _wire
from safepool._launch import ContextLauncher, Launcher, WorkerProcess, launcher_of
from safepool._worker import Setup
from safepool.policy import LaunchPolicy
from tests.conftest import CONTEXTS
from tests.pool import tasks
from tests.support import LIMIT_S, ByHand, is_gone, run_script, until, words_and_value

LAUNCHERS = ("default", "fork", "spawn", "forkserver", "loky")
LEAVE = LaunchPolicy(leftovers="leave")  # what is ended, and when, is the containment tests' subject


@pytest.fixture(params=LAUNCHERS)
def launcher(request: pytest.FixtureRequest) -> Launcher:
    if request.param == "default":
        return launcher_of(None, "contract", LEAVE)
    if request.param == "loky":
        from loky.backend.context import get_context

        return ContextLauncher(get_context("loky"), "contract")
    return launcher_of(multiprocessing.get_context(request.param), "contract", LEAVE)


class _Started(ByHand):
    """A worker, and its parent."""

    def __init__(self, launcher: Launcher, setup: Setup) -> None:
        super().__init__()
        try:
            self.process: WorkerProcess = launcher.launch(self.ends, setup)
        finally:
            self.ends.close()
        self.channel.sendall(self.process.greeting)

    def call(self, number: int, *call: Any) -> _wire.Frame:
        fn, *args = call
        self.post(number, fn, *args)
        assert self.hear()[:2] == (_wire.BEGAN, number)
        return self.hear()

    def await_death(self) -> int | None:
        """Until its descriptor says that it is dead; then its exit status."""
        fd = self.process.fileno()
        assert fd is not None
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            assert selector.select(LIMIT_S), "its death is not reported"
        until(lambda: self.process.exitcode() is not None, "its exit status")
        return self.process.exitcode()

    def close(self) -> None:
        self.process.kill(hard=True)
        with suppress(AssertionError):
            until(self.process.is_dead, "its death")
        self.process.release()
        super().close()
        del self.process  # multiprocessing's object gives back its pipes when nobody has it any more


@pytest.fixture
def worker(launcher: Launcher) -> Iterator[_Started]:
    started = _Started(launcher, Setup(tasks.set_environ, ("SAFEPOOL_TEST", "set up")))
    try:
        assert started.hear()[:2] == (_wire.BOOTED, started.process.pid)
        assert started.hear()[:2] == (_wire.READY, started.process.pid)
        yield started
    finally:
        started.close()


def test_it_is_a_process_of_its_own_that_is_set_up_and_works(worker: _Started) -> None:
    """The worker speaks from the pid it is said to have, ran its initializer, and answers calls."""
    assert worker.process.pid != os.getpid()
    answer = worker.call(1, os.getpid)
    assert (answer.kind, words_and_value(answer)[1]) == (_wire.PLAIN, worker.process.pid)
    assert words_and_value(worker.call(2, os.getenv, "SAFEPOOL_TEST"))[1] == "set up"
    assert not worker.process.is_dead()
    assert worker.process.exitcode() is None


def test_it_leaves_when_asked(worker: _Started) -> None:
    """EXIT ends it with 0, its descriptor tells, and no zombie stays."""
    worker.channel.sendall(_wire.encode(_wire.Frame(_wire.EXIT)))
    assert worker.await_death() == 0
    until(lambda: is_gone(worker.process.pid), "no zombie")


def test_it_leaves_when_its_channel_closes(worker: _Started) -> None:
    """A parent that is gone is noticed by an idle worker."""
    worker.channel.shutdown(socket.SHUT_RDWR)
    assert worker.await_death() == 0


@pytest.mark.parametrize(("hard", "code"), [(True, -signal.SIGKILL), (False, -signal.SIGTERM)])
def test_it_can_be_ended(worker: _Started, hard: bool, code: int) -> None:
    """SIGKILL and SIGTERM reach it, also while it is stopped for the former."""
    if hard:
        os.kill(worker.process.pid, signal.SIGSTOP)
    worker.process.kill(hard=hard)
    assert worker.await_death() == code
    worker.process.kill(hard=True)  # of the dead: nothing happens


def test_its_exit_code_is_told(worker: _Started) -> None:
    """os._exit(7) in a task arrives as 7."""
    worker.post(1, os._exit, 7)
    assert worker.await_death() == 7


def test_its_own_children_do_not_hide_its_death(worker: _Started) -> None:
    """A child that a task forked inherits what it may; the death of the worker is seen all the same."""
    child = words_and_value(worker.call(1, tasks.fork_a_child, 60.0))[1]
    try:
        began = monotonic()
        worker.process.kill(hard=True)
        assert worker.await_death() == -signal.SIGKILL
        assert monotonic() - began < LIMIT_S / 3
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_can_be_handed_to_the_initializer(launcher: Launcher) -> None:
    """What pickles only while a process starts (locks, queues) reaches the initializer, as in the stock pool."""
    if getattr(launcher, "method", "") == "loky":
        pytest.skip("loky has locks of its own kind")
    method = getattr(launcher, "method", "fork")
    lock = multiprocessing.get_context(method).Lock()
    started = _Started(launcher, Setup(tasks.use_lock, (lock,)))
    try:
        assert started.hear().kind == _wire.BOOTED
        assert started.hear().kind == _wire.READY
    finally:
        started.close()


def test_what_cannot_be_pickled_is_told_by_the_launch() -> None:
    """An initializer that cannot travel is an error of the launch, and the same every time: no OSError."""
    channel, theirs = _os.open_channel()
    try:
        with pytest.raises((TypeError, AttributeError)):
            launcher_of(None, "contract").launch(theirs, None, Setup(abs, (threading.Lock(),)))
    finally:
        theirs.close()
        _os.close(channel)


EXITS = """
import atexit, multiprocessing, sys
from safepool import SafePoolExecutor

def leave_word():
    from multiprocessing import util
    util.Finalize(None, print, ("finalized",), kwargs={"flush": True}, exitpriority=1)

context = None if sys.argv[1] == "default" else multiprocessing.get_context(sys.argv[1])
with SafePoolExecutor(1, context) as executor:
    executor.submit(leave_word).result(30)
"""


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_worker_ends_as_a_process_of_multiprocessing_does(tmp_path: Path, name: str) -> None:
    """What tasks left for the end of their process is done: queues are flushed, temporary directories removed."""
    done = run_script(tmp_path / "script.py", EXITS, name)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "finalized\n")


# ------------------------------------------------- a platform that gives less


def test_capabilities_say_what_is_not_guaranteed() -> None:
    """Each capability that can be missing has its sentence."""
    assert set(_os.MISSING) >= safepool.CAPABILITIES
    assert all(words for words in _os.MISSING.values())


BARE = """
import sys, os, multiprocessing.util, concurrent.futures.process, selectors, select, signal, socket
import _signal, _socket
from loky.backend import context

del os.fork, os.register_at_fork, os.pidfd_open, os.WNOHANG, os.memfd_create
del signal.pidfd_send_signal, socket.MSG_DONTWAIT, select.poll, _signal.pidfd_send_signal, _socket.MSG_DONTWAIT
sys.platform = "win32"
sys.modules["fcntl"] = sys.modules["termios"] = None
import safepool
from safepool import SafePoolExecutor, TaskTimeout, as_completed

print(sorted(safepool.CAPABILITIES), SafePoolExecutor(1, timeout=1)._max_workers)
"""


def test_it_imports_where_all_of_it_is_missing(tmp_path: Path) -> None:
    """No fork, pidfd, poll or fcntl, as on Windows: importing and making a pool is no error, and it is said."""
    done = run_script(tmp_path / "script.py", BARE)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "[] 1\n")


@pytest.fixture
def poor_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pidfd, and no taking back."""
    monkeypatch.setattr(_os, "watch", lambda pid: None)
    monkeypatch.setattr(_os, "CAPABILITIES", frozenset({"fork"}))


@pytest.mark.usefixtures("poor_platform")
@pytest.mark.parametrize("method", [None, "forkserver", "fork"])
def test_the_pool_works_without_keeper_pidfd_and_tickets(method: str | None) -> None:
    """Deaths are found by asking, tasks go out one at a time, and every promise but the speed holds."""
    with SafePoolExecutor(2, method and multiprocessing.get_context(method)) as executor:
        assert list(executor.map(abs, range(-50, 0))) == list(range(50, 0, -1))
        victim = executor.submit(os._exit, 7)
        others = [executor.submit(tasks.nap, 0.01, n) for n in range(10)]
        error = victim.exception(LIMIT_S)
        assert isinstance(error, WorkerDied)
        assert error.exitcode == 7
        assert [future.result(LIMIT_S) for future in others] == list(range(10))
        slow = executor.options(timeout=0.3).submit(tasks.nap, LIMIT_S)
        assert isinstance(slow.exception(LIMIT_S), TimeoutError)
