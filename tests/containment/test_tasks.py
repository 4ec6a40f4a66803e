"""What a pool does about what a task leaves while the program goes on: it ends it, says so, or leaves it, as asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import sleep
from typing import Any

import psutil
import pytest

import safepool
from benchmarks.families import GONE_S, READY_S, Watch, describe, end_holders, holders
from benchmarks.family_shapes import (
    COMMAND,
    LIFE_S,
    SHAPES,
    exit_codes,
    exit_codes_of_threads,
    leave,
    leave_on_purpose,
    leave_unwaited,
)
from safepool import SafePoolExecutor, WorkerDied
from tests.support import LIMIT_S, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process adopt orphans")

STAYS_S = 0.3  # it is looked at for so long, if it must stay
Make = Callable[..., SafePoolExecutor]
kept: list[subprocess.Popen[bytes]] = []  # in a worker, from one task to the next


class Family:
    """One FIFO, and who holds it open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        self._watch = Watch()
        self._watch.family("family", path)

    def __str__(self) -> str:
        return str(self.path)

    def await_members(self, shape: str) -> None:
        assert self._watch.until(lambda: self._watch.ready >= SHAPES[shape].members, READY_S), "it was not made"

    def is_gone_within(self, seconds: float) -> bool:
        return self._watch.until(lambda: self._watch.is_gone("family"), seconds)

    def close(self) -> None:
        end_holders(self.path)
        self._watch.close()


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    """A FIFO for one family, which is ended with the test if the pool has not done that."""
    family = Family(tmp_path / "fifo")
    yield family
    family.close()


# ------------------------------------------------------------- what is told


@pytest.mark.parametrize("shape", ["child", "cleared"])
def test_a_future_tells_what_its_task_left(pool: Make, tmp_path: Path, family: Family, shape: str) -> None:
    """``future.leftovers`` names each process that was left, by pid and command line, and the task that left it."""
    future = pool(1).options(name="untidy").submit(leave, shape, str(family), str(tmp_path / "go"))
    family.await_members(shape)  # who is just executing another program has no command line
    (tmp_path / "go").touch()
    worker = future.result(LIMIT_S)
    assert family.is_gone_within(GONE_S)
    (left,) = future.leftovers
    assert left.pid not in (worker, os.getpid())
    assert not psutil.pid_exists(left.pid)
    assert ("family_shapes.py" if shape == "cleared" else "safepool") in left.command
    assert "untidy" in left.task


def test_a_tidy_task_has_left_nothing(pool: Make) -> None:
    """A task that waits for what it starts has no leftovers, and neither has one that starts nothing."""
    executor = pool(1)
    for future in (executor.submit(exit_codes, 2), executor.submit(pow, 2, 5)):
        future.result(LIMIT_S)
        assert future.leftovers == ()


def test_a_worker_goes_on_after_leftovers(pool: Make, tmp_path: Path) -> None:
    """What a task leaves costs the worker nothing: the same process runs the next task, ten times over."""
    executor = pool(1)
    workers = set()
    for number in range(10):
        family = Family(tmp_path / f"fifo-{number}")
        try:
            workers.add(executor.submit(leave, "daemon", str(family)).result(LIMIT_S))
            assert family.is_gone_within(GONE_S)
        finally:
            family.close()
    assert len(workers) == 1


def test_what_a_neighbour_has_started_stays(pool: Make, tmp_path: Path) -> None:
    """The end of one task ends nothing of a task that still runs, in the same pool or in another one."""
    one, other = pool(2), pool(1)
    mine, its, theirs = (Family(tmp_path / name) for name in ("mine", "its", "theirs"))
    never, go = str(tmp_path / "never"), tmp_path / "go"
    try:
        running = [one.submit(leave, "cleared", str(its), str(go)), other.submit(leave, "cleared", str(theirs), never)]
        its.await_members("cleared")
        theirs.await_members("cleared")
        one.submit(leave, "cleared", str(mine)).result(LIMIT_S)
        assert mine.is_gone_within(GONE_S)
        assert not its.is_gone_within(STAYS_S)
        assert not theirs.is_gone_within(0)
        go.touch()
        running[0].result(LIMIT_S)
        assert its.is_gone_within(GONE_S)
        assert not theirs.is_gone_within(STAYS_S)
    finally:
        other.kill_workers()
        for family in (mine, its, theirs):
            family.close()


# -------------------------------------------------------- what is left on purpose


def test_what_is_left_on_purpose_stays(pool: Make, family: Family) -> None:
    """What a task starts within ``leave_running()`` outlives the task, its worker and the pool, and is no leftover."""
    executor = pool(1)
    future = executor.submit(leave_on_purpose, str(family))
    worker = future.result(LIMIT_S)
    assert future.leftovers == ()
    assert not family.is_gone_within(STAYS_S)
    os.kill(worker, signal.SIGKILL)
    until(lambda: executor.submit(os.getpid).exception(LIMIT_S) is None, "there is another worker")
    executor.shutdown()
    assert not family.is_gone_within(STAYS_S)
    assert len(holders(family.path)) == 1, describe(holders(family.path))


@pytest.mark.parametrize("shape", ["child", "cleared"])
def test_leftovers_can_be_reported_only(pool: Make, family: Family, shape: str) -> None:
    """With ``leftovers="report"`` they are told and live on, until their worker ends."""
    executor = pool(1, leftovers="report")
    future = executor.submit(leave, shape, str(family))
    future.result(LIMIT_S)
    family.await_members(shape)
    assert not family.is_gone_within(STAYS_S)
    assert [left.pid for left in future.leftovers] == holders(family.path)
    executor.shutdown()
    assert family.is_gone_within(GONE_S)


@pytest.mark.parametrize("shape", ["child", "cleared"])
def test_leftovers_can_be_left(pool: Make, family: Family, shape: str) -> None:
    """With ``leftovers="leave"`` they live on, untold, after the task and after the pool."""
    executor = pool(1, leftovers="leave")
    future = executor.submit(leave, shape, str(family))
    future.result(LIMIT_S)
    assert future.leftovers == ()
    executor.shutdown()
    family.await_members(shape)
    assert not family.is_gone_within(STAYS_S)


def test_a_wrong_choice_is_refused() -> None:
    """``leftovers`` takes one of three words."""
    with pytest.raises((TypeError, ValueError), match="leftovers"):
        SafePoolExecutor(1, leftovers="eat")  # type: ignore[arg-type]


# ---------------------------------------------------------- zombies, exit codes


def _zombies() -> list[int]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_unwaited_children_leave_no_zombie(pool: Make) -> None:
    """A task that leaves 50 children that it did not wait for leaves no zombie, and its worker goes on."""
    executor = pool(1)
    worker = executor.submit(leave_unwaited).result(LIMIT_S)
    until(lambda: not _zombies(), "there is no zombie", GONE_S)
    assert executor.submit(os.getpid).result(LIMIT_S) == worker


def test_a_killed_worker_leaves_no_zombie(pool: Make, tmp_path: Path) -> None:
    """Neither do the unwaited children of a worker that is killed, nor the worker itself."""
    executor = pool(1)
    future = executor.submit(_leave_unwaited_and_wait, str(tmp_path / "there"))
    until((tmp_path / "there").exists, "they are there")
    assert future.worker_pid is not None
    os.kill(future.worker_pid, signal.SIGKILL)
    assert isinstance(future.exception(LIMIT_S), WorkerDied)
    until(lambda: not _zombies(), "there is no zombie", GONE_S)


def _leave_unwaited_and_wait(there: str) -> None:
    leave_unwaited()
    Path(there).touch()
    sleep(LIFE_S)


@pytest.mark.parametrize("task", [exit_codes, exit_codes_of_threads])
def test_a_task_sees_the_exit_codes_of_its_programs(pool: Make, tmp_path: Path, task: Any) -> None:
    """Nobody else waits for them, whatever was left before, and while a neighbour's leftovers are ended."""
    executor = pool(2)
    for number in range(3):
        family = Family(tmp_path / f"fifo-{number}")
        try:
            asked = [executor.submit(task, 12) for _ in range(2)]
            executor.submit(leave, "deaf", str(family)).result(LIMIT_S)
            assert [future.result(LIMIT_S) for future in asked] == [[*range(12)]] * 2
            assert family.is_gone_within(GONE_S)
        finally:
            family.close()


def test_a_program_that_was_left_on_purpose_can_be_waited_for_later(pool: Make) -> None:
    """A Popen that is kept from one task to the next tells the right exit code there."""
    executor = pool(1)
    assert executor.submit(_start, ["/bin/sh", "-c", "sleep 0.2; exit 7"], True).result(LIMIT_S) is None
    assert executor.submit(pow, 2, 5).result(LIMIT_S) == 32
    assert executor.submit(_wait_for_it).result(LIMIT_S) == 7


def test_a_program_that_was_ended_does_not_seem_to_have_succeeded(pool: Make) -> None:
    """A Popen whose process was ended as a leftover says so to the next task: its exit code is not 0."""
    executor = pool(1)
    future = executor.submit(_start, [*COMMAND, "wait"], False)
    assert future.result(LIMIT_S) is None
    assert len(future.leftovers) == 1
    assert executor.submit(_wait_for_it).result(LIMIT_S) == -signal.SIGKILL


def _start(command: list[str], on_purpose: bool) -> None:
    if on_purpose:
        with safepool.leave_running():
            kept.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
    else:
        kept.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))


def _wait_for_it() -> int:
    return kept.pop().wait(LIFE_S)


def adopt_and_leave() -> int:
    """Have this worker adopt the orphans of its family, and leave a child with a child."""
    import ctypes

    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)
    shell = psutil.Process(subprocess.Popen(["sh", "-c", "sleep 60 & sleep 60 & wait"]).pid)
    until(lambda: len(shell.children()) == 2, "the shell has started both")
    return os.getpid()


def test_a_worker_that_adopts_orphans_ends_them_too(pool: Make, context: Any) -> None:
    """A task called ``prctl``: what it left falls to its worker, generation by generation, not to the keeper."""
    executor = pool(1, context)
    future = executor.submit(adopt_and_leave)
    worker = psutil.Process(future.result(LIMIT_S))
    assert worker.children(recursive=True) == []
    assert len(future.leftovers) == 3
    assert executor.submit(os.getpid).result(LIMIT_S) == worker.pid
