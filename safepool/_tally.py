"""Counts what became of the tasks and workers of pools: an observer, which changes nothing.

A program that swallows the errors of its tasks and exits with 0 is told all the same what went wrong.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from . import _events as e
from ._link import Answer
from ._summary import COUNTS, MOST_TOLD
from ._words import words_of
from .errors import _Facts
from .future import SafeFuture

LOCK_LIMIT_S = 1.0
MEMBERS = "\n  +-+-"  # from here on a traceback tells those of a group
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

    def add_failure(self, future: SafeFuture, why: str) -> None:
        """``why``: "" if it is on the future in a moment."""
        self.add(failed=1)
        self._name_failures()
        if len(self.failures) < MOST_TOLD:
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
        self._began: dict[int, float] = {}
        self._sent_home: set[int] = set()  # workers that end because the pool wants it (and not: that are lost already)

    def saw(self, event: e.Event, commands: Sequence[e.Command], futures: Mapping[int, SafeFuture]) -> None:
        """``commands``: the core's answer to ``event``, not yet carried out."""
        for command in commands:
            kind = type(command)
            if kind is e.Began:
                self._began[command.task] = event.now  # type: ignore[union-attr]
            elif kind is e.Resolve:
                self._resolved(event.now, [futures[task] for task in command.tasks])  # type: ignore[union-attr]
            elif kind is e.Fail:
                self._failed(event.now, command, futures[command.task])  # type: ignore[arg-type, union-attr]
            elif kind is e.Cancel:
                self._tally.add(cancelled=len(command.tasks))  # type: ignore[union-attr]
            elif kind is e.AskRetry and command.failure.kind != "result":  # type: ignore[union-attr]
                self._attempt_ended(event.now, command.task, command.failure.kind)  # type: ignore[union-attr]
            elif (kind is e.Kill or kind is e.AskExit) and type(event) is not e.ChannelLost:
                self._sent_home.add(command.worker)  # type: ignore[union-attr]
            elif kind is e.Requeue and type(event) is e.RetryAnswered:
                self._attempt_ended(event.now, event.task, "result")
                self._tally.add(retried=1)
        if type(event) is e.WorkerDied:
            if event.worker not in self._sent_home:
                self._tally.add(workers_lost=1)
            self._sent_home.discard(event.worker)

    def unsent(self, future: SafeFuture, error: BaseException) -> None:
        """On the thread of whoever submitted it: the call could not be pickled."""
        self._tally.add_failure(future, words_of(error))

    def _resolved(self, now: float, ended: list[SafeFuture]) -> None:
        done = 0
        for future in ended:
            if _returned(future):
                done += 1
                self._began.pop(future._task, None)
                continue
            self._attempt_ended(now, future._task, "error")
            self._tally.add_failure(future, _last_line(future))
        if done:
            self._tally.add(done=done)

    def _failed(self, now: float, command: e.Fail, future: SafeFuture) -> None:
        self._attempt_ended(now, command.task, command.failure.kind)
        if command.failure.kind == "cancelled":
            self._tally.add(cancelled=1)
        else:
            self._tally.add_failure(future, "")

    def _attempt_ended(self, now: float, task: int, why: str) -> None:
        """It came to nothing."""
        began = self._began.pop(task, None)
        if began is not None:
            self._tally.add(seconds_lost=now - began, killed=int(why in STOPPED))


def _words_of(error: BaseException | None) -> str:
    """The methods of an error of the user's must not be called here."""
    return f"{type(error).__name__}: {error}" if issubclass(type(error), _Facts) else type(error).__name__


def _returned(future: SafeFuture) -> bool:
    record = future._record
    answer = _answer_of(future)
    return (record is None or record.error is None) and (answer is None or answer.ok)


def _answer_of(future: SafeFuture) -> Answer | None:
    record = future._record
    return future._answer if record is None or record.answer is None else record.answer


def _last_line(future: SafeFuture) -> str:
    """Of the traceback that the worker sent: the type and the message of the error, or its first line."""
    record = future._record
    if future.attempts:
        return future.attempts[-1]._words
    answer = _answer_of(future)
    if answer is None or (record is not None and record.error is not None):
        return ""
    text = answer.text.decode(errors="replace").partition(MEMBERS)[0]
    lines = [line.removeprefix("  | ") for line in text.splitlines()]
    frames = [at for at, line in enumerate(lines) if line.startswith("  File ")]
    after = lines[frames[-1] + 1 :] if frames else lines
    return next((line for line in after if line[:1] not in ("", " ")), "it raised")
