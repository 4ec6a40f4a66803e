"""When the system is short of something the pool waits or says so: what passes is survived, one victim fails."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safepool import PoolBroken, SafePoolExecutor, WorkerDied, WorkerStartError
from safepool._launch import Launcher, WorkerProcess
from tests.faults import tasks
from tests.pool import tasks as plain
from tests.pool.test_deaths import BREAK_S, error_of, is_usable, submitted_before_it_breaks
from tests.support import LIMIT_S, SLACK_S, run_script

MakePool = Callable[..., SafePoolExecutor]

ROOT = Path(__file__).parents[2]
SLOW_SPAWN = pytest.param("spawn", marks=pytest.mark.slow)
OTHERS = (pytest.param("fork", marks=pytest.mark.slow), SLOW_SPAWN)


# -------------------------------------------------- descriptors and processes

NO_DESCRIPTOR = """
import os, resource, time
from safepool import SafePoolExecutor

with SafePoolExecutor(1) as pool:
    pool.submit(abs, 1).result(20)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    held = []
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
    time.sleep(1.0)  # what an earlier program left is looked for meanwhile
print("all well")
"""


def test_a_program_without_a_descriptor_is_told_nothing(tmp_path: Path) -> None:
    """What is done beside its work, and cannot be done now, is nobody's trouble."""
    done = run_script(tmp_path / "script.py", NO_DESCRIPTOR)
    assert (done.returncode, done.stdout, done.stderr) == (0, "all well\n", "")


DESCRIPTORS = """
import multiprocessing, os, resource, sys, time
from safepool import SafePoolExecutor

name, seconds, way = sys.argv[1], float(sys.argv[2]), sys.argv[3]
context = None if name == "default" else multiprocessing.get_context(name)
executor = SafePoolExecutor(1, context)
assert executor.submit(pow, 2, 3).result(20) == 8
before = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
held = []
try:
    while True:
        held.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    pass
print(executor.submit(os._exit, 3).exception(20).exitcode)
future = executor.submit(pow, 2, 4) if way == "queued" else None
time.sleep(seconds)
for fd in held:
    os.close(fd)
try:
    print((future or executor.submit(pow, 2, 4)).result(20))
    print([executor.submit(pow, 2, n).result(20) for n in range(4)])
except Exception as error:
    print(type(error).__name__, error)
end = time.monotonic() + 10
while len(os.listdir("/proc/self/fd")) > before + 2 and time.monotonic() < end:
    time.sleep(0.01)
print(len(os.listdir("/proc/self/fd")) <= before + 2)
executor.shutdown()
"""


@pytest.mark.parametrize("name", ["default", "fork", SLOW_SPAWN])
def test_out_of_descriptors_when_a_worker_must_be_replaced(tmp_path: Path, name: str) -> None:
    """For some tenths of a second no descriptor is free: the waiting task is done afterwards, and none is lost."""
    done = run_script(tmp_path / "script.py", DESCRIPTORS, name, "0.3", "queued")
    assert done.stdout.splitlines() == ["3", "16", "[1, 2, 4, 8]", "True"], done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize("name", ["default", SLOW_SPAWN])
def test_out_of_descriptors_while_nobody_needs_a_worker(tmp_path: Path, name: str) -> None:
    """Seconds of it do not break a pool that has nothing to do."""
    done = run_script(tmp_path / "script.py", DESCRIPTORS, name, "1.5", "idle")
    assert done.stdout.splitlines() == ["3", "16", "[1, 2, 4, 8]", "True"], done.stderr
    assert done.returncode == 0


class Reluctant:
    """A launcher that refuses some times."""

    def __init__(self, real: Launcher, refusals: list[BaseException]) -> None:
        self._real = real
        self._refusals = refusals

    def launch(self, *args: Any) -> WorkerProcess:
        if self._refusals:
            raise self._refusals.pop()
        return self._real.launch(*args)


REFUSALS: list[BaseException] = [
    BlockingIOError(errno.EAGAIN, "no process for you now"),
    OSError(errno.ENOMEM, "no memory for you now"),
    MemoryError(),
    EOFError(),
    ConnectionRefusedError(errno.ECONNREFUSED, "nobody is there now"),
]


@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: type(error).__name__)
def test_a_start_that_is_refused_for_a_while(pool: MakePool, error: BaseException) -> None:
    """Three refusals in a row, at the first start and at a later one: the tasks wait and are done."""
    executor = pool(1)
    executor._watchdog._launcher = Reluctant(executor._watchdog._launcher, [error] * 3)
    assert executor.submit(plain.echo, 1).result(LIMIT_S) == 1
    executor._watchdog._launcher = Reluctant(executor._watchdog._launcher, [error] * 3)
    assert type(error_of(executor.submit(os._exit, 1))) is WorkerDied
    assert is_usable(executor)


def test_refusals_while_another_worker_lives(pool: MakePool) -> None:
    """As long as somebody works no number of refusals breaks the pool; the seat is filled in the end."""
    executor = pool(2)
    both = [executor.submit(plain.nap, 0.2, n) for n in range(2)]
    assert [future.result(LIMIT_S) for future in both] == [0, 1]
    executor._watchdog._launcher = Reluctant(executor._watchdog._launcher, [REFUSALS[0]] * 6)
    assert type(error_of(executor.submit(os._exit, 1))) is WorkerDied
    assert [executor.submit(plain.nap, 0.1, n).result(LIMIT_S) for n in range(30)] == list(range(30))
    assert executor._broken is False


def test_refusals_for_ever_are_told(pool: MakePool) -> None:
    """Who starts nobody says so in bounded time, to every task."""
    executor = pool(2)
    executor._watchdog._launcher = Reluctant(executor._watchdog._launcher, [REFUSALS[0]] * 10_000)
    for future in submitted_before_it_breaks(executor, 3):
        error = error_of(future, BREAK_S)
        assert type(error) is WorkerStartError
        assert "no process for you now" in str(error)


@pytest.mark.parametrize("verb", ["fork", "pipe"])
def test_a_refused_system_call_leaves_nothing(
    pool: MakePool, context: Any, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork, or the second pipe of a start, that fails costs no descriptor (the audit looks) and no task."""
    executor = pool(1, context)
    assert is_usable(executor)
    real, calls, main = getattr(os, verb), [0], threading.get_ident()

    def refuse(*args: Any) -> Any:
        if threading.get_ident() == main:
            return real(*args)
        calls[0] += 1
        if calls[0] in ((1, 2) if verb == "fork" else (2, 4)):
            raise OSError(errno.EAGAIN if verb == "fork" else errno.EMFILE, "not now")
        return real(*args)

    monkeypatch.setattr(os, verb, refuse)
    assert type(error_of(executor.submit(os._exit, 1))) is WorkerDied
    assert is_usable(executor)


@pytest.mark.parametrize("kind", ["launches", "callbacks", "watchdog"])
def test_a_thread_that_cannot_be_started_for_a_moment(
    pool: MakePool, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Whichever of its threads is refused: the call that needed it says so at once, and the next one is run."""
    real, refusals, called = threading.Thread.start, [2], threading.Event()

    def start(thread: threading.Thread) -> None:
        if thread.name.endswith(kind) and refusals[0]:
            refusals[0] -= 1
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    executor = pool(1)
    for _ in range(2):
        error = error_of(executor.submit(plain.echo, 1), SLACK_S)
        assert type(error) is PoolBroken
        assert "can't start new thread" in str(error)
    future = executor.submit(plain.nap, 0.3, 1)
    future.add_done_callback(lambda _: called.set())
    assert future.result(LIMIT_S) == 1
    assert called.wait(LIMIT_S)
    assert executor._broken is False


# --------------------------------------------------------------- within a worker


@pytest.mark.parametrize("loss", [tasks.use_up_descriptors, tasks.lose_modules], ids=["descriptors", "modules"])
def test_errors_travel_from_a_worker_that_can_open_nothing(
    pool: MakePool, context: Any, loss: Callable[[], Any]
) -> None:
    """A task has taken every descriptor, or every way to import: later errors are told as ever, by the same worker."""
    executor = pool(1, context)
    pid = executor.submit(os.getpid).result(LIMIT_S)
    assert executor.submit(plain.echo, 1).result(LIMIT_S) == 1  # now it has the module of these tasks
    assert executor.submit(loss).result(LIMIT_S)
    assert executor.submit(plain.echo, 1).result(LIMIT_S) == 1
    error = error_of(executor.submit(tasks.throw, ValueError, "words"))
    assert type(error) is ValueError
    assert "throw" in str(error.__cause__)
    assert isinstance(error_of(executor.submit(plain.a_lock)), (TypeError, ImportError, OSError))
    unreadable = error_of(executor.submit(plain.echo, tasks.Throws(KeyError)))
    assert type(unreadable).__name__ == "TaskUnreadable"
    assert executor.submit(os.getpid).result(LIMIT_S) == pid


def test_memory_errors_travel(pool: MakePool, context: Any) -> None:
    """A task that wants more memory than its worker may have gets MemoryError; the worker stays."""
    executor = pool(1, context, tasks.cap_memory, (300,))
    pid = executor.submit(os.getpid).result(LIMIT_S)
    assert type(error_of(executor.submit(bytes, 2**30))) is MemoryError
    assert executor.submit(os.getpid).result(LIMIT_S) == pid


def test_answers_near_the_memory_limit_of_a_worker(pool: MakePool) -> None:
    """An answer comes, or it is a MemoryError: whatever has to be copied for it, the worker stays."""
    executor = pool(1, initializer=tasks.cap_memory, initargs=(200,))
    pid = executor.submit(os.getpid).result(LIMIT_S)
    for size in range(40_000_000, 200_000_000, 40_000_000):
        future = executor.submit(bytes, size)
        error = future.exception(LIMIT_S)
        assert type(error) is MemoryError or (error is None and len(future.result(0)) == size), f"{size}: {error!r}"
    assert executor.submit(os.getpid).result(LIMIT_S) == pid


def test_arguments_near_the_memory_limit_of_a_worker(pool: MakePool) -> None:
    """An argument that is too big for any worker fails alone, in bounded time; those around it are done."""
    executor = pool(1, initializer=tasks.cap_memory, initargs=(200,))
    for size in (50_000_000, 120_000_000, 180_000_000):
        data = bytes(size)
        future, behind = executor.submit(tasks.size_of, data), executor.submit(plain.echo, size)
        error = future.exception(LIMIT_S)
        names = [kind.__name__ for kind in type(error).__mro__]
        assert error is None or "MemoryError" in names or "BrokenProcessPool" in names
        assert error is not None or future.result(0) == size
        assert behind.result(LIMIT_S) == size
    assert executor._broken is False


# --------------------------------------------------------------- within the program

MEMORY = """
import os, resource, sys, threading, time
sys.path.insert(0, {root!r})
from safepool import SafePoolExecutor
from tests.faults import tasks

way = sys.argv[1]
size, steps = (100_000_000, range(200, 320, 20)) if way == "argument" else (60_000_000, range(10, 190, 20))
with SafePoolExecutor(2) as executor:
    assert executor.submit(pow, 2, 3).result(20) == 8
    data = bytes(size) if way == "argument" else b""
    for more in steps:
        neighbour = executor.submit(time.sleep, 0.2)
        tasks.cap_memory(more)
        try:
            call = (tasks.size_of, data) if way == "argument" else (bytes, size)
            future = executor.submit(*call)
            error = future.exception(20)
            told = type(error).__name__
            if error is None:
                result = future.result(0)
                assert size in (result, way == "result" and len(result))
        except MemoryError:
            told = "MemoryError at once"  # the limit is the caller's too
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        assert neighbour.exception(20) is None, repr(neighbour.exception(0))
        assert executor.submit(pow, 2, 3).result(20) == 8
        print(told, flush=True)
        future = error = result = None
print("done")
"""


@pytest.mark.parametrize("way", ["result", "argument"])
def test_what_is_too_big_for_the_program_fails_alone(tmp_path: Path, way: str) -> None:
    """With ever more memory allowed, a big answer or argument fails alone until it succeeds; no pool breaks."""
    done = run_script(tmp_path / "script.py", MEMORY.format(root=str(ROOT)), way, limit_s=2 * LIMIT_S)
    told = done.stdout.splitlines()
    assert told[-1:] == ["done"], done.stderr
    assert told[-2] == "NoneType"
    assert set(told[:-1]) <= {"NoneType", "WorkerDied", "MemoryError", "MemoryError at once", "ResultUnreadable"}


# --------------------------------------------------------------- places for files


@pytest.fixture
def deep() -> Any:
    """A folder with a name too long for a socket in it."""
    top = Path(tempfile.mkdtemp())
    folder = top / ("x" * 100)
    folder.mkdir()
    yield folder
    shutil.rmtree(top)


FOLDERS = """
import multiprocessing, os, shutil, sys, tempfile, warnings
way, name, folder = sys.argv[1:]
os.environ["TMPDIR"] = folder
from safepool import SafePoolExecutor

context = None if name == "default" else multiprocessing.get_context(name)
executor = SafePoolExecutor(1, context)
print(executor.submit(pow, 2, 3).result(20))
if way == "deleted":
    shutil.rmtree(folder)
print(executor.submit(os._exit, 3).exception(20).exitcode)
print([executor.submit(pow, 2, n).result(20) for n in range(4)])
executor.shutdown()
sys.stdout.flush()
os.makedirs(folder, exist_ok=True) if way == "deleted" else None
os._exit(0)
"""


@pytest.mark.parametrize("name", ["default", "forkserver", *OTHERS])
@pytest.mark.parametrize("way", ["missing", "not writable", "deep", "deleted"])
def test_a_folder_for_temporary_files_that_is_no_use(tmp_path: Path, deep: Path, name: str, way: str) -> None:
    """TMPDIR is missing, cannot be written to, is too long for a socket or vanishes: workers start, and start again."""
    short = tempfile.mkdtemp()
    folder = {"missing": "/nowhere/at/all", "not writable": "/proc", "deep": str(deep), "deleted": short}[way]
    try:
        done = run_script(tmp_path / "script.py", FOLDERS, way, name, folder)
    finally:
        shutil.rmtree(short, ignore_errors=True)
    assert done.stdout.splitlines() == ["8", "3", "[1, 2, 4, 8]"], done.stderr
    assert done.returncode == 0
