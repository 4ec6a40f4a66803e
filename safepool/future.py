"""A ``concurrent.futures.Future`` whose answer is unpickled by whoever asks for it.

So an answer that cannot be unpickled, or takes for ever to, is the trouble of that caller alone, and
never of the watchdog.  Waiting here looks after the watchdog once a second: no future can wait
for a pool that is gone.
"""

from __future__ import annotations

import threading
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
from time import monotonic

from . import _unpack
from ._link import Answer
from ._log import ERROR, tell
from ._words import words_of
from .errors import Attempt, ResultUnreadable, Unfinished, with_attempts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any, Protocol

    from .leaving import Leftover

    class Home(Protocol):
        """What a future asks of its pool: the watchdog."""

        progress: int

        def cancel(self, task: int, *, kill: bool = False, wait: bool = False) -> None: ...
        def check(self) -> None: ...
        def deliver(self, job: Callable[[], object]) -> None: ...
        def is_fork(self) -> bool: ...
        def state_of(self, task: int) -> str: ...


LOOK_AFTER_S = 1.0
_DONE = (CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED)


class SafeFuture(Future["Any"]):
    """What ``submit`` returns.

    Beyond ``concurrent.futures.Future``: ``kill()``, ``attempts`` (the failed ones so far, a tuple of
    ``Attempt``), ``worker_pid`` (of the worker that runs or last ran it, or None), ``leftovers`` (processes
    that outlived it, a tuple of ``Leftover``), ``stacks`` (what it was doing when its worker was killed, where the
    pool asks that) and ``name``.  Under asyncio it can be awaited: whoever is cancelled over it kills the task.
    """

    leftovers: tuple[Leftover, ...] = ()
    stacks = ""

    def __init__(self, home: Home, task: int, name: str) -> None:
        # What Future.__init__ sets, but for the Condition, which is most of what a future costs: it is
        # made when somebody waits.  The lock is this future's own: the stdlib's wait() takes the locks
        # of several futures in an order that it can only keep if no two of them share one.
        self._lock = threading.RLock()
        self._state = PENDING
        self._result = self._exception = None
        self._waiters: list[Any] = []
        self._done_callbacks: list[Callable[[Future[Any]], object]] = []
        self._own_condition: threading.Condition | None = None
        self._home = home
        self._task = task
        self.name = name
        self.worker_pid: int | None = None
        self._sent = False  # at a worker: only the watchdog can tell whether it has begun
        self._answer: Answer | None = None  # to be unpickled
        self.attempts: tuple[Attempt, ...] = ()

    @property
    def _condition(self) -> threading.Condition:  # type: ignore[override]
        if self._own_condition is None:
            fresh = threading.Condition(self._lock)
            with self._lock:
                if self._own_condition is None:
                    self._own_condition = fresh
        return self._own_condition

    def __str__(self) -> str:
        return f"task {self._task} ({self.name})"

    def __repr__(self) -> str:
        return f"<SafeFuture {self} {self.state()} pid={self.worker_pid} attempts={len(self.attempts)}>"

    def state(self) -> str:
        """In a word: ``pending``, ``running``, ``cancelled``, ``returned`` or ``raised``."""
        if self._state != FINISHED:
            return self._state.partition("_")[0].lower()
        raised = self._exception is not None or (self._answer is not None and not self._answer.ok)
        return "raised" if raised else "returned"

    # ------------------------------------------------------------- asking

    def result(self, timeout: float | None = None) -> Any:
        """The value of the task, or its exception raised; ``timeout`` in seconds.

        Raises ``TimeoutError`` (``Unfinished``) if it is not done by then, ``CancelledError`` if it was cancelled.
        """
        try:
            self._await(timeout)
            self._raise_if_cancelled()
            if self._exception is not None:
                raise self._exception
            return self._result
        finally:
            del self  # no cycle through the traceback of what was raised

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
        condition = self._condition
        with self._lock:  # in C: a signal handler that raises cannot come between the lock and the block
            if self._state in _DONE:
                return True
            slice_s = LOOK_AFTER_S if end is None else min(LOOK_AFTER_S, end - monotonic())
            if slice_s > 0:
                condition.wait(slice_s)
            return self._state in _DONE

    def _load(self) -> None:
        answer = self._answer
        if answer is None:
            return
        value, error = self._unpickle(answer)
        if error is not None and self.attempts:
            with_attempts(error, self.attempts)
        with self._lock:
            if self._answer is not None:  # else another thread was faster, and its object is the one
                self._answer, self._result, self._exception = None, value, error

    def _unpickle(self, answer: Answer) -> tuple[Any, BaseException | None]:
        try:
            value = _unpack.loads(answer.body)
        except KeyboardInterrupt:
            raise  # more likely the user's than the answer's
        except BaseException as error:
            what = "result" if answer.ok else "exception"
            text = answer.text.decode(errors="replace")
            lost: BaseException = ResultUnreadable(
                f"the {what} of {self} came from worker {self.worker_pid} but could not be unpickled here: "
                f"{words_of(error)}",
                task=str(self),
                pid=self.worker_pid,
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
        with self._lock:
            if self._state in (CANCELLED, CANCELLED_AND_NOTIFIED):
                return True
            if self._state != PENDING:
                return False
            sent = self._sent
            if not sent:
                self._end(CANCELLED_AND_NOTIFIED)
        if sent:
            self._home.cancel(self._task, wait=True)
            return self.cancelled()
        self._home.cancel(self._task)
        self._call_callbacks()
        return True

    def kill(self) -> bool:
        """Cancel the task even if it is running: its worker is killed and replaced.

        Returns at once; False: it was done already.  The future ends as cancelled, within moments.
        """
        if self.done() or self._home.is_fork():
            return False
        self._home.cancel(self._task, kill=True)
        return True

    # ---------------------------------------- the watchdog's side of it

    def claim(self) -> bool:
        """About to be sent.  False: it was cancelled first."""
        with self._lock:
            if self._state != PENDING:
                return False
            self._sent = True
            return True

    def begin(self, pid: int | None) -> None:
        with self._lock:
            self.worker_pid = pid
            if self._state == PENDING:
                self._state = RUNNING

    def requeue(self) -> None:
        with self._lock:
            if self._state not in _DONE:
                self._state = PENDING
                self._sent = False

    def answered(self, answer: Answer) -> None:
        with self._lock:
            if self._state in _DONE:
                return
            self.worker_pid = answer.pid
            self._answer = answer
            self._end(FINISHED, failed=not answer.ok)
        self._invoke_callbacks()

    def failed(self, error: BaseException) -> None:
        with self._lock:
            if self._state in _DONE:
                return
            self._exception = error
            self._end(FINISHED, failed=True)
        self._invoke_callbacks()

    def cancelled_by_pool(self) -> None:
        with self._lock:
            if self._state in _DONE:
                return
            self._end(CANCELLED_AND_NOTIFIED)
        self._invoke_callbacks()

    def _end(self, state: str, failed: bool = False) -> None:
        """Under the condition: the one place where a future of ours becomes done."""
        self._state = state
        for waiter in self._waiters:
            if state != FINISHED:
                waiter.add_cancelled(self)
            elif failed:
                waiter.add_exception(self)
            else:
                waiter.add_result(self)
        if self._own_condition is not None:
            self._own_condition.notify_all()

    def _invoke_callbacks(self) -> None:
        if self._done_callbacks:
            self._home.deliver(self._call_callbacks)

    def _call_callbacks(self) -> None:
        for callback in self._done_callbacks:
            try:
                callback(self)
            except BaseException as error:  # SystemExit of one is not to keep the others from being called
                tell(ERROR, "exception calling callback for %r", self, error=error)


def blame(error: BaseException, cause: BaseException) -> None:
    """Set ``__cause__``, also on exceptions that allow no attribute to be set."""
    vars(BaseException)["__cause__"].__set__(error, cause)


def remote_traceback(text: str) -> BaseException:
    """The stdlib's own class, with the words it would have; programs look at its type."""
    make: Any = _RemoteTraceback
    cause: BaseException = make(f'\n"""\n{text}"""')
    return cause
