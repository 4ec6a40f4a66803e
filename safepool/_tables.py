"""The lifecycles of a worker, a task and a pool, as tables: an edge that is not here is a bug."""

from __future__ import annotations

from enum import Enum


class _State(Enum):
    # Identity hashing: the default hashes the name in Python code, on the hottest path of the core.
    __hash__ = object.__hash__


class WorkerState(_State):
    STARTING = "starting"  # launched, not yet ready for a task
    IDLE = "idle"
    BUSY = "busy"  # has tasks; the first of them may be running
    RETIRING = "retiring"  # asked to exit
    KILLING = "killing"  # a signal is on its way
    DEAD = "dead"  # and only now its seat is free


class TaskState(_State):
    QUEUED = "queued"
    SENT = "sent"  # at a worker, which may not have begun
    RUNNING = "running"  # a live worker acknowledged the start
    DOOMED = "doomed"  # its worker is being killed because of it
    ASKED = "asked"  # its retry policy is thinking
    BACKOFF = "backoff"
    SETTLED = "settled"


class PoolState(_State):
    OPEN = "open"
    DRAINING = "draining"  # no new tasks; what was submitted is finished
    CANCELLING = "cancelling"  # no new tasks; what has not begun is cancelled
    BROKEN = "broken"  # every task has failed; workers are being killed
    CLOSED = "closed"


_W, _T, _P = WorkerState, TaskState, PoolState

WORKER_EDGES: dict[WorkerState, frozenset[WorkerState]] = {
    _W.STARTING: frozenset({_W.IDLE, _W.RETIRING, _W.KILLING, _W.DEAD}),
    _W.IDLE: frozenset({_W.BUSY, _W.RETIRING, _W.KILLING, _W.DEAD}),
    _W.BUSY: frozenset({_W.IDLE, _W.RETIRING, _W.KILLING, _W.DEAD}),
    _W.RETIRING: frozenset({_W.KILLING, _W.DEAD}),
    _W.KILLING: frozenset({_W.DEAD}),
    _W.DEAD: frozenset(),
}

TASK_EDGES: dict[TaskState, frozenset[TaskState]] = {
    _T.QUEUED: frozenset({_T.SENT, _T.SETTLED}),
    _T.SENT: frozenset({_T.RUNNING, _T.QUEUED, _T.DOOMED, _T.ASKED, _T.SETTLED}),
    # (To QUEUED: its worker had drawn the ticket of a batch, and ended before it came to this one.)
    _T.RUNNING: frozenset({_T.DOOMED, _T.ASKED, _T.SETTLED, _T.QUEUED}),
    _T.DOOMED: frozenset({_T.ASKED, _T.SETTLED}),
    _T.ASKED: frozenset({_T.BACKOFF, _T.QUEUED, _T.SETTLED}),
    _T.BACKOFF: frozenset({_T.QUEUED, _T.SETTLED}),
    _T.SETTLED: frozenset(),
}

POOL_EDGES: dict[PoolState, frozenset[PoolState]] = {
    _P.OPEN: frozenset({_P.DRAINING, _P.CANCELLING, _P.BROKEN}),
    _P.DRAINING: frozenset({_P.CANCELLING, _P.BROKEN, _P.CLOSED}),
    _P.CANCELLING: frozenset({_P.BROKEN, _P.CLOSED}),
    _P.BROKEN: frozenset({_P.CLOSED}),
    _P.CLOSED: frozenset(),
}


class IllegalTransition(AssertionError):
    """A bug in the pool: a lifecycle took an edge that its table does not have."""
