"""A program that forks while its pool works: the pool is not disturbed, and the child ends quietly, as it wants."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from safepool import SafePoolExecutor
from tests.conftest import CONTEXTS
from tests.pool import tasks as plain
from tests.pool.test_deaths import is_usable, running
from tests.support import LIMIT_S, is_gone, run_script, until

MakePool = Callable[..., SafePoolExecutor]

CHILD_S = 15.0  # a child that takes longer is ended by an alarm


def fork(act: Callable[[], object]) -> int:
    """Run ``act`` in a forked child; its exit code: 0 if it returned true, 1 if not, 2 if it raised."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    signal.alarm(int(CHILD_S))
    code = 2
    try:
        code = 0 if act() else 1
    finally:
        os._exit(code)


@pytest.fixture
def busy(pool: MakePool, context: Any, tmp_path: Path) -> Any:
    """A pool with two running tasks and some that wait; everything must be answered in the end."""
    executor, gate = pool(2, context), tmp_path / "gate"
    futures = [executor.submit(plain.wait_for, gate, n) for n in range(6)]
    running(*futures[:2])
    yield executor, futures
    gate.touch()
    assert [future.result(LIMIT_S) for future in futures] == list(range(6))
    assert is_usable(executor)


def refuses(act: Callable[[], object]) -> bool:
    try:
        act()
    except RuntimeError as error:
        return "fork" in str(error)
    return False


def test_a_child_uses_every_verb(busy: Any) -> None:
    """Whatever asks for work refuses and says why; whatever ends the pool does nothing; both at once."""
    executor, futures = busy
    asking: list[Callable[[], object]] = [
        lambda: executor.submit(abs, -1),
        lambda: executor.options(timeout=1).submit(abs, -1),
        lambda: list(executor.map(abs, [1])),
        lambda: futures[0].result(LIMIT_S),
        lambda: futures[1].exception(LIMIT_S),
    ]
    ending: list[Callable[[], object]] = [
        executor.__enter__,
        lambda: executor.__exit__(None, None, None),
        executor.shutdown,
        executor.terminate_workers,
        executor.kill_workers,
        executor.__repr__,
        futures.__repr__,
        lambda: executor._executor_manager_thread,
    ]
    began = monotonic()
    assert fork(lambda: all(refuses(act) for act in asking)) == 0
    assert fork(lambda: [act() for act in ending]) == 0
    assert monotonic() - began < CHILD_S / 2


def test_a_child_drops_its_copy(pool: MakePool, context: Any) -> None:
    """Its garbage collector does not wait for a lock that another thread of the parent held at the fork."""
    executor = pool(1, context)
    assert is_usable(executor)
    watchdog, held, release = executor._watchdog, threading.Event(), threading.Event()

    def hold() -> None:
        with watchdog._start_lock:
            held.set()
            release.wait(LIMIT_S)

    def drop() -> bool:
        executor._dropped()
        gc.collect()
        return True

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(LIMIT_S)
        assert fork(drop) == 0
    finally:
        release.set()
        thread.join(LIMIT_S)
    assert is_usable(executor)


def test_forks_while_threads_submit(pool: MakePool, context: Any) -> None:
    """Forked at any moment of a submit, a child refuses, shuts down and leaves; the parent loses nothing."""
    executor = pool(2, context)
    assert is_usable(executor)
    over, futures = threading.Event(), [[], []]  # type: ignore[var-annotated]

    def submit(mine: list[Any]) -> None:
        while not over.is_set() and len(mine) < 20_000:
            mine.append(executor.submit(plain.echo, len(mine)))

    threads = [threading.Thread(target=submit, args=(mine,)) for mine in futures]
    for thread in threads:
        thread.start()
    try:
        for n in range(12):
            code = fork(lambda: refuses(lambda: executor.submit(abs, -1)) and executor.shutdown() is None)
            assert code == 0, f"fork {n}"
    finally:
        over.set()
        for thread in threads:
            thread.join(LIMIT_S)
    for mine in futures:
        assert [future.result(LIMIT_S) for future in mine] == list(range(len(mine)))


def test_a_child_makes_pools_of_its_own_while_threads_submit(pool: MakePool) -> None:
    """A pool made in a child works, whatever the parent's threads were in the middle of."""
    executor = pool(2)
    assert is_usable(executor)
    over = threading.Event()

    def submit() -> None:
        while not over.wait(0.001):
            assert executor.submit(plain.echo, 1).result(LIMIT_S) == 1

    def own() -> bool:
        with SafePoolExecutor(1) as mine:
            return mine.submit(pow, 2, 5).result(CHILD_S) == 32

    thread = threading.Thread(target=submit)
    thread.start()
    try:
        assert [fork(own) for _ in range(4)] == [0] * 4
    finally:
        over.set()
        thread.join(LIMIT_S)


# ------------------------------------------------------------ ends of a child

ENDS = """
import multiprocessing, os, sys, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of fork() in a program with threads, from 3.12 on
from safepool import SafePoolExecutor

way, name = sys.argv[1:]
context = None if name == "default" else multiprocessing.get_context(name)
executor = SafePoolExecutor(2, context)
assert executor.submit(pow, 2, 3).result(20) == 8
futures = [executor.submit(time.sleep, 0.2) for _ in range(4)]
while not futures[0].running():
    time.sleep(0.01)


def leave():
    how = way.partition("-")[2]
    if how == "exits":
        sys.exit(3)
    if how == "own":
        own = SafePoolExecutor(1, context)
        own.submit(pow, 2, 5).add_done_callback(lambda future: print("own", future.result(), flush=True))
        sys.exit(3)
    if how == "with":
        with executor:
            pass
        sys.exit(3)
    os._exit(3)


began = time.monotonic()
if way.startswith("process"):
    process = multiprocessing.get_context("fork").Process(target=leave)
    process.start()
    process.join(20)
    code = process.exitcode
else:
    pid = os.fork()
    if pid == 0:
        leave()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print("code", code, time.monotonic() - began < 10, flush=True)
print([future.result(20) for future in futures], executor.submit(pow, 2, 4).result(20), flush=True)
"""


LONG = ("fork-with", "fork-", "process-with", "process-")
WAYS = ["fork-exits", "fork-own", "process-exits", "process-own"]
WAYS += [pytest.param(way, marks=pytest.mark.slow) for way in LONG]  # type: ignore[misc]


@pytest.mark.parametrize("name", ["default", "fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", WAYS)
def test_a_child_ends_as_it_wants(tmp_path: Path, way: str, name: str) -> None:
    """By sys.exit, with an own pool that nobody shuts down, after a ``with`` or by os._exit: 3, and not a word."""
    done = run_script(tmp_path / "script.py", ENDS, way, name)
    expected = ["code 3 True", "[None, None, None, None] 16"]
    assert done.stdout.splitlines() == (["own 32"] if way.endswith("own") else []) + expected
    assert (done.returncode, done.stderr) == (0, "")


ORPHAN = """
import multiprocessing, os, sys, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import psutil
from safepool import SafePoolExecutor

name, end, out = sys.argv[1:]
context = None if name == "default" else multiprocessing.get_context(name)
executor = SafePoolExecutor(2, context)
assert executor.submit(pow, 2, 3).result(20) == 8
helpers = [c for c in psutil.Process().children(recursive=True) if "resource_tracker" not in " ".join(c.cmdline())]
pid = os.fork()
if pid == 0:
    for number in (1, 2):
        os.close(number)
    time.sleep(60)
    os._exit(0)
with open(out, "w") as file:
    print(pid, *(helper.pid for helper in helpers), file=file)
if end == "killed":
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("end", ["ends", pytest.param("killed", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [name for name in CONTEXTS if name != "forkserver"])
def test_a_child_that_stays_keeps_nothing_of_the_pool(tmp_path: Path, name: str, end: str) -> None:
    """The program ends, its forked child lives on: workers and the server that starts them are gone all the same."""
    script, out, folder = tmp_path / "script.py", tmp_path / "out", tempfile.mkdtemp()
    script.write_text(ORPHAN)
    null = subprocess.DEVNULL  # a pipe would be kept open by those that this is about
    command = [sys.executable, str(script), name, end, str(out)]
    environment = {**os.environ, "TMPDIR": folder}
    program = subprocess.run(command, stdin=null, stdout=null, stderr=null, timeout=LIMIT_S, env=environment)
    assert program.returncode == (0 if end == "ends" else -signal.SIGKILL)
    child, *pool = map(int, out.read_text().split())
    try:
        assert pool
        until(lambda: all(is_gone(pid) for pid in pool), "the pool's processes are gone", LIMIT_S / 3)
    finally:
        os.kill(child, signal.SIGKILL)
        shutil.rmtree(folder)  # of a program that could not tidy up
