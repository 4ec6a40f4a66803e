"""The vocabulary: what happened (events) and what must be done (commands).  Data, no behaviour.

Tasks and workers are whole numbers here; payloads, futures and processes stay with the watchdog.
Every event carries ``now``, in monotonic seconds.
"""

from __future__ import annotations

from ._shapes import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal

    #: Why an attempt or a task came to nothing.
    FailureKind = Literal[
        "error",  # the task raised
        "result",  # the task returned something its retry policy may not accept
        "timeout",  # one attempt took too long
        "deadline",  # all of it took too long
        "death",  # the worker died
        "poison",  # too many workers died
        "cancelled",  # the user does not want it any more
        "terminated",  # the user ended the workers
        "broken",  # the pool cannot run anything
    ]

#: For people: what happened to a task that ended so.
WORDS = {
    "error": "it raised",
    "result": "its result was not accepted",
    "timeout": "it took longer than its timeout",
    "deadline": "it was not done at its deadline",
    "death": "its worker died",
    "poison": "too many workers died of it",
    "cancelled": "it was cancelled",
    "terminated": "the workers were ended",
    "broken": "the pool is broken",
}

#: The ``reason`` of a "timeout": nothing in the pool had moved for too long.
STALL = "stall"


class Failure(NamedTuple):
    """The facts of a failure, from which the watchdog makes an exception."""

    kind: FailureKind
    worker: int | None = None
    exitcode: int | None = None
    seconds: float = 0.0
    deaths: int = 0
    reason: str = ""
    peak_bytes: int | None = None
    ran_s: float = 0.0  # that the attempt had run, as far as it is known


class NewTask(NamedTuple):
    """What the core knows of a task.  ``deaths`` is None if nothing is ever retried."""

    task: int
    size_bytes: int = 0
    timeout: float | None = None
    deadline: float | None = None
    deaths: int | None = None
    judge_results: bool = False


# ------------------------------------------------------------------ events


class TasksSubmitted(NamedTuple):
    """``tasks``: in order; a plain one, with nothing to be known of it, is its number.

    ``plain``: all are numbers; ``like``: and what is to be known of each is the same (but for its number).
    """

    now: float
    tasks: tuple[NewTask | int, ...]
    plain: bool = False
    like: NewTask | None = None


class SentDirectly(NamedTuple):
    """A caller has sent this new plain task to a worker that was lent to it: see ``Core.lendable``."""

    now: float
    worker: int
    task: int


class AnsweredDirectly(NamedTuple):
    """Callers have sent ``results`` plain tasks to a lent worker, one after another, and had the results themselves.

    ``run_s``: their mean run time, in seconds.
    """

    now: float
    worker: int
    results: int
    run_s: float


class CancelRequested(NamedTuple):
    """A user cancelled the task; with ``kill`` also if it is running.  ``unsent``: it is in the queue, surely."""

    now: float
    task: int
    kill: bool = False
    unsent: bool = False


class WorkerBooted(NamedTuple):
    """The worker speaks; its initializer is about to run."""

    now: float
    worker: int


class WorkerReady(NamedTuple):
    now: float
    worker: int


class WorkerUnfit(NamedTuple):
    """The initializer raised in the worker."""

    now: float
    worker: int
    reason: str


class Received(NamedTuple):
    """All that one wake-up read from one worker: ``finished`` in order, then the task it has ``begun``.

    ``raised``: those of them that did not return; ``run_s``: the mean run time of the finished ones, in seconds.
    That a plain task has begun at a worker that had nothing to do is not told, but answered to ``Look``.
    """

    now: float
    worker: int
    finished: tuple[int, ...]
    begun: int | None = None
    run_s: float = 0.0
    raised: frozenset[int] = frozenset()


class RangeCancelled(NamedTuple):
    """A user wants none of the tasks from ``first`` to ``last`` any more, which are plain; those in the queue go."""

    now: float
    first: int
    last: int


class Withheld(NamedTuple):
    """These tasks were not sent after all: their users had cancelled them a moment before."""

    now: float
    worker: int
    tasks: tuple[int, ...]


class TakenBack(NamedTuple):
    """These tasks were at the worker and had not begun; they never will there."""

    now: float
    worker: int
    tasks: tuple[int, ...]


class WorkerWanted(NamedTuple):
    """A call came that could not be pickled: the stock pool starts a worker for it, and so do we."""

    now: float


class ChannelLost(NamedTuple):
    """The worker's channel is closed (``reason`` is empty) or speaks nonsense, and the process still exists."""

    now: float
    worker: int
    reason: str


class WorkerDied(NamedTuple):
    """The process is gone and its channel was read to the end.  ``unbegun`` goes back to the queue."""

    now: float
    worker: int
    exitcode: int | None
    unbegun: tuple[int, ...]
    peak_bytes: int | None = None


class SpawnFailed(NamedTuple):
    """The launch raised.  ``fatal``: it would raise the same every time."""

    now: float
    worker: int
    reason: str
    fatal: bool = False


class RetryAnswered(NamedTuple):
    """The retry policy wants another attempt after ``delay_s`` seconds, or (None) no more."""

    now: float
    task: int
    attempt: int
    delay_s: float | None


class ShutdownRequested(NamedTuple):
    now: float
    cancel: bool


class EndWorkersRequested(NamedTuple):
    """The user ends all workers now, by SIGKILL (``hard``) or SIGTERM first."""

    now: float
    hard: bool


class Ticked(NamedTuple):
    """Time passed; timers that are due fire."""

    now: float


Event = (
    TasksSubmitted
    | SentDirectly
    | AnsweredDirectly
    | CancelRequested
    | RangeCancelled
    | WorkerWanted
    | WorkerBooted
    | WorkerReady
    | WorkerUnfit
    | Received
    | Withheld
    | TakenBack
    | ChannelLost
    | WorkerDied
    | SpawnFailed
    | RetryAnswered
    | ShutdownRequested
    | EndWorkersRequested
    | Ticked
)

# ---------------------------------------------------------------- commands


class Spawn(NamedTuple):
    worker: int


class Send(NamedTuple):
    """``together``: so many plain tasks at most may share a ticket, and be answered together."""

    worker: int
    tasks: tuple[int, ...]
    together: int = 1


class TakeBack(NamedTuple):
    """Take back what this worker has not begun; answered by ``TakenBack``, also if it is nothing."""

    worker: int


class Look(NamedTuple):
    """See whether this worker has begun the next of its tasks; answered by ``Received`` if it has."""

    worker: int


class AskExit(NamedTuple):
    worker: int


class Kill(NamedTuple):
    worker: int
    hard: bool


class Abandon(NamedTuple):
    """This worker does not die: let go of it, and answer with ``WorkerDied`` all the same."""

    worker: int


class Began(NamedTuple):
    """A live worker acknowledged the start of the task."""

    task: int
    worker: int


class Requeue(NamedTuple):
    """These tasks wait again; their futures are pending."""

    tasks: tuple[int, ...]


class AskRetry(NamedTuple):
    """Ask the task's retry policy; answered by ``RetryAnswered``."""

    task: int
    attempt: int
    failure: Failure


class Break(NamedTuple):
    """From now on the pool runs nothing, and every task fails like this."""

    failure: Failure


class Resolve(NamedTuple):
    """These tasks end with the outcome that their worker sent."""

    tasks: tuple[int, ...]


class Fail(NamedTuple):
    task: int
    failure: Failure


class Cancel(NamedTuple):
    """These tasks end as cancelled."""

    tasks: tuple[int, ...]


class Close(NamedTuple):
    """Nothing is left: no task, no worker."""


ToWorkers = Spawn | Send | TakeBack | Look | AskExit | Kill | Abandon
OfTasks = Began | Requeue | AskRetry | Resolve | Fail | Cancel
Command = ToWorkers | OfTasks | Break | Close


class Snapshot(NamedTuple):
    """What the core holds, for people and tests: states by task and by worker."""

    pool: str
    tasks: dict[int, str]
    workers: dict[int, str]
    timers: int
    extra: dict[str, Any]
