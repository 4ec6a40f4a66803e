"""What is kept of a task beside its future: the options it has, and what came of its attempts so far."""

from __future__ import annotations

from . import _events as e
from ._link import Answer
from ._payload import Payload
from .errors import Attempt, with_attempts
from .future import SafeFuture
from .policy import Retry, TaskOptions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ._retry import Judge

DEATHS = 3  # that a task under a tenacity policy may cause, as ``Retry.deaths``
PLAIN_BYTES = 1024  # up to this size nothing needs to be known of a call


class Record:
    """Of a task that has failed, and may be tried again.  Only the watchdog changes it, but for ``ask_policy``."""

    __slots__ = ("_judge", "answer", "error", "is_final")

    def __init__(self) -> None:
        self.answer: Answer | None = None
        self.error: BaseException | None = None  # in place of the answer
        self.is_final = False  # ``error`` is what the retry policy left, attempts and all
        self._judge: Judge | None = None

    def ask_policy(self, future: SafeFuture, kind: str, attempt: int, pid: int | None, ended: float) -> float | None:
        """On the retries' thread: ask the policy about this attempt, and note the attempt on the future.

        How many seconds to wait before the next one; None: the outcome stands.
        """
        if self._judge is None:
            from ._retry import Judge

            assert future._kind.options.retry is not None
            self._judge = Judge(future._kind.options.retry, future._submitted)
        value, error = future._unpickle(self.answer) if self.answer is not None else (None, self.error)
        if error is not None:
            verdict = self._judge.after_error(error, kind, ended)
        else:
            verdict = self._judge.after_result(value, ended)
            if verdict.delay_s is None and verdict.error is None:
                return None  # the result is accepted
        future.attempts += (Attempt(attempt, kind, pid, error),)
        if verdict.delay_s is None:
            final = verdict.error or error  # the very object that the last attempt names
            self.error = final and with_attempts(final, future.attempts)
            self.is_final = True
        return verdict.delay_s


def likeness(options: TaskOptions) -> e.NewTask | None:
    """What the core must know of each task with these options; None: nothing, or more than is the same for all."""
    if options.deadline is not None or not (options.retry is None or isinstance(options.retry, Retry)):
        return None
    if options.timeout is None and options.retry is None:
        return None
    return e.NewTask(0, 0, options.timeout, None, None if options.retry is None else options.retry.deaths)


def as_task(future: SafeFuture, payload: Payload | tuple[Any, ...]) -> e.NewTask | int:
    """What the core has to know of it; its number, if that is all but for what is the same for all of its kind."""
    kind = future._kind
    size = payload.size_bytes() if isinstance(payload, Payload) else 0
    if size <= PLAIN_BYTES and kind.is_alike:
        return future._task
    options = kind.options
    deadline = None if options.deadline is None else future._submitted + options.deadline
    if options.retry is None:
        return e.NewTask(future._task, size, options.timeout, deadline)
    if isinstance(options.retry, Retry):
        return e.NewTask(future._task, size, options.timeout, deadline, options.retry.deaths)
    # A tenacity policy may want to see results too.
    return e.NewTask(future._task, size, options.timeout, deadline, DEATHS, judge_results=True)
