"""A ``concurrent.futures.Future`` whose answer is unpickled by whoever asks for it.

So an answer that cannot be unpickled, or takes for ever to, is the trouble of that caller alone, and
never of the watchdog.  Waiting here looks after the watchdog once a second: no future can wait
for a pool that is gone.
"""

from __future__ import annotations

import os
import threading
import weakref
from concurrent.futures import CancelledError, Future
from concurrent.futures._base import (
    CANCELLED,
    CANCELLED_AND_NOTIFIED,
    FINISHED,
    PENDING,
    RUNNING,
)
from concurrent.futures.process import _RemoteTraceback
from contextlib import suppress
from functools import partial
from time import monotonic

from . import _unpack
from ._link import Answer
from ._log import ERROR, tell
from ._wire import plain_in
from ._words import words_of
from .errors import Attempt, ResultUnreadable, Unfinished, with_attempts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from typing import Any, Protocol

    from ._call import Record
    from ._events import NewTask
    from ._payload import Function
    from .leaving import Leftover
    from .policy import TaskOptions

    class Home(Protocol):
        """What a future asks of its pool: the watchdog."""

        @property
        def progress(self) -> int: ...
        def cancel_range(self, first: int, last: int) -> None: ...
        def cancel(self, task: int, *, kill: bool = False, wait: bool = False, unsent: bool = False) -> None: ...
        def check(self) -> None: ...
        def hear(self, future: SafeFuture, limit_s: float) -> bool: ...
        def post(self, act: Callable[[], None]) -> None: ...
        def deliver(self, job: Callable[[], object]) -> None: ...
        def is_fork(self) -> bool: ...
        def look(self, *, wait: bool) -> None: ...
        def state_of(self, task: int) -> str: ...
        def try_until_done(self, job: Callable[[], bool]) -> None: ...


LOOK_AFTER_S = 1.0
SHARED_FROM_S = 0.1  # a task with a shorter limit has a ticket of its own, for its begin is told then
_DONE = (CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED)
_OPEN = (PENDING, RUNNING)

#: Held for a few lines only: while a future becomes done that nobody waits for, is sent or cancelled, and while a
#: ``_Sync`` is made.  So most futures need no lock of their own.
_brief = threading.RLock()


class _Sync:
    """What a future needs once somebody waits for it, or wants to be called: its own lock, and who they are.

    Its own: the stdlib's wait() takes the locks of several futures in an order that it can only keep if no two of
    them share one.

    Scenario 2: (a) a thread holds this lock, (b) a signal handler of the user's runs there, and waits for the pool (it
    shuts it down, say), (c) the watchdog waits for the lock.  CPython looks for signals after calls, so where the lock
    is held here there are none; and the watchdog does not wait for it, for in the stdlib's wait() there are.
    """

    __slots__ = ("callbacks", "condition", "end", "lock", "sleepers", "waiters")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.sleepers: dict[Any, None] = {}  # locks that are released when it is done
        self.waiters: list[Any] = []
        self.callbacks: list[Callable[[Future[Any]], object]] = []
        self.condition: threading.Condition | None = None
        self.end: str | None = None  # the state that it is to have as soon as somebody has the lock


class Kind:
    """What calls of one function under the same options have in common: a million futures share it."""

    __slots__ = (
        "fn", "function", "has_record", "is_alike", "is_judged", "is_plain", "like", "name", "options", "shares_ticket",
    )  # fmt: skip

    def __init__(
        self, fn: Any, function: Function | None, name: str, options: TaskOptions, like: NewTask | None = None
    ) -> None:
        self.fn = fn
        self.function = function  # None: it goes with each call
        self.name = name
        self.options = options
        self.like = like  # what the core must know of each
        self.is_judged = options.retry is not None and like is None  # results, too, may be worth another attempt
        self.has_record = options.deadline is not None or options.retry is not None
        self.is_plain = options.timeout is None and options.deadline is None and options.retry is None
        self.is_alike = self.is_plain or like is not None  # the core knows the same of each, or nothing
        is_exact = options.timeout is None or options.timeout >= SHARED_FROM_S
        self.shares_ticket = is_exact and options.deadline is None and not self.is_judged


class SafeFuture(Future["Any"]):
    """What ``submit`` returns.

    Beyond ``concurrent.futures.Future``: ``kill()``, ``attempts`` (the failed ones so far, a tuple of
    ``Attempt``), ``worker_pid`` (of the worker that runs or last ran it, or None), ``leftovers`` (processes
    that outlived it, a tuple of ``Leftover``), ``stacks`` (what it was doing when its worker was killed, where the
    pool asks that) and ``name``.  Under asyncio it can be awaited: whoever is cancelled over it kills the task.
    """

    # Slots for what every future has.  What few have is an attribute of its own, with a default here.
    __slots__ = (
        "_answer", "_exception", "_home", "_kind", "_payload", "_pid", "_result", "_sent", "_state", "_submitted",
        "_sync", "_task",
    )  # fmt: skip
    attempts: tuple[Attempt, ...] = ()
    leftovers: tuple[Leftover, ...] = ()
    stacks = ""
    _record: Record | None = None
    is_batch = False
    how = 0  # as a batch has it

    def __init__(self, home: Home, task: int, kind: Kind, payload: Any = None) -> None:
        # What Future.__init__ sets, but for the Condition and the lists, which are most of what a future costs: they
        # are made when somebody waits.
        self._state = PENDING
        self._result = self._exception = None
        self._answer: Answer | None = None
        self._sync: _Sync | None = None
        self._pid: int | None = None
        self._home = home
        self._task = task
        self._kind = kind
        self._payload = payload  # plain arguments, or a ``Payload``
        if kind.has_record:
            self._submitted = monotonic()
        self._sent = False  # at a worker: only the watchdog can tell whether it has begun

    def _made_record(self) -> Record:
        if self._record is None:
            from ._call import Record

            self._record = Record()
        return self._record

    @property
    def name(self) -> str:
        return self._kind.name

    @property
    def worker_pid(self) -> int | None:
        """Of the worker that runs it or last ran it, if one has begun it."""
        if self._pid is None and self._state == PENDING and self._sent:
            self._home.look(wait=True)
        return self._pid

    def _made_sync(self) -> _Sync:
        sync = self._sync
        if sync is None:
            fresh = _Sync()
            with _brief:
                sync = self._sync
                if sync is None:
                    sync = self._sync = fresh
        return sync

    @property
    def _condition(self) -> threading.Condition:  # type: ignore[override]
        sync = self._made_sync()
        if sync.condition is None:
            fresh = threading.Condition(sync.lock)
            with sync.lock:
                if sync.condition is None:
                    sync.condition = fresh
        return sync.condition

    @property
    def _lock(self) -> Any:
        return self._made_sync().lock

    @property
    def _waiters(self) -> list[Any]:  # type: ignore[override]
        return self._made_sync().waiters

    @property
    def _done_callbacks(self) -> list[Callable[[Future[Any]], object]]:
        return self._made_sync().callbacks

    def __str__(self) -> str:
        return f"task {self._task} ({self.name})"

    def __repr__(self) -> str:
        return f"<SafeFuture {self} {self.state()} pid={self._pid} attempts={len(self.attempts)}>"

    def __reduce__(self) -> Any:
        raise TypeError(f"{self} belongs to this process, as all futures do; send its result instead")

    def state(self) -> str:
        """In a word: ``pending``, ``running``, ``cancelled``, ``returned`` or ``raised``."""
        if self._state != FINISHED:
            return self._state.partition("_")[0].lower()
        raised = self._exception is not None or (self._answer is not None and not self._answer.ok)
        return "raised" if raised else "returned"

    def tasks(self) -> tuple[int, ...]:
        """As a batch has many."""
        return (self._task,)

    def nth(self, at: int) -> int:
        return self._task

    def one(self) -> SafeFuture:
        return self

    # ------------------------------------------------------------- asking

    def result(self, timeout: float | None = None) -> Any:
        """The value of the task, or its exception raised; ``timeout`` in seconds.

        Raises ``TimeoutError`` (``Unfinished``) if it is not done by then, ``CancelledError`` if it was cancelled.
        """
        if self._state is FINISHED and self._answer is None and self._exception is None:
            return self._result
        try:
            self._await(timeout)
            self._raise_if_cancelled()
            if self._exception is not None:
                raise self._exception
            return self._result
        finally:
            del self  # no cycle through the traceback of what was raised

    def running(self) -> bool:
        """Does a worker run it now?  What was sent to a worker a moment ago is looked up there."""
        if self._state == PENDING and self._sent:
            self._home.look(wait=True)
        return self._state == RUNNING

    def done(self) -> bool:
        return self._state in _DONE

    def cancelled(self) -> bool:
        return self._state in (CANCELLED, CANCELLED_AND_NOTIFIED)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The exception of the task or None; ``timeout`` in seconds, errors as for ``result``."""
        self._await(timeout)
        self._raise_if_cancelled()
        return self._exception

    def __await__(self) -> Generator[Any, None, Any]:
        """``await pool.submit(...)``, under asyncio.  If whoever awaits it is cancelled, the task is killed.

        A task that is cancelled by others raises ``concurrent.futures.CancelledError``: nobody means the awaiting one.
        """
        import asyncio

        loop = asyncio.get_running_loop()
        waiter = loop.create_future()

        def wake() -> None:
            if not waiter.done():
                waiter.set_result(None)

        def tell(_: Future[Any]) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(wake)

        self.add_done_callback(tell)
        try:
            yield from waiter
        except asyncio.CancelledError:
            self.kill()
            raise
        return self.result(0)

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        """Have ``fn(future)`` called when it is done, on a thread of the pool; at once, here, if it is done already.

        What ``fn`` raises is logged.
        """
        sync = self._made_sync()
        with sync.lock:  # in C, unlike that of a ``Condition``: what a signal handler raises leaves nothing locked
            if self._state not in _DONE:
                sync.callbacks.append(fn)
                return
        try:
            fn(self)
        except Exception as error:
            tell(ERROR, "exception calling callback for %r", self, error=error)

    def _raise_if_cancelled(self) -> None:
        if self._state != FINISHED:
            raise CancelledError

    def _get_snapshot(self) -> tuple[bool, bool, Any, BaseException | None]:
        # asyncio of 3.14 reads results here.
        if self.done():
            self._load()
        return super()._get_snapshot()  # type: ignore[misc,no-any-return]

    def _await(self, timeout: float | None) -> None:
        if self._state == FINISHED:
            self._load()
            return
        end = None if timeout is None else monotonic() + timeout
        if self._state not in _DONE:
            self._home.check()
            if self._sent:
                self._home.hear(self, LOOK_AFTER_S if timeout is None else timeout)
        while not self._wait_once(end):
            if end is not None and monotonic() >= end:
                raise Unfinished(
                    f"{self} is not done after {float(timeout or 0):g} s: it is {self._home.state_of(self._task)}",
                    unfinished=[self],
                    seconds=timeout,
                )
            self._home.check()
        self._load()

    def _wait_once(self, end: float | None) -> bool:
        if self._state in _DONE:
            return True
        slice_s = LOOK_AFTER_S if end is None else min(LOOK_AFTER_S, end - monotonic())
        if slice_s <= 0:
            return False
        sync = self._made_sync()
        sleeper = threading.Lock()
        sleeper.acquire(blocking=False)
        with sync.lock:  # in C: a signal handler that raises cannot come between the lock and the block
            # Scenario 3: (a) the stdlib's wait() takes the locks of many futures, (b) a signal handler of the user's
            # raises there, and they are never given back.  Whose thread that was may still ask for its results.
            if sync.end is not None and self._end_for_all(sync.end):
                self._invoke_callbacks()
            if self._state in _DONE:
                return True
            sync.sleepers[sleeper] = None
        try:
            sleeper.acquire(timeout=slice_s)
        finally:
            with sync.lock:
                if sleeper in sync.sleepers:
                    del sync.sleepers[sleeper]
        return self._state in _DONE

    def _load(self) -> None:
        answer = self._answer
        if answer is None:
            return
        value, error = self._unpickle(answer)
        if error is not None and self.attempts:
            with_attempts(error, self.attempts)
        with self._lock:
            if self._answer is answer:  # else another thread was faster, and its object is the one
                self._result, self._exception, self._answer = value, error, None

    def _unpickle(self, answer: Answer) -> tuple[Any, BaseException | None]:
        try:
            if answer.is_plain:
                value = plain_in(answer.body)
            else:
                value = _unpack.loads(answer.body) if type(answer.body) is bytes else answer.body.load()
        except KeyboardInterrupt:
            raise  # more likely the user's than the answer's
        except BaseException as error:
            what = "result" if answer.ok else "exception"
            text = answer.text.decode(errors="replace")
            lost: BaseException = ResultUnreadable(
                f"the {what} of {self} came from worker {self._pid} but could not be unpickled here: {words_of(error)}",
                task=str(self),
                pid=self._pid,
            )
            blame(lost, remote_traceback(text) if text else error)
            return None, lost
        if answer.ok:
            return value, None
        if not isinstance(value, BaseException):  # whatever a __reduce__ of the user's made of it
            value = ResultUnreadable(f"the exception of {self} came back as {value!r}", task=str(self))
        blame(value, remote_traceback(answer.text.decode(errors="replace")))
        return None, value

    # ---------------------------------------------------------- stopping

    def cancel(self) -> bool:
        """Cancel the task unless it has begun; True: it is cancelled and will not run.

        A task that was sent to a worker is taken back if the worker has not begun it.
        """
        with _brief:
            if self._state in (CANCELLED, CANCELLED_AND_NOTIFIED):
                return True
            if self._state != PENDING:
                return False
            sent, self._sent = self._sent, True  # nobody sends it from here on
        if sent:
            self._home.cancel(self._task, wait=True)
            return self.cancelled()
        if not self._end_for_all(CANCELLED_AND_NOTIFIED):
            return self.cancelled()
        self._payload = None
        self._home.cancel(self._task, unsent=True)
        self._call_callbacks()
        return True

    def _withhold(self) -> None:
        """Nobody sends it from here on."""
        with _brief:
            self._sent = True

    def kill(self) -> bool:
        """Cancel the task even if it is running: its worker is killed and replaced.

        Returns at once; False: it was done already.  The future ends as cancelled, within moments.
        """
        if self.done() or self._home.is_fork():
            return False
        if not self._sent and self.cancel():
            return True
        self._home.cancel(self._task, kill=True)
        return True

    # ---------------------------------------- the watchdog's side of it

    def begin(self, pid: int | None) -> None:
        self._pid = pid
        with _brief:
            if self._state == PENDING:
                self._state = RUNNING

    def last_answer(self) -> Answer | None:
        """Of its last attempt, if that came to one that nobody has asked for."""
        record = self._record
        return self._answer if record is None or record.answer is None else record.answer

    def keep(self, answer: Answer) -> None:
        """For whoever asks for it; with the record, if there may be another attempt."""
        if self._kind.is_judged or (not answer.ok and self._kind.options.retry is not None):
            self._made_record().answer = answer
        elif (
            self._state not in _DONE
        ):  # (one step with the next line: else it was loaded, and there is one result only)
            self._answer = answer

    def keep_result(self, body: bytes) -> None:
        """One that is pickled."""
        self.keep(Answer(True, b"", body))

    def requeue(self) -> None:
        with _brief:
            if self._state not in _DONE:
                self._state = PENDING
                self._sent = False
                self._answer = self._result = None

    def failed(self, error: BaseException) -> None:
        with _brief:
            if self._state in _DONE:
                return
            self._exception, self._answer, self._result, self._payload = error, None, None, None
        self._end_on_watchdog(FINISHED)

    def cancelled_by_pool(self) -> None:
        self._payload = None
        self._end_on_watchdog(CANCELLED_AND_NOTIFIED)

    def answered(self) -> None:
        """With what was put there for it, by the thread of who waits for it."""
        if self._sync is None and self._state in _OPEN:  # nobody else waits, and nobody comes between: one step
            self._state, self._payload = FINISHED, None
            return
        self._payload = None
        if self._end_for_all(FINISHED):
            self._invoke_callbacks()

    def answered_by_watchdog(self) -> None:
        self._payload = None
        self._end_on_watchdog(FINISHED)

    def _end_for_all(self, state: str) -> bool:
        """A future of ours becomes done that somebody may wait for: here or, on the watchdog, in the next one.

        False: it was.
        """
        ended = self._end_unawaited(state)
        if ended is None:
            assert self._sync is not None
            with self._sync.lock:
                waiters = self._end_awaited(self._sync, state)
            ended = waiters is not None
            self._tell_all(waiters or ())
        return ended

    def _end_on_watchdog(self, state: str) -> None:
        """The same, and what is to be called then; a lock that is not free is not waited for."""
        if self._end_unawaited(state) is None and not self._try_to_end(state):
            assert self._sync is not None
            self._sync.end = state
            self._try_later(lambda future: future._try_to_end(state))

    def _try_to_end(self, state: str) -> bool:
        """False: another thread has its lock."""
        sync = self._sync
        assert sync is not None
        if not sync.lock.acquire(blocking=False):
            return False
        try:
            waiters = self._end_awaited(sync, state)
        finally:
            sync.lock.release()
        if waiters is not None:
            self._tell_all(waiters)
            self._invoke_callbacks()
        return True

    def _end_unawaited(self, state: str) -> bool | None:
        """If nobody waits; None: somebody may.

        Scenario 1: (a) nobody waits, so the state is set without a lock, (b) a waiter looks just then, sees it and is
        put on the list all the same, (c) the list is gone through: it is told twice.  So the state is set under the
        lock that waiters hold, or while no waiter can come (``_brief``).
        """
        with _brief:
            if self._sync is not None:
                return None
            if self._state in _DONE:  # (not ``_end``: after a call a handler may run, see ``_Sync``)
                return False
            self._state = state
            return True

    def _end_awaited(self, sync: _Sync, state: str) -> list[Any] | None:
        """Under its lock: who is to be told, without it; None: it was done."""
        if not self._end(state):
            return None
        for sleeper in sync.sleepers:
            sleeper.release()
        sync.sleepers.clear()
        if sync.condition is not None:
            sync.condition.notify_all()
        return [*sync.waiters]

    def _try_later(self, job: Callable[[SafeFuture], bool]) -> None:
        """As long as anybody cares for it: who has it, or is to be called back."""
        known = weakref.ref(self)
        kept = self if self._sync is not None and self._sync.callbacks else None
        self._home.try_until_done(lambda: (there := kept or known()) is None or job(there))

    def _tell_all(self, waiters: Iterable[Any]) -> None:
        for waiter in waiters:
            if not self._try_to_tell(waiter):
                self._try_later(partial(SafeFuture._try_to_tell, waiter=waiter))

    def _try_to_tell(self, waiter: Any) -> bool:
        """False: it is one of the stdlib's, and another thread has a lock of its."""
        for lock in (getattr(waiter, "lock", None), getattr(getattr(waiter, "event", None), "_cond", None)):
            if lock is not None:
                if not lock.acquire(blocking=False):
                    return False
                lock.release()
        word = self.state()
        if word == "cancelled":
            waiter.add_cancelled(self)
        elif word == "raised":
            waiter.add_exception(self)
        else:
            waiter.add_result(self)
        return True

    def _end(self, state: str) -> bool:
        if self._state in _DONE:
            return False
        self._state = state
        return True

    def _invoke_callbacks(self) -> None:
        if self._sync is not None and self._sync.callbacks:
            self._home.deliver(self._call_callbacks)

    def _call_callbacks(self) -> None:
        for callback in self._sync.callbacks if self._sync is not None else ():
            try:
                callback(self)
            except BaseException as error:  # SystemExit of one is not to keep the others from being called
                tell(ERROR, "exception calling callback for %r", self, error=error)


def claim(futures: Iterable[SafeFuture]) -> list[SafeFuture]:
    """Those that are about to be sent, but for what was cancelled first."""
    claimed = []
    with _brief:
        for future in futures:
            if not future._sent and future._state is PENDING:
                future._sent = True
                claimed.append(future)
    return claimed


def answer_all(futures: list[SafeFuture]) -> None:
    """Each with what was put there for it.  First those that nobody waits for, all in one go."""
    awaited = []
    with _brief:
        for future in futures:
            if future._sync is None and future._state in _OPEN:
                future._state = FINISHED
                future._payload = None
            else:
                awaited.append(future)
    for future in awaited:
        future.answered_by_watchdog()


def _let_go_in_child() -> None:
    # Another thread may have held it at the fork.
    global _brief
    _brief = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


def blame(error: BaseException, cause: BaseException) -> None:
    """Set ``__cause__``, also on exceptions that allow no attribute to be set."""
    vars(BaseException)["__cause__"].__set__(error, cause)


def remote_traceback(text: str) -> BaseException:
    """The stdlib's own class, with the words it would have; programs look at its type."""
    make: Any = _RemoteTraceback
    cause: BaseException = make(f'\n"""\n{text}"""')
    return cause
