"""Counts what became of the tasks and workers of pools: an observer, which changes nothing.

A program that swallows the errors of its tasks and exits with 0 is told all the same what went wrong.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from . import _events as e
from ._stream import Item
from ._summary import COUNTS, MOST_TOLD
from ._watchdog import Observed
from ._words import words_of
from .errors import _Facts
from .future import SafeFuture

LOCK_LIMIT_S = 1.0
#: Why an attempt was stopped, if it was running.
STOPPED = ("timeout", "deadline", "cancelled", "terminated")


class Tally:
    """The sums of some pools; ``seconds_lost`` is the run time of attempts that came to nothing."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(COUNTS, 0)
        self.seconds_lost = 0.0
        self.failures: list[tuple[str, str]] = []  # the first of them: (task, why)
        self._lock = threading.RLock()
        self._fresh: list[tuple[SafeFuture, str]] = []  # failed a moment ago; its error is set by now, or soon

    def pool(self) -> PoolTally:
        """The observer of one more pool."""
        self.add(pools=1)
        return PoolTally(self)

    def add(self, *, seconds_lost: float = 0.0, **counts: int) -> None:
        if self._lock.acquire(timeout=LOCK_LIMIT_S):
            try:
                self.seconds_lost += seconds_lost
                for name, count in counts.items():
                    self.counts[name] += count
            finally:
                self._lock.release()

    def add_failure(self, future: SafeFuture | None, why: str) -> None:
        """``why``: "" if it is on the future in a moment; None: an item of a ``map`` that is over."""
        self.add(failed=1)
        self._name_failures()
        if future is not None and len(self.failures) < MOST_TOLD:
            self._fresh.append((future, why))

    def _name_failures(self) -> None:
        for fresh in tuple(self._fresh):
            future, why = fresh
            if why or future.done():
                with suppress(ValueError):  # another thread has just named it
                    self._fresh.remove(fresh)
                    self.failures.append((str(future), why or _words_of(future._exception)))

    def as_dict(self) -> dict[str, Any]:
        """What JSON takes."""
        self._name_failures()
        failures = [{"task": task, "why": why} for task, why in self.failures]
        return {**self.counts, "seconds_lost": round(self.seconds_lost, 3), "failures": failures}


class PoolTally:
    """Sees the events and commands of one pool, on its watchdog."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._asked: dict[int, float] = {}  # tasks whose retry policy is asked: what is lost if another attempt follows
        self._sent_home: set[int] = set()  # workers that end because the pool wants it (and not: that are lost already)

    def saw(self, event: e.Event, commands: Sequence[e.Command], pool: Observed) -> None:
        """``commands``: the core's answer to ``event``, not yet carried out."""
        for command in commands:
            kind = type(command)
            if kind is e.Resolve:
                self._resolved(event, command.tasks, pool)  # type: ignore[union-attr]
            elif kind is e.Fail:
                self._failed(command.task, command.failure, pool)  # type: ignore[union-attr]
            elif kind is e.Cancel:
                self._tally.add(cancelled=len(command.tasks))  # type: ignore[union-attr]
            elif kind is e.AskRetry:
                self._was_asked(command.task, command.failure)  # type: ignore[union-attr]
            elif (kind is e.Kill or kind is e.AskExit) and type(event) is not e.ChannelLost:
                self._sent_home.add(command.worker)  # type: ignore[union-attr]
            elif kind is e.Requeue and type(event) is e.RetryAnswered:
                self._tally.add(retried=1, seconds_lost=self._asked.pop(event.task, 0.0))
        if type(event) is e.AnsweredDirectly:
            self._tally.add(done=event.results)
        if type(event) is e.WorkerDied:
            if event.worker not in self._sent_home:
                self._tally.add(workers_lost=1)
            self._sent_home.discard(event.worker)

    def round_ended(self, pool: Observed) -> None:
        pass

    def unsent(self, future: SafeFuture, error: BaseException) -> None:
        """On the thread of whoever submitted it: the call could not be pickled."""
        self._tally.add_failure(future, words_of(error))

    def _resolved(self, event: e.Event, tasks: tuple[int, ...], pool: Observed) -> None:
        failed = pool.failed_of(event, tasks)
        self._tally.add(done=len(tasks) - len(failed))
        for task in failed:
            if self._asked.pop(task, None) is None and type(event) is e.Received:
                self._tally.add(seconds_lost=event.run_s)
            self._tally.add_failure(pool.one(task), pool.why_of(task) or e.WORDS["error"])
        if self._asked:
            for task in tasks:
                self._asked.pop(task, None)

    def _was_asked(self, task: int, failure: e.Failure) -> None:
        is_result = failure.kind == "result"
        self._asked[task] = failure.ran_s if is_result else 0.0
        if not is_result:
            self._lost(failure)

    def _failed(self, task: int, failure: e.Failure, pool: Observed) -> None:
        if self._asked.pop(task, None) is None:
            self._lost(failure)
        if failure.kind == "cancelled":
            self._tally.add(cancelled=1)
        else:
            future = pool.one(task)
            self._tally.add_failure(future, e.WORDS[failure.kind] if isinstance(future, Item) else "")

    def _lost(self, failure: e.Failure) -> None:
        """An attempt came to nothing."""
        self._tally.add(seconds_lost=failure.ran_s, killed=int(failure.ran_s > 0 and failure.kind in STOPPED))


def _words_of(error: BaseException | None) -> str:
    """The methods of an error of the user's must not be called here."""
    return f"{type(error).__name__}: {error}" if issubclass(type(error), _Facts) else type(error).__name__
