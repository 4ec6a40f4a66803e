"""Tells a callback of the user's what becomes of tasks and workers: an observer, which changes nothing."""

from __future__ import annotations

import threading
from collections import deque
from functools import partial

from . import _events as e
from ._log import ERROR, tell
from ._shapes import NamedTuple
from ._words import words_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Literal

    from ._watchdog import Observed
    from .future import SafeFuture

    Deliver = Callable[[Callable[[], object]], None]
    What = Literal["returned", "failed", "cancelled", "retried", "worker started", "worker ended"]


LOCK_LIMIT_S = 1.0
SUMMED_UP = ("returned", "cancelled")


class PoolEvent(NamedTuple):
    """What a pool tells its ``on_event``.

    ``what``: ``"returned"``, ``"failed"`` (it raised, or its worker died, or it was stopped at a limit) or
    ``"cancelled"`` of tasks that are done; ``"retried"`` of an attempt after which there will be another one;
    ``"worker started"``, ``"worker ended"``.  ``done``: how many tasks are done by it; those that return, or are
    cancelled, in the same moment are told of together.  ``task``: which one failed or is tried again, and ``why``, in
    a line.  ``pid``: of the worker, where it is about one.
    """

    what: What
    done: int = 0
    task: str = ""
    why: str = ""
    pid: int | None = None


class Teller:
    """Sees the events and commands of one pool, on its watchdog; the callback is called where all callbacks are."""

    def __init__(self, on_event: Callable[[PoolEvent], object]) -> None:
        self._on_event = on_event
        self._fresh: list[PoolEvent] = []  # of this round of the watchdog
        self._lock = threading.Lock()  # of the next two: the watchdog adds, the thread that calls takes
        self._due: list[PoolEvent] = []
        self._is_calling = False
        self._unsent: deque[PoolEvent] = deque()  # added by any thread, a finalizer's too, without a lock
        self._why: dict[int, str] = {}  # of tasks whose retry policy is asked: what its last attempt came to

    def saw(self, event: e.Event, commands: Sequence[e.Command], pool: Observed) -> None:
        """``commands``: the core's answer to ``event``, not yet carried out."""
        for command in commands:
            kind = type(command)
            if kind is e.Resolve:
                self._resolved(event, command.tasks, pool)  # type: ignore[union-attr]
            elif kind is e.Fail:
                self._failed(command, pool)  # type: ignore[arg-type]
            elif kind is e.Cancel:
                self._add("cancelled", len(command.tasks))  # type: ignore[union-attr]
            elif kind is e.AskRetry:
                task, failure = command.task, command.failure  # type: ignore[union-attr]
                self._why[task] = (failure.kind == "error" and pool.text_of(task)) or e.WORDS[failure.kind]
            elif kind is e.Requeue and type(event) is e.RetryAnswered:
                self._fresh.append(PoolEvent("retried", 0, str(pool.one(event.task)), self._why.pop(event.task, "")))
        if type(event) is e.AnsweredDirectly:
            self._add("returned", event.results)
        elif type(event) is e.WorkerReady:
            self._fresh.append(PoolEvent("worker started", pid=pool.pid_of(event.worker)))
        elif type(event) is e.WorkerDied:
            why = "" if event.exitcode is None else f"exit code {event.exitcode}"
            self._fresh.append(PoolEvent("worker ended", why=why, pid=pool.pid_of(event.worker)))

    def unsent(self, future: SafeFuture, error: BaseException) -> None:
        """On the thread of whoever submitted it: the call could not be pickled."""
        self._unsent.append(PoolEvent("failed", 1, str(future), words_of(error)))
        future._home.post(_nothing)  # the watchdog comes round and hands it on

    def round_ended(self, pool: Observed) -> None:
        """All commands are carried out: whoever is told of a task finds it done."""
        while self._unsent:
            self._fresh.append(self._unsent.popleft())
        # Scenario 1: (a) the thread that calls has the lock, (b) the collector runs a finalizer there that waits for
        # the pool.  Then this goes with what comes next.
        if self._fresh and self._lock.acquire(timeout=LOCK_LIMIT_S):
            fresh, self._fresh = self._fresh, []
            self._hand_on(fresh, pool.deliver)

    def _resolved(self, event: e.Event, tasks: tuple[int, ...], pool: Observed) -> None:
        failed = pool.failed_of(event, tasks)
        if len(tasks) > len(failed):
            self._add("returned", len(tasks) - len(failed))
        if self._why and len(tasks) > len(failed):
            for task in set(tasks).difference(failed):
                self._why.pop(task, None)  # its result was accepted
        for task in failed:
            why = self._why.pop(task, "") or pool.why_of(task) or e.WORDS["error"]
            self._fresh.append(PoolEvent("failed", 1, str(pool.one(task)), why))

    def _failed(self, command: e.Fail, pool: Observed) -> None:
        failure = command.failure
        self._why.pop(command.task, None)
        if failure.kind == "cancelled":
            self._add("cancelled", 1)
            return
        pid = None if failure.worker is None else pool.pid_of(failure.worker)
        self._fresh.append(PoolEvent("failed", 1, str(pool.one(command.task)), e.WORDS[failure.kind], pid))

    def _add(self, what: What, done: int) -> None:
        _put(self._fresh, PoolEvent(what, done))

    def _hand_on(self, fresh: list[PoolEvent], deliver: Deliver) -> None:
        """The lock is held.  A callback that is slower than the pool finds what has come meanwhile, summed up."""
        try:
            for event in fresh:
                _put(self._due, event)
            was_calling, self._is_calling = self._is_calling, True
        finally:
            self._lock.release()
        if not was_calling:
            deliver(partial(self._call, deliver))

    def _call(self, deliver: Deliver) -> None:
        """With one event: each is a job of its own, for the patience of who runs them."""
        with self._lock:
            event = self._due.pop(0)
        try:
            self._on_event(event)
        except BaseException as error:  # SystemExit of one is not to keep it from the others
            tell(ERROR, "exception calling on_event with %r", event, error=error)
        with self._lock:
            self._is_calling = bool(self._due)
        if self._is_calling:
            deliver(partial(self._call, deliver))


def _nothing() -> None:
    pass


def _put(events: list[PoolEvent], event: PoolEvent) -> None:
    last = events[-1] if events else None
    if last is not None and last.what == event.what and event.what in SUMMED_UP:
        events[-1] = last._replace(done=last.done + event.done)
    else:
        events.append(event)
