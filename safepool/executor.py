"""Looks exactly like ``concurrent.futures``; posts to the watchdog and returns futures."""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import operator
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Executor, Future, process
from contextlib import suppress
from multiprocessing import util
from time import monotonic

from . import _os, _payload, _unpack
from ._call import likeness
from ._launch import launcher_of
from ._payload import Held
from ._stream import Stream, emptied
from ._watchdog import Watchdog
from ._words import exact, traceback_of
from ._worker import Setup
from .errors import PoolBroken
from .future import Kind, SafeFuture, blame, remote_traceback
from .policy import MAX_WINDOWS_WORKERS, LaunchPolicy, PoolPolicy, TaskOptions, as_preload, seconds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, Literal

    from ._watchdog import Observer
    from .policy import Isolation, OnLeftovers, OnWorkerDeath
    from .telling import PoolEvent

STREAM_FROM = 4  # items for each worker: so many are worth it
SLICED = frozenset({list, tuple, range})  # slices of these are the quickest chunks
_tasks = itertools.count(1)
_pools = itertools.count(1)


class _Submitter(Executor):
    """What a pool and a view of it have in common: ``submit`` and ``map`` under some task options."""

    _options: TaskOptions

    def _pool(self) -> SafePoolExecutor:
        raise NotImplementedError

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> SafeFuture:
        """Schedule ``fn(*args, **kwargs)`` and return its future.

        The call is pickled here and now, so it may be changed afterwards; an error of pickling arrives
        through the future.  Raises ``TypeError`` if ``fn`` is not callable, ``BrokenProcessPool`` if the
        pool is broken and ``RuntimeError`` if it is shut down.
        """
        return self._pool()._submit(self._options, fn, args, kwargs)

    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[Any]:
        """``fn`` over the items of ``iterables``, in their order, like the built-in ``map``.

        What has a length is taken at once, a generator item by item, while its first ones run already.
        ``timeout``: seconds from this call until the last result; ``chunksize``: items per task;
        ``buffersize``: take no more than so many tasks' items in advance (None: all, now).
        Raises ``TypeError`` or ``ValueError`` for wrong arguments; the iterator raises ``TimeoutError``,
        and the first error of a task.  Leaving the iterator, once it has begun, cancels what has not begun.
        """
        if not callable(fn):
            raise TypeError(f"fn must be callable; got {fn!r}")
        chunksize = _whole(chunksize, "chunksize")
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and (isinstance(buffersize, bool) or not isinstance(buffersize, int)):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        end = None if timeout is None else monotonic() + timeout
        has_one = len(iterables) == 1
        how = (_unpack.ONE if has_one else 0) | (_unpack.CHUNK if chunksize > 1 else 0)
        items: Iterable[Any] = iterables[0] if has_one else zip(*iterables)
        calls = iter(items)
        chunks: Iterator[Any] = iter(lambda: list(itertools.islice(calls, chunksize)), [])
        pool, options = self._pool(), self._options
        if buffersize is None and self._is_plain() and pool._has_streams() and all(map(_is_at_hand, iterables)):
            if type(items) in SLICED:  # (nobody can change them meanwhile: all are taken now)
                chunks = _slices(items, chunksize)
            found, are_plain = _taken_while_plain(calls if chunksize == 1 else chunks, chunksize, has_one=has_one)
            stream = pool._stream(options, fn, found, how) if are_plain else None
            if stream is not None:
                return stream.outcomes(end)
            if chunksize == 1:
                calls = iter(found)
            else:
                chunks = map(list, itertools.chain(found, chunks))
        if chunksize == 1:
            todo = (lambda call=call: self.submit(fn, *call) for call in (zip(calls) if has_one else calls))
            return _in_order(todo, end, buffersize)
        if self._is_plain():
            todo = (lambda chunk=chunk: pool._submit(options, fn, chunk, {}, chunk=how) for chunk in chunks)
        else:
            todo = (
                lambda chunk=chunk: self.submit(_run_chunk, fn, list(zip(chunk)) if has_one else chunk)
                for chunk in chunks
            )
        return _flat(_in_order(todo, end, buffersize))

    def _is_plain(self) -> bool:
        """A subclass, or somebody who shows progress, wants to see each submit, as with the stdlib's."""
        return getattr(self.submit, "__func__", None) is _Submitter.submit

    def options(self, **options: Any) -> PoolView:
        """This pool, under other task options: ``timeout``, ``deadline``, ``retry``, ``name``.

        ``pool.options(timeout=5).submit(fn, x)``; see ``TaskOptions``.  Raises ``TypeError`` or
        ``ValueError`` for an option that is unknown or wrong.
        """
        return PoolView(self._pool(), self._options.but(**options))

    def __exit__(self, kind: object, error: object, where: object) -> Literal[False]:
        """As ``shutdown()``; but after Ctrl-C what waits is cancelled, and what runs has two seconds.

        Ctrl-C reaches the whole foreground group: it ends the tasks of the stock pool, where ours are left to us.
        """
        watchdog = self._pool()._watchdog
        if isinstance(error, KeyboardInterrupt) and not watchdog.is_fork():
            self.shutdown(wait=False, cancel_futures=True)
            _end_within(EXIT_AFTER_ERROR_S, [watchdog])
        self.shutdown()
        return False


class SafePoolExecutor(_Submitter, process.ProcessPoolExecutor):
    """A process pool that cannot hang and in which one death costs one task.

    The first four arguments, ``max_tasks_per_child`` and all methods are those of
    ``concurrent.futures.ProcessPoolExecutor``, of which this is a subclass that uses none of its
    machinery.  What is new:

    * ``timeout``, ``deadline`` (seconds) and ``retry``: the defaults of every task, see ``TaskOptions``;
    * ``stall_timeout``: seconds in which no task of the pool begins or ends; then those that run are stopped as at
      their timeout, and the next ones begin;
    * ``on_worker_death``: ``"heal"`` replaces a dead worker and fails only what it ran; ``"break"`` breaks
      the pool, as the standard library does;
    * ``leftovers``: processes that a task leaves behind are ended when it ends (``"kill"``), only reported
      (``"report"``; both in the log and on ``future.leftovers``), or left until the pool's process ends
      (``"leave"``).  What the initializer starts lives as long as its worker; ``leave_running`` makes exceptions;
    * ``isolation``: ``"namespace"`` runs the workers in a Linux process namespace of their own, whose kernel
      ends all that is in it, whatever happens; tasks see other process ids then;
    * ``preload``: names of modules that are imported once, before workers are forked.  What starts a thread or
      a process, or opens a file, when it is imported cannot be: it is told once, and workers import for themselves;
    * ``grace``: seconds between SIGTERM and SIGKILL that a task has to clean up when it is stopped, at a limit or by
      ``future.kill()``; 0, the default, is SIGKILL at once, and limits are exact;
    * ``stacks``: a worker is asked what its threads are doing before it is killed, at a limit, say, for at most 50 ms;
      it is a note on the error, and ``future.stacks``.  ``dump_stacks`` asks all workers at any time;
    * ``on_event``: is called with a ``PoolEvent`` of what becomes of tasks and workers, on the thread that calls
      the callbacks of futures; what it raises is logged.  For progress, say: it tells what is done;
    * ``name``: for threads, processes and messages.

    ``mp_context=None`` forks workers from a small process of safepool's own, the keeper, never from this one;
    it is started once, and ends all that its workers leave behind when this process ends, in whatever way.
    Raises ``TypeError`` or ``ValueError`` for wrong arguments, and ``RuntimeError`` if ``isolation`` cannot be had;
    starts nothing before the first ``submit`` (but the keeper of isolated pools).
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: Any = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
        timeout: float | None = None,
        deadline: float | None = None,
        stall_timeout: float | None = None,
        retry: Any = None,
        on_worker_death: OnWorkerDeath = "heal",
        leftovers: OnLeftovers = "kill",
        isolation: Isolation = None,
        preload: Iterable[str] | None = None,
        stacks: bool = False,
        grace: float = 0.0,
        on_event: Callable[[PoolEvent], object] | None = None,
        name: str | None = None,
    ) -> None:
        process._check_system_limits()
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        if not (name is None or isinstance(name, str)):
            raise TypeError(f"name must be a str or None; got {name!r}")
        if not isinstance(initargs, Iterable):
            raise TypeError(f"initargs must be a tuple of arguments; got {initargs!r}")
        if mp_context is not None and not (hasattr(mp_context, "Process") and hasattr(mp_context, "get_start_method")):
            raise TypeError(f"mp_context must be a multiprocessing context, as get_context() gives; got {mp_context!r}")
        workers = _how_many(max_workers)
        _check_turnover(max_tasks_per_child, mp_context)
        name = name or f"safepool-{next(_pools)}"
        self._options = TaskOptions().but(timeout=timeout, deadline=deadline, retry=retry)
        self._max_workers = workers
        self._mp_context = mp_context if mp_context is not None else _nominal_context(max_tasks_per_child)
        launcher = launcher_of(mp_context, name, LaunchPolicy(leftovers, isolation, as_preload(preload), stacks))
        policy = PoolPolicy(
            workers,
            max_tasks_per_child,
            on_worker_death,
            start_all=launcher.method == "fork",
            take_back="take_back" in _os.CAPABILITIES,
            initializer=None if initializer is None else _name_of(initializer),
            grace=_grace(grace),
            stall_timeout=None if stall_timeout is None else seconds(stall_timeout, "stall_timeout"),
        )
        self._has_stacks = stacks and "keeper" in _os.CAPABILITIES
        self._forks = launcher.method == "fork"
        self._launcher = launcher
        self._held: Held | None = None
        self._kind: Kind | None = None  # of the last call
        self._shutdown_thread = False
        self._lock = threading.RLock()  # the garbage collector may run a finalizer that submits
        setup = Setup(initializer, tuple(initargs), workers)
        if not (on_event is None or callable(on_event)):
            raise TypeError(f"on_event must be callable or None; got {on_event!r}")
        self._watchdog = Watchdog(policy, launcher, setup, name, observers=self._observers(on_event))
        # Dropped without shutdown: what was submitted is finished, then everything ends.
        self._dropped = weakref.finalize(self, self._watchdog.shutdown, cancel=False)
        self._dropped.atexit = False

    _future_class = SafeFuture
    _finishes_at_exit = True

    def _observers(self, on_event: Callable[[PoolEvent], object] | None) -> list[Observer]:
        if on_event is None:
            return []
        from .telling import Teller

        return [Teller(on_event)]

    def _pool(self) -> SafePoolExecutor:
        return self

    def _submit(
        self,
        options: TaskOptions,
        fn: Callable[..., Any],
        args: Iterable[Any],
        kwargs: dict[str, Any],
        *,
        chunk: int = 0,
    ) -> SafeFuture:
        if not callable(fn):
            raise TypeError(f"fn must be callable; got {fn!r}")
        watchdog = self._watchdog
        self._check_open()
        kind = self._kind
        if (
            kind is None
            or kind.fn is not fn
            or kind.options is not options
            or kind.function is None
            or not kind.function.is_current(fn)
        ):
            kind = self._kind_of(fn, options)
        if kind.function is not None and not kwargs and not chunk and _payload.are_plain(args):  # type: ignore[arg-type]
            future = self._future_class(watchdog, next(_tasks), kind, args)
            if watchdog.thread is not None:
                watchdog.submit(future)
                return future
        else:
            future = self._pickled(kind, args, kwargs, chunk)
        self._begin(future)
        return future

    def _kind_of(self, fn: Callable[..., Any], options: TaskOptions) -> Kind:
        """And keep it, for the next call is often of the same function; but nothing that carries state."""
        if self._watchdog.thread is None:
            self._launcher.prepare()
        function = None
        with suppress(Exception):  # whatever pickling may raise: it does so again, where the future can tell
            function = _payload.function_of(fn, self._what_workers_hold())
        kind = Kind(fn, function, options.name or _name_of(fn), options, likeness(options))
        if function is not None:
            self._kind = kind
        return kind

    def _pickled(self, kind: Kind, args: Iterable[Any], kwargs: dict[str, Any], chunk: int) -> SafeFuture:
        """A future of a call of any kind; if it cannot be pickled, one that has failed."""
        watchdog = self._watchdog
        future = self._future_class(watchdog, next(_tasks), kind)
        try:
            held, store = self._what_workers_hold(), watchdog.made_store if "big_data" in _os.CAPABILITIES else None
            future._payload = _payload.dumps_call(kind.fn, args, kwargs, chunk=chunk, held=held, store=store)
        except KeyboardInterrupt:
            raise  # more likely the user's than the argument's
        except BaseException as error:
            _fail_unsent(future, error)
            for observer in watchdog.observers:
                observer.unsent(future, error)
        return future

    def _has_streams(self) -> bool:
        return "board" in _os.CAPABILITIES

    def _stream(self, options: TaskOptions, fn: Callable[..., Any], calls: list[Any], how: int) -> Stream | None:
        """For items, or chunks, that are plain, and so can travel by the hundred; None: here, or so few, should not.

        ``how``: see ``Stream``.
        """
        if len(calls) < STREAM_FROM * self._max_workers:
            return None
        self._check_open()
        kind = self._kind_of(fn, options)
        if not kind.is_plain or kind.function is None:
            return None
        stream = Stream(self._watchdog, kind, calls, how, is_observed=bool(self._watchdog.observers))
        self._begin(stream)
        return stream

    def _begin(self, future: SafeFuture | Stream) -> None:
        watchdog = self._watchdog
        with self._lock:
            self._check_open()
            if watchdog.thread is None:
                _at_exit_end(watchdog, self._finishes_at_exit)
            if isinstance(future, SafeFuture) and future._payload is None:
                watchdog.want_worker()
            else:
                watchdog.submit(future)

    def _what_workers_hold(self) -> Held | None:
        if not self._forks:
            return None
        with self._lock:
            if self._held is None:
                self._held = Held()
            return self._held

    def _check_open(self) -> None:
        watchdog = self._watchdog
        if not self._shutdown_thread and watchdog.broken is None and not _exiting and not watchdog.is_fork():
            return
        if watchdog.is_fork():
            raise RuntimeError("this pool belongs to the process that made it; make another one after a fork")
        if (reason := self._broken) is not False:
            raise PoolBroken(f"cannot schedule new futures: {reason}", reason=reason)
        if self._shutdown_thread:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if _exiting and self._finishes_at_exit:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks; finish what was submitted, or with ``cancel_futures`` only what runs.

        ``wait``: return when all of it is done, every worker is gone and every callback has run.
        May be called again, from any thread, and from a callback (which then does not wait).
        """
        if self._watchdog.is_fork():
            return  # before the lock: a thread that is not in this child may have held it
        with self._lock:
            self._shutdown_thread = True
        self._watchdog.shutdown(cancel=cancel_futures)
        if wait:
            self._watchdog.join()

    def terminate_workers(self) -> None:
        """Cancel everything and end every worker: SIGTERM, and SIGKILL for one that ignores it for 2 s."""
        self._end_workers(hard=False)

    def kill_workers(self) -> None:
        """Cancel everything and end every worker by SIGKILL.  All futures are done when this returns."""
        self._end_workers(hard=True)

    def _end_workers(self, *, hard: bool) -> None:
        self.shutdown(wait=False, cancel_futures=True)
        if not self._watchdog.is_fork():
            self._watchdog.end_workers(hard=hard)

    def dump_stacks(self, timeout: float = 1.0) -> dict[int, str]:
        """What the threads of each worker are doing now: the text of their tracebacks, by pid.

        "" for a worker that is stopped, or does not answer within ``timeout`` seconds for another reason.  It goes on
        with its task.  Raises ``RuntimeError`` if the pool was not made with ``stacks=True``.
        """
        if not self._has_stacks:
            raise RuntimeError("the workers of this pool cannot say what they do: make it with stacks=True, on Linux")
        return {} if self._watchdog.is_fork() else self._watchdog.stacks(timeout)

    def __repr__(self) -> str:
        return f"<SafePoolExecutor {self._watchdog.name} {self._watchdog._core!r}>"

    def __reduce__(self) -> Any:
        raise TypeError("a process pool cannot be pickled; make one where it is needed")

    # ----------------------------------------------- what code in the wild reads

    @property
    def _broken(self) -> str | bool:  # type: ignore[override]
        return self._watchdog.broken or False

    @property
    def _processes(self) -> dict[int, Any]:  # type: ignore[override]
        # Code that submits and then looks for processes (to kill them, say) finds those that are to come.
        if not self._watchdog.is_fork():
            self._watchdog.await_launches()
        return self._watchdog.processes

    @property
    def _executor_manager_thread(self) -> threading.Thread | None:  # type: ignore[override]
        return self._watchdog.thread

    @property
    def _call_queue(self) -> _NoQueue:
        return _NoQueue()


class _NoQueue:
    """Stands where the stdlib has the queue of its calls: always empty, with nothing to wait for."""

    def empty(self) -> bool:
        return True

    def close(self) -> None:
        pass

    def join_thread(self) -> None:
        pass


class PoolView(_Submitter):
    """A pool under other task options: itself an ``Executor``, on the same workers."""

    def __init__(self, pool: SafePoolExecutor, options: TaskOptions) -> None:
        self._of = pool
        self._options = options

    def _pool(self) -> SafePoolExecutor:
        return self._of

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Shut down the pool itself."""
        self._of.shutdown(wait, cancel_futures=cancel_futures)

    def __repr__(self) -> str:
        return f"<PoolView {self._options} of {self._of!r}>"


# ------------------------------------------------------------------ arguments


def _how_many(max_workers: int | None) -> int:
    if max_workers is None:
        from loky import cpu_count

        most: int = cpu_count()  # affinity and cgroup limits included
        return min(most, MAX_WINDOWS_WORKERS) if sys.platform == "win32" else most
    max_workers = _whole(max_workers, "max_workers")
    if max_workers <= 0:
        raise ValueError("max_workers must be greater than 0")
    if sys.platform == "win32" and max_workers > MAX_WINDOWS_WORKERS:
        raise ValueError(f"max_workers must be <= {MAX_WINDOWS_WORKERS}")
    return max_workers


def _whole(value: Any, name: str) -> int:
    """An int, also from numpy's."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} must be an integer; got {value!r}")


def _check_turnover(max_tasks_per_child: int | None, mp_context: Any) -> None:
    if max_tasks_per_child is None:
        return
    if isinstance(max_tasks_per_child, bool) or not isinstance(max_tasks_per_child, int):
        raise TypeError("max_tasks_per_child must be an integer")
    if max_tasks_per_child <= 0:
        raise ValueError("max_tasks_per_child must be >= 1")
    if mp_context is not None and mp_context.get_start_method(allow_none=False) == "fork":
        raise ValueError(
            "max_tasks_per_child is incompatible with the 'fork' multiprocessing start method; "
            "supply a different mp_context."
        )


def _nominal_context(max_tasks_per_child: int | None) -> Any:
    """What ``_mp_context`` shows when none was given: the stdlib's word for "not a fork of this process"."""
    wanted = "spawn" if max_tasks_per_child is not None else "forkserver"
    methods = multiprocessing.get_all_start_methods()
    return multiprocessing.get_context(wanted if wanted in methods else "spawn")


def _grace(value: Any) -> float:
    grace_s = seconds(value, "grace", zero=True)
    if grace_s is None:
        raise ValueError("grace must be finite: a worker that ignores SIGTERM would never be stopped")
    return grace_s


def _name_of(fn: Any) -> str:
    try:
        name = fn.__qualname__
    except Exception:  # it has none, or a __getattr__ of the user's fails
        name = None
    return exact(name) if isinstance(name, str) and name else type(fn).__qualname__


def _fail_unsent(future: SafeFuture, error: BaseException) -> None:
    if error.__cause__ is None:
        blame(error, remote_traceback(traceback_of(error)))
    future.failed(error)


# ------------------------------------------------------------------------ map


def _is_at_hand(items: Iterable[Any]) -> bool:
    """To take all of them takes no time, and waits for nothing; a generator may wait for what an earlier task does."""
    return hasattr(items, "__len__") or isinstance(items, itertools.repeat)


def _slices(items: Any, size: int) -> Iterator[Any]:
    return (items[at : at + size] for at in range(0, len(items), size))


def _taken_while_plain(calls: Iterator[Any], chunksize: int, *, has_one: bool) -> tuple[list[Any], bool]:
    """These, or those up to the first chunk that has something that is not plain; and have they not?"""
    if chunksize == 1:
        found = list(calls)
        return found, _payload.are_all_plain(found, has_one=has_one)
    found = []
    for chunk in calls:
        found.append(chunk)
        if type(chunk) is not range and not _payload.are_all_plain(chunk, has_one=has_one):
            return found, False
    return found, True


def _in_order(todo: Iterator[Callable[[], Future[Any]]], end: float | None, buffersize: int | None) -> Iterator[Any]:
    """Begin at the call, not at the first ``next``."""
    waiting = deque(start() for start in itertools.islice(todo, buffersize))
    return _results(waiting, todo, end)


def _run_chunk(fn: Callable[..., Any], chunk: list[tuple[Any, ...]]) -> list[Any]:
    return [fn(*call) for call in chunk]


def _flat(chunks: Iterator[list[Any]]) -> Iterator[Any]:
    for chunk in chunks:
        yield from chunk if _unpack.are_small(chunk) else emptied(chunk)


def _results(
    waiting: deque[Future[Any]], todo: Iterator[Callable[[], Future[Any]]], end: float | None
) -> Iterator[Any]:
    try:
        while waiting:
            # Nothing here holds a result, or its future, while the user works with it.
            result = [_next_result(waiting, end)]
            for start in itertools.islice(todo, 1):
                waiting.append(start())
            yield result.pop()
    finally:
        for future in waiting:
            future.cancel()


def _next_result(waiting: deque[Future[Any]], end: float | None) -> Any:
    future = waiting.popleft()
    try:
        return future.result(None if end is None else end - monotonic())
    finally:
        future.cancel()
        del future


# ----------------------------------------------------- the end of the interpreter

_exiting = False
_registered_in: int | None = None  # a process; its forks start without
_old_error: object = None
_live: weakref.WeakSet[Watchdog] = weakref.WeakSet()
_live_until_exit: weakref.WeakSet[Watchdog] = weakref.WeakSet()  # their work is not finished then
EXIT_AFTER_ERROR_S = 2.0  # for running tasks, when the program ends because of an exception
FIRST_PRIORITY = 1000  # of multiprocessing's finalizers
EXIT_KILL_S = 5.0  # for killed workers to be gone


def _at_exit_end(watchdog: Watchdog, finishes: bool) -> None:
    """Have this pool ended before the interpreter stops its threads.  Raises ``RuntimeError`` if it is too late.

    ``finishes``: what was submitted is finished then.
    """
    global _registered_in, _old_error
    if _registered_in != os.getpid():
        try:
            # Plain atexit runs after the threads were joined, which is too late to finish work.
            threading._register_atexit(_end_all)  # type: ignore[attr-defined]
        except RuntimeError:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown") from None
        # A child of multiprocessing's waits for its own children, our workers, before it comes to its threads.
        util.Finalize(None, _end_all, exitpriority=FIRST_PRIORITY)
        atexit.register(_end_the_rest)
        util.Finalize(None, _end_the_rest, exitpriority=FIRST_PRIORITY)
        _registered_in = os.getpid()
        _old_error = _last_error()
    (_live if finishes else _live_until_exit).add(watchdog)


def _last_error() -> object:
    """The uncaught exception that ends the program; a debugger or a test runner may have left an older one."""
    return getattr(sys, "last_value", None)


def _end_all() -> None:
    """Submitted work is run to its end; but after an exception, or Ctrl-C, stuck tasks do not hold the exit."""
    global _exiting
    _exiting = True
    failed = _last_error() is not _old_error and not hasattr(sys, "ps1")
    _end(_live, EXIT_AFTER_ERROR_S if failed else None, cancel=failed)


def _end_the_rest() -> None:
    """Those whose work is not finished, when all threads of the program have ended: nobody is told any more."""
    for watchdog in tuple(_live_until_exit):
        watchdog.mute()
    _end(_live_until_exit, 0.0, cancel=True)


def _end(live: weakref.WeakSet[Watchdog], limit_s: float | None, *, cancel: bool) -> None:
    mine = [watchdog for watchdog in tuple(live) if not watchdog.is_fork()]
    for watchdog in mine:
        watchdog.shutdown(cancel=cancel)
    _end_within(limit_s, mine)


def _end_within(limit_s: float | None, watchdogs: list[Watchdog]) -> None:
    """Wait for these pools, which were shut down, for ``limit_s``; then, or after Ctrl-C, kill their workers."""
    end = None if limit_s is None else monotonic() + limit_s
    try:
        for watchdog in watchdogs:
            watchdog.join(None if end is None else max(0.0, end - monotonic()))
    finally:
        for watchdog in watchdogs:
            if not watchdog.is_closed():
                watchdog.end_workers(hard=True)
                watchdog.join(EXIT_KILL_S)
