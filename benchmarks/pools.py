"""The pools that are measured behind one face, which only renames; what a pool does not offer is ``NotOffered``."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from time import sleep
from types import MappingProxyType
from typing import Any, NamedTuple

LIMIT_S = 60.0  # for anything that a measurement waits for

STOCK, OURS, PEBBLE = "stock", "safepool", "pebble"
#: Name in the table -> distribution; None: part of Python.
POOLS: dict[str, str | None] = {
    STOCK: None,
    OURS: "safepool",
    "loky": "loky",
    PEBBLE: "pebble",
    "deadpool": "deadpool-executor",
    "mp.Pool": None,
    "billiard": "billiard",
    "mpire": "mpire",
}
STARTS = ("default", "fork", "spawn", "forkserver")
TAKES_START = (STOCK, OURS, "loky", "pebble", "deadpool", "mp.Pool", "mpire")


def nap(seconds: float) -> None:
    """Whoever has run it has this module, too."""
    sleep(seconds)


def nothing(number: int) -> int:
    """The no-op task."""
    return number


class NotOffered(Exception):
    """This pool has no such feature, so the row does not apply to it."""


class Wanted(NamedTuple):
    """What a row wants of a new pool; ``nested``: its tasks will open pools."""

    workers: int
    start: str = "default"
    initializer: Callable[..., object] | None = None
    initargs: tuple[Any, ...] = ()
    max_tasks: int | None = None
    nested: bool = False

    def context(self) -> Any:
        """The start context; None for the pool's own choice."""
        return None if self.start == "default" else multiprocessing.get_context(self.start)


class Pool:
    """What the rows may ask of a pool.

    ``post`` and ``answer`` are the pool's own way to submit and to wait, with a handle of its own, so that no adapter
    of ours is measured; ``submit`` returns a future in any case.  ``died`` and ``timed_out`` are the errors that it
    documents for a dead worker and a limit; ``finders`` the ways to wait for whatever is done next.  ``most_queued``:
    while so many tasks wait its ``submit`` does, too.
    """

    most_queued: int | None = None
    died: tuple[type[BaseException], ...] = (BrokenProcessPool,)
    timed_out: tuple[type[BaseException], ...] = (TimeoutError,)
    finders: Mapping[str, Callable[..., Any]] = MappingProxyType({"the stdlib's": as_completed})

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        raise NotImplementedError

    def post(self, fn: Callable[..., Any], /, *args: Any) -> Any:
        return self.submit(fn, *args)

    def answer(self, handle: Any) -> Any:
        return handle.result(LIMIT_S)

    def map(self, fn: Callable[[Any], Any], items: Iterable[Any], chunksize: int | None = None) -> Iterable[Any]:
        """The answers in their order; ``chunksize`` None: the pool's own default."""
        raise NotOffered("no map")

    def limited(self, seconds: float, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        """Submit under a time limit."""
        raise NotOffered("no time limits")

    def shutdown(self) -> None:
        """Finish what was submitted, end everything, and then return."""
        raise NotImplementedError

    def drop_queue(self) -> None:
        """Return at once; cancel what waits, and finish what runs."""
        raise NotOffered("no shutdown that cancels what waits and finishes what runs")

    def kill(self) -> None:
        """End everything now."""
        raise NotOffered("no way to kill it")

    def end(self) -> None:
        """The hardest end that it has."""
        self.kill()

    def block(self) -> AbstractContextManager[Any]:
        """What a user writes behind ``with``."""
        raise NotImplementedError


def _chunks(chunksize: int | None) -> dict[str, int]:
    return {} if chunksize is None else {"chunksize": chunksize}


class ExecutorPool(Pool):
    """A subclass of ``concurrent.futures.Executor`` with the stdlib's ``shutdown``."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        # Itself: one more call would be measured with it.
        self.submit = self.post = executor.submit  # type: ignore[method-assign]

    def map(self, fn: Callable[[Any], Any], items: Iterable[Any], chunksize: int | None = None) -> Iterable[Any]:
        found: Iterator[Any] = self._executor.map(fn, items, **_chunks(chunksize))
        return found

    def shutdown(self) -> None:
        self._executor.shutdown()

    def drop_queue(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def block(self) -> AbstractContextManager[Any]:
        executor: AbstractContextManager[Any] = self._executor
        return executor


class _Stock(ExecutorPool):
    def __init__(self, wanted: Wanted) -> None:
        from concurrent.futures import ProcessPoolExecutor

        if wanted.max_tasks and wanted.start == "fork":
            raise NotOffered("max_tasks_per_child is not for fork")
        workers, most = wanted.workers, wanted.max_tasks
        super().__init__(
            ProcessPoolExecutor(
                workers, wanted.context(), wanted.initializer, wanted.initargs, max_tasks_per_child=most
            )
        )

    def kill(self) -> None:
        if not hasattr(self._executor, "kill_workers"):
            raise NotOffered("kill_workers is new in Python 3.14")
        self._executor.kill_workers()

    def end(self) -> None:
        try:
            self.kill()
        except NotOffered:
            self._executor.shutdown(cancel_futures=True)


class _Ours(ExecutorPool):
    def __init__(self, wanted: Wanted) -> None:
        import safepool

        if wanted.max_tasks and wanted.start == "fork":
            raise NotOffered("max_tasks_per_child is not for fork")
        self.died = (safepool.WorkerDied,)
        self.timed_out = (safepool.TaskTimeout,)
        self.finders = {**Pool.finders, "its own": safepool.as_completed}
        workers, most = wanted.workers, wanted.max_tasks
        super().__init__(
            safepool.SafePoolExecutor(
                workers, wanted.context(), wanted.initializer, wanted.initargs, max_tasks_per_child=most
            )
        )

    def limited(self, seconds: float, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        future: Future[Any] = self._executor.options(timeout=seconds).submit(fn, *args)
        return future

    def kill(self) -> None:
        self._executor.kill_workers()


class _Loky(ExecutorPool):
    def __init__(self, wanted: Wanted) -> None:
        from loky import ProcessPoolExecutor
        from loky.backend import get_context

        if wanted.max_tasks:
            raise NotOffered("no max_tasks_per_child")
        context = None if wanted.start == "default" else get_context(wanted.start)
        super().__init__(
            ProcessPoolExecutor(
                wanted.workers, context=context, initializer=wanted.initializer, initargs=wanted.initargs
            )
        )

    def drop_queue(self) -> None:
        raise NotOffered("its shutdown has no cancel_futures")

    def kill(self) -> None:
        self._executor.shutdown(wait=True, kill_workers=True)


class _Deadpool(ExecutorPool):
    most_queued = 1000

    def __init__(self, wanted: Wanted) -> None:
        import deadpool

        self.died = (deadpool.ProcessError,)
        self.timed_out = (deadpool.TimeoutError,)
        executor = deadpool.Deadpool(
            wanted.workers,
            mp_context=wanted.context(),
            initializer=wanted.initializer,
            initargs=wanted.initargs,
            max_tasks_per_child=wanted.max_tasks,
            daemon=not wanted.nested,  # its documentation's answer to pools in tasks
        )
        super().__init__(executor)

    def limited(self, seconds: float, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        future: Future[Any] = self._executor.submit(fn, *args, deadpool_timeout=seconds)
        return future

    def kill(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)  # kills what runs, too


class _Pebble(Pool):
    def __init__(self, wanted: Wanted) -> None:
        import pebble

        self.died = (pebble.ProcessExpired,)
        context = {} if wanted.start == "default" else {"context": wanted.context()}
        self._pool: Any = pebble.ProcessPool(
            wanted.workers, wanted.max_tasks or 0, wanted.initializer, wanted.initargs, **context
        )

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        future: Future[Any] = self._pool.schedule(fn, args)
        return future

    def map(self, fn: Callable[[Any], Any], items: Iterable[Any], chunksize: int | None = None) -> Iterable[Any]:
        found: Iterator[Any] = self._pool.map(fn, items, **_chunks(chunksize)).result(LIMIT_S)
        return found

    def limited(self, seconds: float, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        future: Future[Any] = self._pool.schedule(fn, args, timeout=seconds)
        return future

    def shutdown(self) -> None:
        self._pool.close()
        self._pool.join()

    def kill(self) -> None:
        self._pool.stop()
        self._pool.join()

    def block(self) -> AbstractContextManager[Any]:
        pool: AbstractContextManager[Any] = self._pool
        return pool


class _Callbacks(Pool):
    """A pool in the manner of ``multiprocessing.Pool``: answers come to callbacks, here those of a future."""

    _pool: Any

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        return self._apply(fn, args)

    def post(self, fn: Callable[..., Any], /, *args: Any) -> Any:
        return self._pool.apply_async(fn, args)

    def answer(self, handle: Any) -> Any:
        return handle.get(LIMIT_S)

    def map(self, fn: Callable[[Any], Any], items: Iterable[Any], chunksize: int | None = None) -> Iterable[Any]:
        found: list[Any] = self._pool.map(fn, items, **_chunks(chunksize))
        return found

    def _apply(self, fn: Callable[..., Any], args: tuple[Any, ...], **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        fail = functools.partial(_fail, future)
        self._pool.apply_async(fn, args, callback=future.set_result, error_callback=fail, **options)
        return future

    def shutdown(self) -> None:
        self._pool.close()
        self._pool.join()

    def kill(self) -> None:
        self._pool.terminate()
        self._pool.join()

    def block(self) -> AbstractContextManager[Any]:
        pool: AbstractContextManager[Any] = self._pool
        return pool


def _fail(future: Future[Any], error: Any) -> None:
    future.set_exception(getattr(error, "exception", error))  # billiard puts it into an ExceptionInfo


class _MpPool(_Callbacks):
    died = ()  # it never notices

    def __init__(self, wanted: Wanted) -> None:
        context = wanted.context() or multiprocessing
        self._pool = context.Pool(wanted.workers, wanted.initializer, wanted.initargs, wanted.max_tasks)


class _Billiard(_Callbacks):
    def __init__(self, wanted: Wanted) -> None:
        import billiard
        from billiard.exceptions import TimeLimitExceeded, WorkerLostError

        self.died = (WorkerLostError,)
        self.timed_out = (TimeLimitExceeded,)
        self._pool = billiard.Pool(
            wanted.workers,
            wanted.initializer,
            wanted.initargs,
            wanted.max_tasks,
            lost_worker_timeout=1.0,  # by default it tells of a death after ten seconds
        )

    def limited(self, seconds: float, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        return self._apply(fn, args, timeout=seconds)


class _Mpire(_Callbacks):
    died = (RuntimeError,)

    def __init__(self, wanted: Wanted) -> None:
        from mpire import WorkerPool

        if wanted.max_tasks:
            raise NotOffered("worker_lifespan is for map only")
        method: dict[str, Any] = {} if wanted.start == "default" else {"start_method": wanted.start}
        self._pool = WorkerPool(wanted.workers, daemon=not wanted.nested, **method)
        start = functools.partial(wanted.initializer, *wanted.initargs) if wanted.initializer else None
        self._init = {"worker_init": start}

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        return self._apply(fn, args, **self._init)

    def map(self, fn: Callable[[Any], Any], items: Iterable[Any], chunksize: int | None = None) -> Iterable[Any]:
        found: list[Any] = self._pool.map(fn, items, chunk_size=chunksize)
        return found

    def limited(self, seconds: float, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        return self._apply(fn, args, task_timeout=seconds, **self._init)

    def shutdown(self) -> None:
        self._pool.stop_and_join()

    def kill(self) -> None:
        self._pool.terminate()


_CLASSES: dict[str, Callable[[Wanted], Pool]] = {
    STOCK: _Stock,
    OURS: _Ours,
    "loky": _Loky,
    PEBBLE: _Pebble,
    "deadpool": _Deadpool,
    "mp.Pool": _MpPool,
    "billiard": _Billiard,
    "mpire": _Mpire,
}


def open_pool(name: str, workers: int, start: str = "default", **options: Any) -> Pool:
    """A new pool; the options are those of ``Wanted``.  Raises ``NotOffered`` if it cannot be had like this."""
    if start != "default" and name not in TAKES_START:
        raise NotOffered("it takes no start method")
    return _CLASSES[name](Wanted(workers, start, **options))
