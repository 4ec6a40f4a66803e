"""Every way a task or a pool fails is a class here and carries the facts.

Errors of death are ``BrokenProcessPool`` and errors of time are ``TimeoutError``, so code written
for ``concurrent.futures`` catches what it always caught.  The facts are attributes (``error.pid``,
``error.exitcode``, ``error.task`` ...) and part of the message.
"""

from __future__ import annotations

import signal
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from ._shapes import frozen, later
from ._words import safe_repr

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from concurrent.futures import Future
    from typing import Any


@frozen
class Attempt:
    """One failed run of a task.

    ``number`` counts from 1; ``cause`` is ``"error"``, ``"timeout"``, ``"death"`` or ``"result"`` (a
    result that a tenacity predicate did not accept); ``pid`` is the worker's, or None if unknown;
    ``error`` is the exception of this attempt.
    """

    number: int
    cause: str
    pid: int | None
    error: BaseException | None
    # Now, on the thread that made it: a __repr__ of the user's may raise or block, and the watchdog tells attempts.
    _words: str = later(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_words", safe_repr(self.error))

    def __str__(self) -> str:
        return f"attempt {self.number} (worker {self.pid}): {self.cause}: {self._words}"


class _Facts:
    """What the errors below share: facts given by name become attributes and survive pickling."""

    attempts: Sequence[Attempt] = ()
    task: str = "a task"
    pid: int | None = None

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)  # type: ignore[call-arg]  # an exception comes next in the MRO
        self.__dict__.update(facts)

    def __reduce__(self) -> tuple[Any, ...]:
        # The facts as state: they may lead back to this very error.
        return _rebuild, (type(self), self.args), self.__dict__  # type: ignore[attr-defined]


def _rebuild(cls: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    error = cls.__new__(cls)
    error.args = args
    return error


class WorkerDied(_Facts, BrokenProcessPool):
    """The worker that ran this task ended before it answered.

    Attributes: ``pid``, ``exitcode`` (negative: the signal; None: unknown), ``task``, ``attempts``,
    ``peak_bytes`` (the most memory that the worker ever had, as its resident set; None: unknown).
    """

    exitcode: int | None = None
    peak_bytes: int | None = None


class PoisonTask(WorkerDied):
    """This task took down as many workers as its retry policy allows; it is not run again."""

    deaths: int = 0


class TaskTimeout(_Facts, TimeoutError):
    """The task was stopped: it was over its ``timeout`` (one attempt) or ``deadline`` (all of it), or its pool stalled.

    Attributes: ``limit`` (``"timeout"``, ``"deadline"`` or ``"stall_timeout"``), ``seconds``, ``task``, ``pid``,
    ``attempts``.
    """

    limit: str = "timeout"
    seconds: float = 0.0


class PoolBroken(_Facts, BrokenProcessPool):
    """The pool can run nothing any more.  ``reason`` says why; ``event_log`` holds its last events."""

    reason: str = ""
    event_log: Sequence[str] = ()


class WorkerStartError(PoolBroken):
    """No worker can be brought up: the launch, the boot or the initializer fails."""


class PoolTerminated(_Facts, BrokenProcessPool):
    """``terminate_workers()`` or ``kill_workers()`` ended the worker that ran this task."""


class TaskUnreadable(_Facts, BrokenProcessPool):
    """The call could not be unpickled in the worker; the cause is attached, the pool goes on."""


class ResultUnreadable(_Facts, BrokenProcessPool):
    """The result or exception of the task could not be unpickled here; the pool goes on."""


class Unfinished(_Facts, TimeoutError):
    """``as_completed`` or ``wait`` ran out of time.  ``unfinished`` is the list of those futures."""

    unfinished: Sequence[Future[Any]] = ()
    seconds: float = 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        facts = {k: v for k, v in self.__dict__.items() if k != "unfinished"}  # futures do not travel
        return _rebuild, (type(self), self.args), facts


class Stalled(Unfinished):
    """None of the awaited futures made progress for ``stall_timeout`` seconds."""


def how_it_ended(exitcode: int | None) -> str:
    """Words for the exit status of a process: ``exit code -9 (SIGKILL: Killed)``."""
    if exitcode is None:
        return "exit status unknown (another part of the program reaped it)"
    if exitcode < 0:
        try:
            name = signal.Signals(-exitcode).name
        except ValueError:
            name = f"signal {-exitcode}"
        return f"exit code {exitcode} ({name}: {signal.strsignal(-exitcode)})"
    return f"EXIT({exitcode}), exit code {exitcode}"


def with_attempts(error: BaseException, attempts: Iterable[Attempt]) -> BaseException:
    """Put the failed attempts on the final exception: as ``.attempts`` and, in words, as notes."""
    told = tuple(attempts)
    # An exception with __slots__, a frozen one, or one with properties of these names may refuse either.
    with _whatever_it_does():
        for attempt in told:
            if attempt.error is not error:
                error.add_note(f"safepool: {attempt}")
    with _whatever_it_does():
        error.attempts = told  # type: ignore[attr-defined]
    return error


@contextmanager
def _whatever_it_does() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise  # the user's
    except BaseException:
        pass
