"""Tasks that one worker has under one ticket.  To whoever sends it, a batch is as a future.

The worker tells what they came to in one answer, or in parts; what is known before, from its board, is taken early.
"""

from __future__ import annotations

from ._link import Answer
from ._wire import text_and_body

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from .future import Kind, SafeFuture


class Batch:
    """Tasks, counted from 0; those from ``start`` to ``stop`` are not answered."""

    __slots__ = ("_early", "_kind", "how", "parts", "start", "stop")
    is_batch = True

    def __init__(self, kind: Kind, how: int, start: int, stop: int) -> None:
        self._kind = kind
        self.how = how  # flags of ``_unpack``: what each of the payload is
        self.start = start
        self.stop = stop
        self.parts = 0  # that the worker has sent so far
        self._early = 0  # of the next part: so many are known already

    @property
    def _payload(self) -> list[Any]:
        """The arguments of each that is not answered."""
        raise NotImplementedError

    def _numbers(self, start: int, stop: int) -> Sequence[int]:
        raise NotImplementedError

    def _store(self, start: int, outcomes: list[Any], pid: int) -> list[int]:
        """What these came to; those that raised, as far as anybody asks."""
        raise NotImplementedError

    def one(self) -> SafeFuture | None:
        """The future of the task that runs, or runs next; None: it has none."""
        return None

    @property
    def _task(self) -> int:
        """Of the task that is the next to be answered; of the last one, if all are known already."""
        at = min(self.start, self.stop - 1)
        return self._numbers(at, at + 1)[0]

    def tasks(self) -> Sequence[int]:
        return self._numbers(self.start, self.stop)

    def nth(self, at: int) -> int:
        """The task that is number ``at`` of the next part."""
        at += self.start - self._early
        return self._numbers(at, at + 1)[0]

    def running(self, ended: int) -> int | None:
        """The task that runs, if so many of the next part have ended."""
        at = self.start - self._early + ended
        return self._numbers(at, at + 1)[0] if self.start <= at < self.stop else None

    def is_many(self) -> bool:
        """To be answered."""
        return self.stop - self.start > 1

    def has_more(self, ended: int) -> bool:
        """Beyond the one that runs then?"""
        return self.start - self._early + ended + 1 < self.stop

    def take(self, outcomes: list[Any], pid: int, raised: list[int]) -> Sequence[int]:
        """Those that are answered now.  Raises ``ValueError`` if these are not the answers of this batch."""
        answered = self._take(outcomes[self._early :], pid, raised)
        self._early = 0
        self.parts += 1
        return answered

    def take_early(self, outcomes: list[Any], pid: int, raised: list[int]) -> Sequence[int]:
        """Those that are known before they are sent: ``take`` will bring them again."""
        answered = self._take(outcomes[self._early :], pid, raised)
        self._early = max(self._early, len(outcomes))
        return answered

    def _take(self, outcomes: list[Any], pid: int, raised: list[int]) -> Sequence[int]:
        start, stop = self.start, self.start + len(outcomes)
        if stop > self.stop:
            raise ValueError(f"{len(outcomes)} answers for {self.stop - start} tasks")
        answered = self._numbers(start, stop)
        raised += self._store(start, outcomes, pid)
        self.start = stop
        return answered

    def cut(self, ended: int) -> tuple[int, ...]:
        """The tasks after the one that runs, if so many have ended in this part; they belong to it no more."""
        stop = self.start + ended - self._early + 1
        if stop >= self.stop:
            return ()
        rest = tuple(self._numbers(stop, self.stop))
        self.stop = stop
        return rest


class Futures(Batch):
    """Those of calls of one kind, with plain arguments."""

    __slots__ = ("_futures", "_tasks")

    def __init__(self, futures: list[SafeFuture]) -> None:
        super().__init__(futures[0]._kind, 0, 0, len(futures))
        self._futures: list[Any] = futures
        self._tasks = tuple([future._task for future in futures])

    @property
    def _payload(self) -> list[Any]:
        return [future._payload for future in self._futures[self.start : self.stop]]

    def _numbers(self, start: int, stop: int) -> Sequence[int]:
        return self._tasks[start:stop]

    def one(self) -> SafeFuture | None:
        future: SafeFuture | None = self._futures[self.start] if self.start < self.stop else None
        return future

    def _store(self, start: int, outcomes: list[Any], pid: int) -> list[int]:
        futures, raised = self._futures, list[int]()
        stop = start + len(outcomes)
        for future, outcome in zip(futures[start:stop], outcomes):
            future._pid = pid
            if type(outcome) is not tuple:
                future._result = outcome
            elif not future.done():  # (else its pool was ended: what the user was told stands)
                returned, body = outcome
                text, body = (b"", body) if returned else text_and_body(body)
                future.keep(Answer(returned, text, body))
                if not returned:
                    raised.append(future._task)
        futures[start:stop] = [None] * len(outcomes)  # what the user drops is not kept here
        return raised


def gathered(futures: list[SafeFuture], together: int) -> list[SafeFuture | Batch]:
    """The same in order, those that may share a ticket in batches of at most ``together``."""
    found: list[SafeFuture | Batch] = []
    run: list[SafeFuture] = []
    kind: Kind | None = None
    for future in futures:
        if future._kind is kind and type(future._payload) is tuple:
            run.append(future)
            continue
        found += _batches(run, together)
        run = [future]
        kind = future._kind if future._kind.shares_ticket and type(future._payload) is tuple else None
    found += _batches(run, together)
    return found


def _batches(run: list[SafeFuture], together: int) -> list[SafeFuture | Batch]:
    """(For one alone a batch is worth nothing.)"""
    parts = [run[at : at + together] for at in range(0, len(run), together)]
    return [Futures(part) if len(part) > 1 else part[0] for part in parts]
