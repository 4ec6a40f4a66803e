"""Whatever an initializer does, tasks fail with its words, or wait no longer than they want; the pool can be ended."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import psutil
import pytest

from safepool import SafePoolExecutor, TaskTimeout, WorkerStartError, _seats
from tests.faults import tasks
from tests.pool import tasks as plain
from tests.pool.test_deaths import BREAK_S, error_of, is_broken, is_usable, submitted_before_it_breaks
from tests.support import LIMIT_S, SLACK_S, until

MakePool = Callable[..., SafePoolExecutor]

ROOT = Path(__file__).parents[2]


# ---------------------------------------------------------------- that fail


@pytest.mark.parametrize(
    ("initializer", "argument", "words"),
    [
        (tasks.leave, 5, "SystemExit: 5"),
        (tasks.leave, None, "SystemExit"),
        (tasks.throw, KeyboardInterrupt, "KeyboardInterrupt"),
        (tasks.throw, tasks.BadStr, "BadStr"),
        (tasks.throw, tasks.BadExit, "BadExit"),
        (tasks.throw, tasks.BadReduce, "BadReduce"),
        (tasks.long_words, 5_000_000, "xxxxxxxx"),
        (tasks.recurse, 0, "RecursionError"),
        (tasks.raise_with_a_bad_log, "the reason", "ValueError: the reason"),
        (tasks.raise_with_a_blocked_log, "the reason", "ValueError: the reason"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_it_raises(pool: MakePool, initializer: Any, argument: Any, words: str) -> None:
    """Each future fails with the words of what was raised, soon, whatever that is; and so does submit."""
    executor = pool(2, initializer=initializer, initargs=(argument,))
    began = monotonic()
    for future in submitted_before_it_breaks(executor, 3):
        error = error_of(future)
        assert type(error) is WorkerStartError
        assert words in str(error)
    assert monotonic() - began < BREAK_S
    is_broken(executor, words.partition(":")[0])


FULL = """
import os, sys, time
sys.path.insert(0, {root!r})
from safepool import SafePoolExecutor
from tests.faults import tasks

reader, writer = os.pipe()
os.set_blocking(writer, False)
try:
    while True:
        os.write(writer, bytes(4096))
except BlockingIOError:
    pass
os.set_blocking(writer, True)
out = os.dup(1)
os.dup2(writer, 1)
os.dup2(writer, 2)
executor = SafePoolExecutor(1, initializer=tasks.throw, initargs=(ValueError, "the reason"))
error = executor.submit(pow, 2, 3).exception(15)
os.write(out, f"{{type(error).__name__}} {{'ValueError: the reason' in str(error)}}".encode())
executor.kill_workers()
executor.shutdown()
os._exit(0)
"""


def test_it_raises_and_nobody_reads_the_log(tmp_path: Path) -> None:
    """stdout and stderr are pipes that are full: the words of the initializer reach the future all the same."""
    script = tmp_path / "script.py"
    script.write_text(FULL.format(root=str(ROOT)))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=LIMIT_S, check=False, env=environment
    )
    assert (done.stdout, done.returncode) == ("WorkerStartError True", 0)


def test_it_dies_only_now_and_then(pool: MakePool, context: Any, tmp_path: Path) -> None:
    """It crashes in the first worker only: the pool recovers, now and at a later death."""
    executor = pool(1, context, tasks.end_when_started, ("SIGSEGV", tmp_path / "log", 1))
    assert executor.submit(plain.echo, 1).result(LIMIT_S) == 1
    os.remove(tmp_path / "log")
    pid = executor.submit(os.getpid).result(LIMIT_S)
    os.kill(pid, 9)
    assert executor.submit(os.getpid).result(LIMIT_S) != pid
    assert is_usable(executor)


def test_it_fails_in_a_later_worker(pool: MakePool, tmp_path: Path) -> None:
    """It worked once and raises in the successor of a dead worker: the pool says so, with its words."""
    (tmp_path / "good").touch()
    executor = pool(1, initializer=succeed_if, initargs=(tmp_path / "good",))
    assert is_usable(executor)
    (tmp_path / "good").unlink()
    error_of(executor.submit(os._exit, 1))
    until(lambda: executor._broken, "the pool says that it is broken")
    is_broken(executor, "not good any more")


def succeed_if(good: Path) -> None:
    if not good.exists():
        raise ValueError("not good any more")


@pytest.mark.parametrize("bad", [threading.Lock(), plain.Unsendable(ValueError("no")), plain.Unsendable(SystemExit(3))])
def test_its_arguments_cannot_be_pickled(pool: MakePool, bad: Any) -> None:
    """The futures say so; and a shutdown at once does not hang."""
    executor = pool(2, initializer=plain.echo, initargs=(bad,))
    for future in submitted_before_it_breaks(executor, 3):
        error = error_of(future)
        assert type(error) is WorkerStartError
    executor.shutdown()


@pytest.mark.parametrize("how", ["exit", "SIGKILL"])
def test_its_arguments_end_the_worker_that_reads_them(pool: MakePool, how: str) -> None:
    """Arguments that kill whoever unpickles them: the pool breaks in bounded time and says how the workers ended."""
    executor = pool(1, initializer=plain.echo, initargs=(tasks.EndsWhenRead(how),))
    error = error_of(executor.submit(plain.echo, 1), BREAK_S)
    assert type(error) is WorkerStartError
    assert "exit code" in str(error)


# ---------------------------------------------------------------- that hang


@pytest.mark.parametrize("how", ["sleeps", "holds the GIL", "stopped"])
def test_it_hangs(pool: MakePool, context: Any, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task with a deadline is over then, a cancelled one at once; shutdown gives a grace, and they are gone."""
    monkeypatch.setattr(_seats, "RETIRE_GRACE_S", 0.5)
    initializer: tuple[Any, tuple[Any, ...]] = {
        "sleeps": (tasks.wait_for_ever, ()),
        "holds the GIL": (plain.hold_the_gil, ()),
        "stopped": (tasks.end, ("SIGSTOP",)),
    }[how]
    executor = pool(2, context, *initializer)
    began = monotonic()
    late = executor.options(deadline=0.5).submit(plain.echo, 1)
    unwanted = executor.submit(plain.echo, 2)
    assert unwanted.cancel()
    error = error_of(late)
    assert type(error) is TaskTimeout
    assert error.limit == "deadline"
    executor.shutdown()
    assert monotonic() - began < 0.5 + 2 + 2 * SLACK_S
    assert not executor._processes


@pytest.mark.parametrize("verb", ["terminate_workers", "kill_workers"])
def test_it_hangs_and_the_workers_are_ended(pool: MakePool, verb: str, tmp_path: Path) -> None:
    """Ending the workers does not wait for an initializer, and all tasks are done."""
    executor = pool(1, initializer=tasks.wait_for_ever, initargs=(tmp_path / "ready",))
    futures = [executor.submit(plain.echo, n) for n in range(3)]
    executor.shutdown(wait=False)
    until((tmp_path / "ready").exists, "it hangs")
    began = monotonic()
    getattr(executor, verb)()
    until(lambda: all(future.done() for future in futures), "they are done", 1)
    executor.shutdown()
    assert monotonic() - began < 1 + SLACK_S


def test_it_hangs_in_the_successor_only(pool: MakePool, tmp_path: Path) -> None:
    """While the successor of a dead worker is stuck in its initializer, the other worker does all the work."""
    executor = pool(2, initializer=hang_after, initargs=(tmp_path / "log", 2))
    both = [executor.submit(plain.nap, 0.3, n) for n in range(2)]
    assert [future.result(LIMIT_S) for future in both] == [0, 1]
    error_of(executor.submit(os._exit, 1))
    assert [executor.submit(plain.echo, n).result(LIMIT_S) for n in range(20)] == list(range(20))
    executor.shutdown()


def hang_after(log: Path, times: int) -> None:
    plain.note(log, os.getpid())
    if len(plain.noted(log)) > times:
        tasks.wait_for_ever()


# ---------------------------------------------------------------- that leave things


def test_it_starts_a_thread_that_stays(pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that is no daemon keeps its worker from ending, but not the pool."""
    monkeypatch.setattr(_seats, "RETIRE_GRACE_S", 0.5)
    executor = pool(2, initializer=tasks.start_a_thread)
    assert is_usable(executor)
    began = monotonic()
    executor.shutdown()
    assert monotonic() - began < 0.5 + 2 + SLACK_S
    assert not executor._processes


def test_its_worker_cannot_retire(pool: MakePool) -> None:
    """The same when workers retire: the tasks behind them wait less than a second for each."""
    executor = pool(1, initializer=tasks.start_a_thread, max_tasks_per_child=1)
    began = monotonic()
    assert [executor.submit(plain.echo, n).result(LIMIT_S) for n in range(3)] == [0, 1, 2]
    assert monotonic() - began < 2 * (1 + SLACK_S)


def test_it_closes_the_channel(pool: MakePool, context: Any) -> None:
    """Nobody can work in such a worker: the pool breaks in bounded time."""
    executor = pool(1, context, os.closerange, (3, 1 << 12))
    assert type(error_of(executor.submit(plain.echo, 1), BREAK_S)) is WorkerStartError
    assert executor._broken


@pytest.mark.parametrize("kind", ["SIGTERM", "SIGCHLD"])
def test_it_changes_signals(pool: MakePool, kind: str) -> None:
    """A worker that ignores SIGTERM, or reaps by itself, is ended and told as ever."""
    executor = pool(1, initializer=ignore, initargs=(kind,))
    assert is_usable(executor)
    pid = executor.submit(os.getpid).result(LIMIT_S)
    assert isinstance(error_of(executor.options(timeout=0.3).submit(plain.nap, LIMIT_S)), TaskTimeout)
    assert not psutil.pid_exists(pid)
    began = monotonic()
    executor.terminate_workers()
    executor.shutdown()
    assert monotonic() - began < _seats.TERM_GRACE_S + 2 + SLACK_S


def ignore(name: str) -> None:
    import signal

    signal.signal(getattr(signal, name), signal.SIG_IGN)
