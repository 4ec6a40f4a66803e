"""Locks that the program's threads hold while workers start keep nobody waiting; under "fork" the end is bounded."""

from __future__ import annotations

import gc
import importlib
import io
import logging
import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from safepool import SafePoolExecutor, WorkerDied
from tests.faults import tasks
from tests.pool import tasks as plain
from tests.pool.test_deaths import error_of, is_usable
from tests.support import LIMIT_S, SLACK_S

MakePool = Callable[..., SafePoolExecutor]

ENDED_S = 8.0  # kill_workers() and shutdown() when a launch hangs: SIGKILL, once more, and it is given up


@contextmanager
def held(lock: Any) -> Iterator[None]:
    """Another thread holds ``lock`` until the end."""
    ready, over = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            ready.set()
            over.wait(4 * LIMIT_S)

    thread = threading.Thread(target=hold)
    thread.start()
    assert ready.wait(LIMIT_S)
    try:
        yield
    finally:
        over.set()
        thread.join(LIMIT_S)


class _Import:
    """Being in the middle of an import."""

    def __init__(self, folder: Path) -> None:
        self.begun, self.leave = threading.Event(), threading.Event()
        (folder / "slow_module.py").write_text(
            "import sys\nbegun, leave = sys.slow_module\nbegun.set()\nleave.wait(60)\n"
        )
        self._folder = str(folder)

    def __enter__(self) -> None:
        sys.slow_module = self.begun, self.leave  # type: ignore[attr-defined]
        sys.path.insert(0, self._folder)
        self._thread = threading.Thread(target=importlib.import_module, args=("slow_module",))
        self._thread.start()
        assert self.begun.wait(LIMIT_S)

    def __exit__(self, *_: object) -> None:
        self.leave.set()
        self._thread.join(LIMIT_S)
        sys.path.remove(self._folder)
        sys.modules.pop("slow_module", None)
        del sys.slow_module  # type: ignore[attr-defined]


class Tee(io.StringIO):
    """A stream of the user's with a lock around everything, over a real descriptor."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self.lock = threading.RLock()

    def write(self, text: str) -> int:
        with self.lock:
            return super().write(text)

    def flush(self) -> None:
        with self.lock:
            super().flush()

    def fileno(self) -> int:
        return self._fd


def a_day(executor: SafePoolExecutor) -> None:
    """The first start, a death, a new start."""
    assert executor.submit(plain.echo, 1).result(LIMIT_S / 2) == 1
    assert type(error_of(executor.submit(os._exit, 1), LIMIT_S / 2)) is WorkerDied
    assert executor.submit(tasks.speak, 2).result(LIMIT_S / 2) == 2


SAFE = ("default", "spawn", "forkserver")


@pytest.fixture(params=SAFE)
def safe(request: pytest.FixtureRequest, pool: MakePool) -> SafePoolExecutor:
    """A pool that does not fork this process."""
    return pool(2, None if request.param == "default" else multiprocessing.get_context(request.param))


def test_the_lock_of_logging(safe: SafePoolExecutor) -> None:
    """Held by a thread for as long as it likes: workers start, die and start."""
    with held(logging._lock):  # type: ignore[attr-defined]
        a_day(safe)


def test_the_lock_of_a_log_handler(safe: SafePoolExecutor) -> None:
    """The same with the lock of a handler of the root logger."""
    handler = logging.StreamHandler(io.StringIO())
    logging.getLogger().addHandler(handler)
    try:
        assert handler.lock is not None
        with held(handler.lock):
            a_day(safe)
    finally:
        logging.getLogger().removeHandler(handler)


def test_an_import_that_is_under_way(safe: SafePoolExecutor, tmp_path: Path) -> None:
    """The same while a module is half imported."""
    with _Import(tmp_path):
        a_day(safe)


def test_the_lock_of_a_stream(safe: SafePoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with the lock of what the program has put in the place of sys.stdout and sys.stderr."""
    tee = Tee(os.open(os.devnull, os.O_WRONLY))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", tee)
            patch.setattr(sys, "stderr", tee)
            with held(tee.lock):
                a_day(safe)
    finally:
        os.close(tee.fileno())


def test_locks_of_multiprocessing_that_are_not_ours(safe: SafePoolExecutor) -> None:
    """The same while a thread holds a lock of the user's own, one that the task's module has too."""
    with held(threading.Lock()), held(gc_lock):
        a_day(safe)


gc_lock = threading.Lock()


def test_a_thread_that_prints_for_ever(safe: SafePoolExecutor) -> None:
    """The same while a thread does nothing but print and collect garbage."""
    over = threading.Event()

    def print_on() -> None:
        with open(os.devnull, "w") as file:
            while not over.is_set():
                print("x" * 1000, file=file)
                gc.collect(0)

    thread = threading.Thread(target=print_on)
    thread.start()
    try:
        for _ in range(3):
            a_day(safe)
    finally:
        over.set()
        thread.join(LIMIT_S)


# ------------------------------------------------------------------------ fork


def bounded(executor: SafePoolExecutor) -> None:
    """Under "fork" a lock may keep workers from starting; deadlines hold, and the pool can be ended."""
    began = monotonic()
    late = executor.options(deadline=0.5).submit(plain.echo, 1)
    error = late.exception(2 + SLACK_S)
    assert error is None or isinstance(error, TimeoutError)
    left = executor.submit(plain.echo, 2)
    executor.kill_workers()
    assert left.done()
    executor.shutdown()
    assert monotonic() - began < 0.5 + ENDED_S + 2 * SLACK_S


@pytest.mark.parametrize("kind", ["logging", "import", "stream"])
def test_a_fork_while_locks_are_held_is_bounded(
    pool: MakePool, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lock is held while the program is forked: deadlines hold, and the end comes."""
    executor = pool(2, multiprocessing.get_context("fork"))
    tee = Tee(os.open(os.devnull, os.O_WRONLY))
    try:
        if kind == "logging":
            with held(logging._lock):  # type: ignore[attr-defined]
                bounded(executor)
        elif kind == "import":
            with _Import(tmp_path):
                bounded(executor)
        else:
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", tee)
                with held(tee.lock):
                    bounded(executor)
    finally:
        os.close(tee.fileno())


class Keeping(logging.Handler):
    """Keeps the last words; its lock is one of those that logging renews in a forked child."""

    def __init__(self) -> None:
        super().__init__()
        self.words: deque[str] = deque(maxlen=10)

    def emit(self, record: logging.LogRecord) -> None:
        self.words.append(record.getMessage())


def test_a_fork_while_threads_log(pool: MakePool) -> None:
    """Threads that log all the time: workers by fork start and log as well."""
    executor, over = pool(2, multiprocessing.get_context("fork")), threading.Event()
    handler = Keeping()
    logger = logging.getLogger("tests.faults.noise")
    logger.addHandler(handler)
    logger.propagate = False

    def make_noise() -> None:
        while not over.is_set():
            logger.warning("noise")

    threads = [threading.Thread(target=make_noise) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(8):
            assert executor.submit(say, "noise").result(LIMIT_S / 2) == "noise"
            assert type(error_of(executor.submit(os._exit, 1), LIMIT_S / 2)) is WorkerDied
    finally:
        over.set()
        for thread in threads:
            thread.join(LIMIT_S)
        logger.removeHandler(handler)
    assert is_usable(executor)


def say(words: str) -> str:
    logging.getLogger("tests.faults.noise").warning(words)
    return words
