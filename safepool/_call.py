"""One task as the watchdog holds it until its future is done: future, payload, options, and what came of it."""

from __future__ import annotations

from . import _events as e
from ._link import Answer
from ._payload import Payload
from .errors import Attempt, with_attempts
from .future import SafeFuture
from .policy import Retry, TaskOptions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ._retry import Judge

PLAIN = TaskOptions()
DEATHS = 3  # that a task under a tenacity policy may cause, as ``Retry.deaths``


class Call:
    """A submitted call.  Only the watchdog changes it, but for ``ask_policy``."""

    __slots__ = ("_judge", "answer", "error", "future", "is_final", "options", "payload", "submitted")

    def __init__(self, future: SafeFuture, payload: Payload, options: TaskOptions, submitted: float) -> None:
        self.future = future
        self.payload = payload
        self.options = options
        self.submitted = submitted
        self.answer: Answer | None = None
        self.error: BaseException | None = None  # in place of the answer
        self.is_final = False  # ``error`` is what the retry policy left, attempts and all
        self._judge: Judge | None = None

    def as_new_task(self) -> e.NewTask:
        """What the core has to know of it."""
        task, size, options = self.future._task, self.payload.size_bytes(), self.options
        if options is PLAIN or (options.timeout is None and options.deadline is None and options.retry is None):
            return tuple.__new__(e.NewTask, (task, size, None, None, None, False))
        deadline = None if options.deadline is None else self.submitted + options.deadline
        if options.retry is None:
            return e.NewTask(task, size, options.timeout, deadline)
        if isinstance(options.retry, Retry):
            return e.NewTask(task, size, options.timeout, deadline, options.retry.deaths)
        # A tenacity policy may want to see results too.
        return e.NewTask(task, size, options.timeout, deadline, DEATHS, judge_results=True)

    def ask_policy(self, kind: str, attempt: int, pid: int | None, ended: float) -> float | None:
        """On the retries' thread: ask the policy about this attempt, and note the attempt on the future.

        How many seconds to wait before the next one; None: the outcome stands.
        """
        if self._judge is None:
            from ._retry import Judge

            assert self.options.retry is not None
            self._judge = Judge(self.options.retry, self.submitted)
        future = self.future
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

    def __repr__(self) -> str:
        return f"<Call {self.future} {self.options}>"
