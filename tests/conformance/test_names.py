"""Whatever the stdlib's class offers is ours: no name leads into its machinery, and what the wild reads is there."""

from __future__ import annotations

import inspect
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

import pytest

from safepool import SafePoolExecutor
from tests.pool import tasks
from tests.support import LIMIT_S, is_gone, until

MakePool = Callable[..., SafePoolExecutor]
#: Newer than the oldest Python that is supported, and offered on all.
NEWER = {"terminate_workers", "kill_workers"}
SPECIAL = {"__init__", "__enter__", "__exit__"}


@pytest.mark.parametrize("name", sorted({n for n in dir(ProcessPoolExecutor) if n[0] != "_"} | NEWER | SPECIAL))
def test_every_name_is_ours(name: str) -> None:
    """A method of the stdlib's class that we forgot to write would run its machinery, which is not there."""
    owner = next(cls for cls in SafePoolExecutor.__mro__ if name in vars(cls))
    # ``__enter__`` returns self, in the base class of every executor.
    assert owner.__module__.startswith("safepool") or (owner, name) == (Executor, "__enter__")


@pytest.mark.parametrize("name", ["submit", "map", "shutdown", "__init__"])
def test_every_signature_takes_what_the_stdlib_takes(name: str) -> None:
    """The parameters of the stdlib, in its order and of its kind; what is new can be given by keyword only."""
    theirs = dict(inspect.signature(getattr(ProcessPoolExecutor, name)).parameters)
    ours = inspect.signature(getattr(SafePoolExecutor, name)).parameters
    assert [(n, p.kind) for n, p in ours.items() if n in theirs] == [(n, p.kind) for n, p in theirs.items()]
    assert all(p.default == ours[n].default for n, p in theirs.items())
    new = [p for n, p in ours.items() if n not in theirs]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in new)


def test_what_the_wild_reads_of_a_new_pool(pool: MakePool) -> None:
    """Before the first task: sizes and contexts are told, nothing runs, nothing is broken."""
    context = multiprocessing.get_context("spawn")
    executor = pool(3, context)
    assert executor._max_workers == 3
    assert executor._mp_context is context
    assert executor._broken is False
    assert executor._shutdown_thread is False
    assert executor._executor_manager_thread is None
    assert dict(executor._processes) == {}
    assert executor._call_queue.empty()


def test_what_the_wild_reads_of_a_pool_at_work(pool: MakePool, context: Any) -> None:
    """Right after ``submit`` the processes are there, as multiprocessing shows them, by their pids."""
    executor = pool(2, context)
    future = executor.submit(tasks.echo, 1)
    processes = executor._processes
    assert len(processes) == (2 if context is not None and context.get_start_method() == "fork" else 1)
    for pid, process in processes.items():
        assert process.pid == pid
        assert process.is_alive()
        assert process.exitcode is None
        assert process.sentinel >= 0
    assert future.result(LIMIT_S) == 1
    assert isinstance(executor._executor_manager_thread, threading.Thread)


def test_the_processes_that_are_found_can_be_killed(pool: MakePool, context: Any) -> None:
    """Programs that end a pool by killing its processes end the tasks in them, and no other."""
    executor = pool(2, context)
    future = executor.submit(tasks.nap, LIMIT_S)
    until(future.running, "it runs")
    held = dict(executor._processes)
    for process in held.values():
        process.kill()
    for process in held.values():
        process.join(LIMIT_S)
    assert future.exception(LIMIT_S) is not None
    until(lambda: all(is_gone(pid) for pid in held), "they are gone")
    assert executor.submit(tasks.echo, 2).result(LIMIT_S) == 2


def test_what_the_wild_reads_of_a_pool_that_is_over(pool: MakePool) -> None:
    """After the shutdown the mapping that somebody holds is still a mapping, and everything has ended."""
    executor = pool(2)
    executor.submit(tasks.echo, 1).result(LIMIT_S)
    processes, thread, queue = executor._processes, executor._executor_manager_thread, executor._call_queue
    executor.shutdown()
    assert thread is not None
    thread.join(LIMIT_S)
    assert not thread.is_alive()
    queue.close()
    queue.join_thread()
    assert list(processes.values()) == []
    assert executor._shutdown_thread is True
