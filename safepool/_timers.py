"""What is due when: a heap of moments, whose entries are passed over once they mean nothing any more."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any, NamedTuple

PRUNE_AT = 64


class Timer(NamedTuple):
    """At ``when``, call ``act(*key)`` if ``is_alive(*key)`` still holds."""

    when: float
    number: int  # of two at the same moment the older comes first
    is_alive: Callable[..., bool]
    act: Callable[..., None]
    key: tuple[Any, ...]

    def means_something(self) -> bool:
        return self.is_alive(*self.key)


class Timers:
    """The timers of one pool; it has no clock, the caller does."""

    def __init__(self) -> None:
        self._heap: list[Timer] = []
        self._count = 0
        self._prune_at = PRUNE_AT

    def at(self, when: float, is_alive: Callable[..., bool], act: Callable[..., None], *key: Any) -> None:
        if len(self._heap) >= self._prune_at:
            # Most timers are limits of tasks that end long before: without this they would pile up.
            self._heap = self.alive()
            heapq.heapify(self._heap)
            self._prune_at = 2 * len(self._heap) + PRUNE_AT
        self._count += 1
        heapq.heappush(self._heap, Timer(when, self._count, is_alive, act, key))

    def next_deadline(self) -> float | None:
        while self._heap and not self._heap[0].means_something():
            heapq.heappop(self._heap)
        return self._heap[0].when if self._heap else None

    def fire(self, now: float) -> None:
        """Carry out what is due; what that adds for ``now`` is carried out too."""
        while self._heap and self._heap[0].when <= now:
            timer = heapq.heappop(self._heap)
            if timer.means_something():
                timer.act(*timer.key)

    def alive(self) -> list[Timer]:
        return [timer for timer in self._heap if timer.means_something()]

    def clear(self) -> None:
        self._heap.clear()


def always(*key: Any) -> bool:
    """Is alive: a timer that means something whatever happens."""
    return True
