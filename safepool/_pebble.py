"""Pebble's words on our pool: it maps one to the other, and decides nothing.

What differs on purpose: no death of a worker breaks the pool, a task that ends its process with exit code 0 fails as
any other death does, and Pebble's default context is our safe start, not a fork of the program.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures._base import CANCELLED_AND_NOTIFIED
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import pebble
from pebble.common import Result, ResultStatus
from pebble.common import process as theirs
from pebble.pool.base_pool import map_results

from ._link import Answer
from ._log import WARNING, tell
from .errors import TaskTimeout, WorkerDied
from .executor import SafePoolExecutor
from .future import SafeFuture

USED_UP_S = 0.001  # what a limit that is over before it begins amounts to


class ProcessExpired(WorkerDied, pebble.ProcessExpired):  # type: ignore[misc]
    """The worker that ran this task ended before it answered: ``WorkerDied``, and what Pebble's users catch."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.args,), self.__dict__


def _rebuild(args: tuple[Any, ...]) -> ProcessExpired:
    made: ProcessExpired = OSError.__new__(ProcessExpired, *args)  # it is that, whatever comes first in its bases
    made.args = args
    return made


class TaskTimedOut(TaskTimeout):
    """``TaskTimeout``; its second argument is the limit in seconds, as Pebble has it."""

    def __str__(self) -> str:
        return str(self.args[0])


class ProcessFuture(SafeFuture, pebble.ProcessFuture):  # type: ignore[misc]
    """A future of ours that is cancelled as Pebble's is: at once, and a task that runs is killed."""

    def cancel(self) -> bool:
        """False: it is done already."""
        self._withhold()
        if not self._end_for_all(CANCELLED_AND_NOTIFIED):
            return self.cancelled()
        self._home.cancel(self._task, kill=True)
        self._call_callbacks()
        return True

    def failed(self, error: BaseException) -> None:
        facts = vars(error)
        if isinstance(error, WorkerDied):
            error = ProcessExpired(str(error), **facts)
        elif isinstance(error, TaskTimeout):
            error = TaskTimedOut(str(error), **facts)
            error.args = (*error.args, error.seconds)
        super().failed(error)

    def _unpickle(self, answer: Answer) -> tuple[Any, BaseException | None]:
        value, error = super()._unpickle(answer)
        if error is not None:
            with suppress(Exception):  # a frozen one, or one with __slots__
                error.traceback = answer.text.decode(errors="replace")  # type: ignore[attr-defined]
        return value, error


def class_with(executor: type[SafePoolExecutor]) -> type[pebble.ProcessPool]:
    """Pebble's ``ProcessPool`` on pools of the class ``executor``."""

    class Executor(executor):  # type: ignore[misc, valid-type]
        _future_class = ProcessFuture
        _finishes_at_exit = False

    class ProcessPool(_ProcessPool):
        _make = Executor

    ProcessPool.__doc__ = pebble.ProcessPool.__doc__
    ProcessPool.__module__ = pebble.ProcessPool.__module__
    ProcessPool.__qualname__ = "ProcessPool"
    return ProcessPool


def _without_trampoline(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Callable[..., Any], Any]:
    """``@concurrent.process(pool=...)`` sends a name, for workers to look up in a script that ours do not have."""
    if function is getattr(theirs, "_trampoline", None):
        return theirs._registered_functions.get(args[0], function), args[2:]
    return function, args


def _one(function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
    """A chunk of one: what it raises is its future's error, and not told within a result."""
    return [Result(ResultStatus.SUCCESS, function(*args))]


class _ProcessPool(pebble.ProcessPool):  # type: ignore[misc]
    """``submit`` and ``__exit__`` are Pebble's own, which are made of what is here."""

    _make: type[SafePoolExecutor]

    def __init__(
        self,
        max_workers: int = multiprocessing.cpu_count(),
        max_tasks: int = 0,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        context: Any = multiprocessing,
    ) -> None:
        is_default = context is multiprocessing
        if max_tasks and not is_default and context.get_start_method(allow_none=False) == "fork":
            # Worker after worker cannot be forked from a program that has threads.
            tell(WARNING, "safepool: workers that are replaced after max_tasks=%d are not forked", max_tasks)
            is_default = True
        self._executor = self._make(
            max_workers,
            None if is_default else context,
            initializer,
            tuple(initargs or ()),
            max_tasks_per_child=max_tasks or None,
        )
        self._futures: WeakSet[ProcessFuture] = WeakSet()
        self._is_closed = False
        self._is_over = False

    def schedule(
        self,
        function: Callable[..., Any],
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> ProcessFuture:
        self._check_pool_status()
        function, args = _without_trampoline(function, tuple(args))
        timeout = max(timeout, USED_UP_S) if timeout else None
        policy_s = self._executor._options.timeout
        is_shorter = timeout and (policy_s is None or timeout < policy_s)
        target = self._executor.options(timeout=timeout) if is_shorter else self._executor
        future: Any = target.submit(function, *args, **(kwargs or {}))
        self._futures.add(future)
        return future  # type: ignore[no-any-return]

    def map(
        self, function: Callable[..., Any], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1
    ) -> Any:
        if chunksize != 1:
            return super().map(function, *iterables, timeout=timeout, chunksize=chunksize)
        self._check_pool_status()
        futures = [self.schedule(_one, args=(function, item), timeout=timeout) for item in zip(*iterables)]
        return map_results(pebble.ProcessMapFuture(futures), timeout)

    def _check_pool_status(self) -> None:
        if self._executor._broken:
            raise RuntimeError(f"Unexpected error within the Pool: {self._executor._broken}")
        if self._is_closed:
            raise RuntimeError("The Pool is not active")

    @property
    def active(self) -> bool:
        return not self._is_over and not self._executor._broken

    def close(self) -> None:
        self._is_closed = True
        self._executor.shutdown(wait=False)

    def stop(self) -> None:
        self._is_closed = self._is_over = True
        self._executor.shutdown(wait=False, cancel_futures=True)
        for future in tuple(self._futures):
            future.cancel()

    def join(self, timeout: float | None = None) -> None:
        if not self._is_closed and self._executor._executor_manager_thread is not None:
            raise RuntimeError("The Pool is still running")
        self._executor.shutdown(wait=False)
        if not self._executor._watchdog.join(timeout):
            raise TimeoutError("Tasks are still being executed")
        self._is_over = True
