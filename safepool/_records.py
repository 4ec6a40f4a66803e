"""What the core knows of one task and of one worker.  Records; the core alone changes them."""

from __future__ import annotations

from collections import deque
from itertools import repeat

from ._events import Failure, NewTask
from ._tables import TaskState, WorkerState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Task:
    """A call, from its submission until it is settled."""

    # No __slots__: what is only set for the few that need it costs nothing for the many.
    state = TaskState.QUEUED
    worker: int | None = None
    attempt = 1
    deaths = 0
    near_deaths = 0
    ok: bool | None = None  # an outcome that its worker sent; None: ``failure`` tells
    failure: Failure | None = None
    wish: Failure | None = None  # to be settled so as soon as its worker lets go of it ...
    wish_kills = False  # ... and the worker is killed if it does not

    def __init__(self, new: NewTask) -> None:
        self.new = new

    def __repr__(self) -> str:
        return f"<task {self.new.task} {self.state.value} attempt {self.attempt} at worker {self.worker}>"


class Worker:
    """A process that has a seat, from its launch until its death."""

    __slots__ = (
        "begun", "begun_at", "booted", "ended_by_us", "is_watched", "kills", "left", "levelled", "looked_up", "lost",
        "number", "quiet_since", "ready", "sent", "sent_bytes", "start_is_awaited", "state", "unfit", "waited_s",
    )  # fmt: skip

    def __init__(self, number: int, left: int | None) -> None:
        self.number = number
        self.state = WorkerState.STARTING
        self.booted = False
        self.ready = False
        self.ended_by_us = False  # its death is no surprise
        self.sent: deque[int | Task] = deque()  # in the order in which it will run them; plain ones are numbers
        self.sent_bytes = 0
        self.begun = False  # it acknowledged the first of ``sent``
        self.begun_at = 0.0
        self.left = left  # tasks it may still be sent
        self.levelled = 0  # what it ran when what waited behind that was taken from it, and nothing was sent since
        self.looked_up = 0  # what it was to run when it was last looked up for that whether it does
        self.kills = 0
        self.lost = ""  # what was wrong with its channel
        self.unfit = ""  # why its initializer failed
        self.quiet_since = 0.0  # it has had its first task to do since then
        self.waited_s = 0.0  # that it has had tasks, which were taken from it, and has begun none
        self.start_is_awaited = False  # a timer looks at that
        self.is_watched = False  # a timer looks whether tasks wait behind one that takes too long

    def number_at_head(self) -> int:
        """Of the task that it runs, or runs next."""
        head = self.sent[0]
        return head if isinstance(head, int) else head.new.task

    def run_s(self, now: float) -> float:
        """That its first task has run, in seconds; also if nobody has asked yet whether that has begun."""
        return now - self.quiet_since if self.sent else 0.0

    def __repr__(self) -> str:
        return f"<worker {self.number} {self.state.value} has {len(self.sent)}{' begun' if self.begun else ''}>"


def popped(queue: deque[int | Task], count: int) -> list[Any]:
    """The first ``count``, in the quickest way."""
    return list(map(deque.popleft, repeat(queue, count)))
