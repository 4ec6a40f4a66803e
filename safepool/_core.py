"""Decides.  No I/O, clock, thread, random or pickle: same events, same commands.

``Core(policy).handle(event) -> [Command]``, ``next_deadline()`` and ``snapshot()`` are its whole face.

Guarantees:

* every submitted task is settled exactly once, by ``Resolve`` or ``Fail``;
* a worker holds its seat from ``Spawn`` until ``WorkerDied`` (any exit code, 0 included), so there
  are never more than ``max_workers``;
* while a task waits there is a worker that lives or starts, or the pool breaks with the evidence.

Assumes: results are reported before the death of their worker; ``WorkerDied`` names what was not
begun; every command is carried out before the next event.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from typing import Any

from . import _events as e
from ._events import STALL, Command, Event, Failure
from ._records import Task, Worker
from ._tables import POOL_EDGES, TASK_EDGES, WORKER_EDGES, IllegalTransition, PoolState, TaskState, WorkerState
from ._timers import Timers
from .policy import PoolPolicy

W, T, P = WorkerState, TaskState, PoolState

BOOT_LIMIT_S = 60.0  # from launch to the worker's first word; its initializer is not included
RETIRE_GRACE_S = 5.0  # from AskExit to a kill
UNFIT_GRACE_S = 1.0  # for a worker whose initializer failed to end by itself
STARVED_S = 0.8  # a waiting task without a live or starting worker; under the promised second
TERM_GRACE_S = 2.0  # from SIGTERM to SIGKILL
KILL_AGAIN_S = (1.0, 4.0)  # SIGKILL is repeated once, then the worker is given up (D state)
ANSWER_LIMIT_S = 60.0  # for a retry policy to think, those of other tasks before it included
RESPAWN_DELAYS_S = (0.0, 0.05, 0.1, 0.2, 0.4, 1.0, 2.0, 5.0)  # after failed starts, or idle deaths, in a row
HURRIED_S = 0.2  # the longest of them while nobody else is there to work: promise 1 has a second in all
START_FAILURES = 4  # in a row, beyond one per seat: then the pool is broken
SHORTAGE_S = 3.0  # that a waiting task bears with a system that starts no process
UNBEGUN_DEATHS = 3  # workers that died with the same task next in line: then it is the task
ACK_LIMIT_S = 10.0  # for an idle worker to begin what it is sent; after that it is frozen
READ_BYTES_PER_S = 1e6  # and more time for big calls
PURSUE_AGAIN_S = 1.0
AHEAD_S = 0.020  # work kept at a worker, so that it never waits for us
AHEAD_TASKS = 256
AHEAD_BYTES = 256 * 1024


class Core:
    """The state machine of one pool.  See the head of this file for what it guarantees."""

    def __init__(self, policy: PoolPolicy) -> None:
        self._policy = policy
        self._state = P.OPEN
        self._broken_by: Failure | None = None
        self._tasks: dict[int, Task] = {}
        self._workers: dict[int, Worker] = {}
        self._queue: deque[Task] = deque()  # may hold settled tasks; they are passed over
        self._queued = 0
        self._idle: dict[int, Worker] = {}  # the last is the warmest
        self._starting = 0
        self._fit = 0  # starting, idle or busy: what can make progress
        self._timers = Timers()
        self._at = self._timers.at
        self._worker_number = 0
        self._failed_starts = 0
        self._short_since: float | None = None  # starts are refused, and a task waits, since then
        self._idle_deaths = 0  # in a row, without a finished task between them
        self._spawn_from = 0.0
        self._manned = 0  # seats that were in use at some time; a dead worker's is filled again
        self._starved = False
        self._balancing = False
        self._mean_s: float | None = None
        self._moved_at = 0.0  # a task began or ended, or a worker got ready
        self._stall_is_watched = False
        self._now = 0.0
        self._out: list[Command] = []

    # ------------------------------------------------------------------ face

    def handle(self, event: Event) -> list[Command]:
        """What must be done because of ``event``, in this order."""
        self._now = event.now
        self._out = []
        getattr(self, _HANDLERS[type(event)])(event)
        self._assign()
        self._man_the_seats()
        self._level()
        if self._policy.stall_timeout is not None and self._tasks and not self._stall_is_watched:
            self._stall_is_watched = True
            self._moved_at = self._now
            self._at(self._now + self._policy.stall_timeout, _always, self._look_for_stall, self._policy.stall_timeout)
        if self._state is not P.OPEN and not self._tasks:
            self._wind_up()
        return self._out

    def next_deadline(self) -> float | None:
        """When ``Ticked`` is needed at the latest, in monotonic seconds; None: no timer runs."""
        return self._timers.next_deadline()

    def snapshot(self) -> e.Snapshot:
        return e.Snapshot(
            self._state.value,
            {number: task.state.value for number, task in self._tasks.items()},
            {number: worker.state.value for number, worker in self._workers.items()},
            len(self._timers.alive()),
            {"queued": self._queued, "failed_starts": self._failed_starts, "mean_s": self._mean_s},
        )

    def state_of(self, task: int) -> str:
        """The state of a task in a word, and where; for messages."""
        found = self._tasks.get(task)
        if found is None:
            return "settled"
        return found.state.value if found.worker is None else f"{found.state.value} at worker {found.worker}"

    def is_closed(self) -> bool:
        return self._state is P.CLOSED

    def __repr__(self) -> str:
        states = [worker.state.value for worker in self._workers.values()]
        told = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)) or "none"
        return f"<Core {self._state.value}: {len(self._tasks)} tasks ({self._queued} queued), workers: {told}>"

    # ---------------------------------------------------- tasks come and go

    def _on_submitted(self, event: e.TasksSubmitted) -> None:
        for new in event.tasks:
            task = self._tasks[new.task] = Task(new)
            self._queued += 1
            if self._broken_by is not None:
                self._settle(task, self._broken_by)
            elif self._state is P.CANCELLING or self._state is P.CLOSED:
                self._settle(task, Failure("cancelled"))
            else:
                self._queue.append(task)
                if new.deadline is not None:
                    self._at(new.deadline, self._is_live, self._deadline_reached, new.task)

    def _on_wanted(self, event: e.WorkerWanted) -> None:
        # Also beside a worker that has nothing to do: if one of the stock pool's has not worked yet, it starts another.
        most = self._policy.max_workers
        self._manned = most if self._policy.start_all else min(most, max(self._manned, len(self._workers) + 1))

    def _on_cancel(self, event: e.CancelRequested) -> None:
        task = self._tasks.get(event.task)
        if task is not None:
            self._withdraw(task, Failure("cancelled"), even_running=event.kill)

    def _withdraw(self, task: Task, why: Failure, *, even_running: bool) -> None:
        """Settle a task before it answers; what runs is killed first if ``even_running``."""
        if task.state in (T.QUEUED, T.BACKOFF, T.ASKED):
            self._settle(task, why)
        elif task.state is T.SENT or (task.state is T.RUNNING and even_running):
            if task.wish is None or not task.wish_kills:  # a kill on its way is not taken back by a mere cancel
                task.wish, task.wish_kills = why, even_running
            self._pursue(task)
        elif task.state is T.DOOMED and even_running:
            task.failure = why  # of two reasons to die the later one forbids another attempt

    def _pursue(self, task: Task) -> None:
        """Take the task from its worker, or (if it is wished so) kill the worker, but never for a neighbour.

        Scenario 1: (a) the task is sent, (b) the user cancels it, (c) the worker draws its ticket.
        Whether (c) came before (b) only the tickets can say: take them back and look.

        Scenario 2: (a) a task goes over its limit, (b) it ends after all, and the worker begins the
        next one, (c) the kill arrives and hits the innocent next one.  So tickets are taken back
        before the kill: then nothing else can begin, and what has begun shows that (b) came first.
        """
        assert task.worker is not None
        worker = self._workers[task.worker]
        if task.state is T.RUNNING and len(worker.sent) == 1:
            self._doom(task, worker)
        else:
            self._out.append(e.TakeBack(worker.number))

    def _on_taken_back(self, event: e.TakenBack) -> None:
        worker = self._workers.get(event.worker)
        if worker is None:
            return
        self._requeue(worker, event.tasks)
        for task in tuple(worker.sent):
            if task.wish is not None and not task.wish_kills:
                task.wish = None  # it has begun: too late to cancel
            elif task.wish is not None and len(worker.sent) == 1:
                self._doom(task, worker)
            elif task.wish is not None:
                # Its answer is on the way, or it is about to begin and ``_task_began`` pursues it.
                # Scenario 5: but a worker that is stopped just now (SIGSTOP) does neither.
                due = self._now + PURSUE_AGAIN_S
                self._at(due, self._is_wished, self._pursue_again, task.new.task, task.attempt)

    def _is_wished(self, number: int, attempt: int) -> bool:
        task = self._tasks.get(number)
        return task is not None and task.attempt == attempt and task.wish is not None and task.worker is not None

    def _pursue_again(self, number: int, attempt: int) -> None:
        """The worker is killed; what it has not begun is requeued, and wishes are granted then."""
        task = self._tasks[number]
        assert task.worker is not None
        worker = self._workers[task.worker]
        if worker.sent[0] is task:
            self._doom(task, worker)
        elif worker.state is not W.KILLING:
            self._kill(worker)

    def _on_withheld(self, event: e.Withheld) -> None:
        worker = self._workers[event.worker]
        for task in worker.sent:
            if task.new.task in event.tasks:
                task.wish = Failure("cancelled")
        self._requeue(worker, event.tasks)

    def _requeue(self, worker: Worker, numbers: Iterable[int]) -> None:
        """Put unbegun tasks back to the head of the queue, in their old order, without counting an attempt."""
        unbegun = set(numbers)
        back = [task for task in worker.sent if task.new.task in unbegun]
        if not back:
            return
        worker.sent = deque(task for task in worker.sent if task.new.task not in unbegun)
        worker.sent_bytes = sum(task.new.size_bytes for task in worker.sent)
        if worker.left is not None:
            worker.left += len(back)
        if not worker.sent:
            worker.begun = False
            if worker.state is W.BUSY:
                self._move_worker(worker, W.IDLE)
        waiting = []
        for task in reversed(back):
            task.worker = None
            self._move_task(task, T.QUEUED)
            self._queue.appendleft(task)
            self._queued += 1
            wish, task.wish = task.wish, None
            if wish is not None:
                self._settle(task, wish)
            elif self._state is P.CANCELLING and (worker.sent or task is not back[0]):
                self._settle(task, Failure("cancelled"))
            else:
                waiting.append(task.new.task)  # also what an idle worker was about to begin: see _cancel_waiting
        if waiting:
            self._out.append(e.Requeue(tuple(waiting)))

    def _settle(self, task: Task, failure: Failure | None = None) -> None:
        """The end of a task: with ``failure``, or else with the outcome its worker sent."""
        if task.state is T.QUEUED:
            self._queued -= 1
        self._move_task(task, T.SETTLED)
        del self._tasks[task.new.task]
        task.worker = None
        if failure is None and task.ok is None:
            failure = task.failure
        self._out.append(e.Resolve((task.new.task,)) if failure is None else e.Fail(task.new.task, failure))

    def _deadline_reached(self, number: int) -> None:
        task = self._tasks[number]
        self._withdraw(task, Failure("deadline", task.worker), even_running=True)

    def _is_live(self, number: int) -> bool:
        return number in self._tasks

    # ------------------------------------------------ attempts and their end

    def _on_received(self, event: e.Received) -> None:
        # Scenario 3: (a) a limit fires and the kill is on its way, (b) the task answers, (c) the worker
        # dies.  The decision of (a) stands: the user may have been told, a retry may be due.
        worker = self._workers.get(event.worker)
        if worker is None or worker.state not in (W.BUSY, W.KILLING):
            return
        done: list[int] = []
        for number, ok in event.finished:
            task = self._pop_sent(worker, number)
            if task is None:
                continue
            task.ok = ok
            if task.new.deaths is None or (ok and not task.new.judge_results):
                self._move_task(task, T.SETTLED)
                del self._tasks[number]
                done.append(number)
            else:
                self._attempt_failed(task, Failure("result" if ok else "error", worker.number))
        if done:
            self._out.append(e.Resolve(tuple(done)))
        self._moved_at = self._now
        if event.finished:
            self._failed_starts = self._idle_deaths = 0
            # Quick to believe that tasks are long, slow to believe that they are short.
            mean = self._mean_s
            self._mean_s = event.run_s if mean is None else max(event.run_s, 0.8 * mean + 0.2 * event.run_s)
        if event.begun is not None:
            self._task_began(worker, event.begun)
        if worker.state is W.BUSY:
            self._after_answers(worker)
        elif worker.sent and worker.kills == 0 and worker.sent[0].new.task in dict(event.finished):
            self._kill(worker)  # what was to end has ended within its grace: there is nothing to wait for

    def _after_answers(self, worker: Worker) -> None:
        if worker.sent and not worker.begun:
            self._await_start(worker)
        elif not worker.sent and worker.left == 0:
            self._retire(worker)
        elif not worker.sent:
            self._move_worker(worker, W.IDLE)

    def _pop_sent(self, worker: Worker, number: int) -> Task | None:
        """The task as it leaves the worker; None for an answer nobody waits for."""
        if not worker.sent or worker.sent[0].new.task != number or worker.sent[0].state is T.DOOMED:
            return None
        task = worker.sent.popleft()
        if task.wish is not None:
            task.wish = None
        worker.sent_bytes -= task.new.size_bytes
        worker.begun = False
        return task

    def _task_began(self, worker: Worker, number: int) -> None:
        if not worker.sent or worker.sent[0].new.task != number or worker.sent[0].state is not T.SENT:
            return
        task = worker.sent[0]
        worker.begun, worker.begun_at = True, self._now
        self._failed_starts = 0
        self._move_task(task, T.RUNNING)
        self._out.append(e.Began(number, worker.number))
        if task.wish is not None and task.wish_kills:
            self._pursue(task)
        elif task.new.timeout is not None:
            self._at(self._now + task.new.timeout, self._is_attempt, self._limit_reached, number, task.attempt)

    def _is_attempt(self, number: int, attempt: int) -> bool:
        task = self._tasks.get(number)
        return task is not None and task.attempt == attempt and task.state is T.RUNNING

    def _limit_reached(self, number: int, attempt: int) -> None:
        task = self._tasks[number]
        self._withdraw(task, Failure("timeout", task.worker, seconds=task.new.timeout or 0.0), even_running=True)

    def _look_for_stall(self, stall_s: float) -> None:
        """What runs is stopped when nothing has moved for so long, and what starts: what waits may do better."""
        self._stall_is_watched = bool(self._tasks)
        if not self._tasks:
            return
        if self._now >= self._moved_at + stall_s:
            self._moved_at = self._now
            for task in tuple(self._tasks.values()):
                if task.state is T.RUNNING:
                    why = Failure("timeout", task.worker, seconds=stall_s, reason=STALL)
                    self._withdraw(task, why, even_running=True)
            for worker in tuple(self._workers.values()) if self._queued else ():
                if worker.state is W.STARTING and worker.booted:
                    self._kill(worker, ours=False)  # its initializer is stuck
        self._at(self._moved_at + stall_s, _always, self._look_for_stall, stall_s)

    def _doom(self, task: Task, worker: Worker) -> None:
        """The task ends with its worker, which holds nothing else."""
        assert task.wish is not None
        self._move_task(task, T.DOOMED)
        task.failure, task.wish = task.wish._replace(worker=worker.number), None
        if worker.state is not W.KILLING:
            self._kill(worker, hard=not self._policy.grace, grace_s=self._policy.grace)

    def _attempt_failed(self, task: Task, failure: Failure) -> None:
        """Retry, as far as the policy of the task and the state of the pool allow; or settle."""
        task.worker, task.failure = None, failure
        if failure.kind == "death":
            task.deaths += 1
        if failure.kind not in ("error", "result"):
            task.ok = None
        limit = task.new.deaths
        final = None if task.ok is not None else failure
        if limit is None or failure.kind in ("cancelled", "deadline", "terminated"):
            self._settle(task, final)
        elif failure.kind == "death" and task.deaths >= limit:
            self._settle(task, failure._replace(kind="poison", deaths=task.deaths))
        elif task.new.deadline is not None and self._now >= task.new.deadline:
            self._settle(task, Failure("deadline", failure.worker))
        elif self._state is P.CANCELLING:
            self._settle(task, final)
        else:
            self._move_task(task, T.ASKED)
            self._out.append(e.AskRetry(task.new.task, task.attempt, failure))
            self._at(self._now + ANSWER_LIMIT_S, self._is_asked, self._no_answer, task.new.task, task.attempt)

    def _is_asked(self, number: int, attempt: int) -> bool:
        task = self._tasks.get(number)
        return task is not None and task.attempt == attempt and task.state is T.ASKED

    def _no_answer(self, number: int, attempt: int) -> None:
        self._settle(self._tasks[number])

    def _on_answer(self, event: e.RetryAnswered) -> None:
        if not self._is_asked(event.task, event.attempt):
            return
        task = self._tasks[event.task]
        if event.delay_s is None or self._state not in (P.OPEN, P.DRAINING):
            self._settle(task)
            return
        task.attempt += 1
        task.ok = None
        self._out.append(e.Requeue((event.task,)))
        if event.delay_s <= 0:
            self._back_off_over(event.task, task.attempt)
        else:
            self._move_task(task, T.BACKOFF)
            due = self._now + event.delay_s
            self._at(due, self._is_backing_off, self._back_off_over, event.task, task.attempt)

    def _is_backing_off(self, number: int, attempt: int) -> bool:
        task = self._tasks.get(number)
        return task is not None and task.attempt == attempt and task.state is T.BACKOFF

    def _back_off_over(self, number: int, attempt: int) -> None:
        task = self._tasks[number]
        self._move_task(task, T.QUEUED)
        self._queue.append(task)
        self._queued += 1

    # ------------------------------------------------- workers come and go

    def _on_booted(self, event: e.WorkerBooted) -> None:
        worker = self._workers.get(event.worker)
        if worker is not None:
            worker.booted = True

    def _on_ready(self, event: e.WorkerReady) -> None:
        worker = self._workers.get(event.worker)
        if worker is None or worker.state is not W.STARTING:
            return
        worker.ready = True
        self._moved_at = self._now
        self._failed_starts = 0
        self._short_since = None
        self._move_worker(worker, W.IDLE)

    def _on_unfit(self, event: e.WorkerUnfit) -> None:
        worker = self._workers.get(event.worker)
        if worker is None:
            return
        worker.unfit = event.reason
        if worker.state is W.STARTING:
            # It ends by itself.  What it logs is on its way: a kill now would lose it.
            self._retire(worker, UNFIT_GRACE_S)

    def _on_spawn_failed(self, event: e.SpawnFailed) -> None:
        worker = self._workers.get(event.worker)
        if worker is None:
            return
        self._bury(worker)
        if self._state is P.CANCELLING:
            self._cancel_waiting(spared=self._starting)
        if event.fatal:
            self._break(Failure("broken", reason=event.reason))
            return
        # The system is short of something, now.  Nobody waits: no harm is done.  A task waits: for a while.
        if not self._queued:
            self._short_since = None
        elif self._short_since is None:
            self._short_since = self._now
        since = self._short_since
        self._start_failed(event.reason, bear=since is None or self._now - since < SHORTAGE_S)

    def _start_failed(self, reason: str, *, bear: bool = False) -> None:
        """OTP's restart intensity: too many failed starts in a row, and nobody who ever got ready, break the pool."""
        self._failed_starts += 1
        limit = self._policy.max_workers + START_FAILURES
        if self._failed_starts >= limit and self._fit == self._starting and not bear:
            reason = f"{self._failed_starts} workers in a row failed to start; the last: {reason}"
            self._break(Failure("broken", reason=reason))
            return
        self._delay_spawn(self._failed_starts)

    def _delay_spawn(self, row: int) -> None:
        self._spawn_at(self._now + RESPAWN_DELAYS_S[min(row, len(RESPAWN_DELAYS_S) - 1)])

    def _spawn_at(self, when: float) -> None:
        self._spawn_from = when
        if when > self._now:
            self._at(when, _always, _nothing)

    def _on_channel_lost(self, event: e.ChannelLost) -> None:
        worker = self._workers.get(event.worker)
        if worker is not None and worker.state in (W.STARTING, W.IDLE, W.BUSY):
            worker.lost = event.reason
            self._kill(worker, ours=False)

    def _on_died(self, event: e.WorkerDied) -> None:
        worker = self._workers.get(event.worker)
        if worker is None:
            return
        # A worker sends the answer of one task before it runs the next: whatever it had drawn
        # tickets for, only the first without an answer can have run.
        first = worker.sent[0] if worker.sent else None
        begun = first is not None and (first.state is T.DOOMED or first.new.task not in event.unbegun)
        self._requeue(worker, [task.new.task for task in worker.sent if not begun or task is not first])
        worker.sent.clear()
        self._bury(worker)
        if first is not None and begun:
            self._moved_at = self._now
            doomed = first.state is T.DOOMED and first.failure is not None
            death = Failure("death", worker.number, event.exitcode, reason=worker.lost, peak_bytes=event.peak_bytes)
            why = first.failure if doomed else death
            assert why is not None
            self._attempt_failed(first, why)
        elif first is not None and first.state is T.QUEUED and not worker.ended_by_us:
            self._blame_unbegun(first, event)
        if worker.unfit:
            self._break(Failure("broken", reason=worker.unfit))
            return
        if self._state is P.CANCELLING:
            self._cancel_waiting(spared=self._starting)  # nobody is started to run what this one was spared for
        if worker.ended_by_us:
            return
        if self._policy.on_worker_death == "break":
            reason = "a worker died, and on_worker_death is 'break'"
            self._break(Failure("broken", worker.number, event.exitcode, reason=reason))
        elif not worker.ready:
            initializer = self._policy.initializer if worker.booted else None
            where = "before it was ready" if initializer is None else f"in its initializer {initializer}"
            self._start_failed(f"worker {worker.number} died {where}, exit code {event.exitcode}")
        elif first is None:
            self._idle_deaths += 1
            self._delay_spawn(self._idle_deaths - 1)

    def _blame_unbegun(self, task: Task, event: e.WorkerDied) -> None:
        # Scenario 4: a call is so big that every worker is killed for its memory while it still reads it.
        # It never begins, is requeued without counting, and would take down workers for ever.
        task.near_deaths += 1
        if task.near_deaths >= UNBEGUN_DEATHS:
            self._settle(task, Failure("poison", event.worker, event.exitcode, deaths=task.near_deaths))

    def _bury(self, worker: Worker) -> None:
        self._move_worker(worker, W.DEAD)
        del self._workers[worker.number]

    def _retire(self, worker: Worker, grace_s: float | None = None) -> None:
        self._move_worker(worker, W.RETIRING)
        worker.ended_by_us = True
        self._out.append(e.AskExit(worker.number))
        grace_s = RETIRE_GRACE_S if grace_s is None else grace_s
        self._at(self._now + grace_s, self._is_retiring, self._retire_overdue, worker.number)

    def _is_retiring(self, number: int) -> bool:
        worker = self._workers.get(number)
        return worker is not None and worker.state is W.RETIRING

    def _retire_overdue(self, number: int) -> None:
        self._kill(self._workers[number])

    def _kill(self, worker: Worker, *, hard: bool = True, ours: bool = True, grace_s: float = TERM_GRACE_S) -> None:
        """A request: only ``WorkerDied`` ends a worker and frees its seat."""
        if worker.state is not W.KILLING:
            self._move_worker(worker, W.KILLING)
            worker.ended_by_us = ours
        self._out.append(e.Kill(worker.number, hard))
        if not hard:
            wait = grace_s
        else:
            wait = KILL_AGAIN_S[min(worker.kills, len(KILL_AGAIN_S) - 1)]
            worker.kills += 1
        self._at(self._now + wait, self._is_dying, self._kill_overdue, worker.number, worker.kills)

    def _is_dying(self, number: int, kills: int) -> bool:
        worker = self._workers.get(number)
        return worker is not None and worker.state is W.KILLING and worker.kills == kills

    def _kill_overdue(self, number: int, kills: int) -> None:
        worker = self._workers[number]
        if kills < len(KILL_AGAIN_S):
            self._kill(worker)
            return
        # A process in uninterruptible sleep ignores even SIGKILL.  Its task must not wait for it.
        self._out.append(e.Abandon(number))

    def _boot_overdue(self, number: int) -> None:
        self._kill(self._workers[number], ours=False)

    def _is_booting(self, number: int) -> bool:
        worker = self._workers.get(number)
        return worker is not None and worker.state is W.STARTING and not worker.booted

    # ------------------------------------------------------- the whole pool

    def _on_shutdown(self, event: e.ShutdownRequested) -> None:
        if self._state is P.OPEN:
            self._move_pool(P.CANCELLING if event.cancel else P.DRAINING)
        elif self._state is P.DRAINING and event.cancel:
            self._move_pool(P.CANCELLING)
        if not event.cancel:
            return
        self._cancel_waiting(spared=self._starting)
        for worker in self._workers.values():
            if len(worker.sent) > worker.begun:
                self._out.append(e.TakeBack(worker.number))

    def _cancel_waiting(self, spared: int) -> None:
        """Settle what no worker has.  ``spared``: so many at the head of the queue run all the same.

        A worker that starts has a task as good as running: the stock pool had handed it out by now,
        and code that cancels at shutdown counts on something being done.
        """
        heads = itertools.islice((task for task in self._queue if task.state is T.QUEUED), spared)
        kept = {task.new.task for task in heads}
        for task in tuple(self._tasks.values()):
            if task.state is T.BACKOFF or (task.state is T.QUEUED and task.new.task not in kept):
                self._settle(task, Failure("cancelled"))
            elif task.state is T.ASKED:
                self._settle(task)

    def _on_end_workers(self, event: e.EndWorkersRequested) -> None:
        self._on_shutdown(e.ShutdownRequested(event.now, True))
        self._cancel_waiting(spared=0)
        for worker in tuple(self._workers.values()):
            # What was sent may have begun: it ends as one whose worker was ended.
            for task in tuple(worker.sent):
                self._settle(task, Failure("terminated", worker.number))
            self._empty(worker)
            if worker.state is not W.KILLING or event.hard:
                self._kill(worker, hard=event.hard)

    def _break(self, failure: Failure) -> None:
        """``failure`` names a worker only if its death alone is the reason."""
        if self._state is P.BROKEN or self._state is P.CLOSED:
            return
        self._move_pool(P.BROKEN)
        self._broken_by = failure
        self._out.append(e.Break(failure))
        for task in tuple(self._tasks.values()):
            self._settle(task, failure)
        for worker in self._workers.values():
            self._empty(worker)
            if worker.state is not W.KILLING:
                self._kill(worker)

    def _empty(self, worker: Worker) -> None:
        """Its tasks are settled: those it has not begun must not begin between now and its death."""
        if len(worker.sent) > worker.begun:
            self._out.append(e.TakeBack(worker.number))
        worker.sent.clear()

    def _wind_up(self) -> None:
        """No task is left and none may come: send the workers home, then close."""
        for worker in self._workers.values():
            if worker.state is W.IDLE:
                self._retire(worker)
            elif worker.state is W.STARTING and worker.booted:
                self._retire(worker)  # it may be in its initializer, with somebody's lock
            elif worker.state is W.STARTING:
                self._kill(worker)
        if not self._workers and self._state is not P.CLOSED:
            self._move_pool(P.CLOSED)
            self._timers.clear()
            self._out.append(e.Close())

    def _on_tick(self, event: e.Ticked) -> None:
        self._timers.fire(event.now)

    # ------------------------------------------------- who gets what, when

    def _assign(self) -> None:
        if not self._queued:
            if self._queue:
                self._queue.clear()
            return
        if self._state is P.BROKEN or self._state is P.CLOSED:
            return
        while self._idle and self._queued:
            worker = self._idle[next(reversed(self._idle))]
            if not self._send(worker, self._share()):
                break
        if self._queued and self._mean_s is not None and self._policy.take_back:
            share = self._share()
            if share <= 1:
                return
            for worker in self._workers.values():
                room = share - len(worker.sent)
                # Refill at half, so that each Send carries many.
                if worker.state is W.BUSY and room * 2 >= share and not self._is_slow(worker):
                    self._send(worker, room)
                    if not self._queued:
                        return

    def _share(self) -> int:
        """How many tasks one worker should hold: about ``AHEAD_S`` of work, but never others' fair part."""
        if self._mean_s is None or not self._policy.take_back:
            return 1
        ahead = AHEAD_TASKS if self._mean_s <= 0 else int(AHEAD_S / self._mean_s)
        fair = -(-self._queued // self._policy.max_workers)
        return max(1, min(ahead, AHEAD_TASKS, fair))

    def _is_slow(self, worker: Worker) -> bool:
        return worker.begun and self._now - worker.begun_at >= AHEAD_S

    def _send(self, worker: Worker, most: int) -> bool:
        if worker.left is not None:
            most = min(most, worker.left)
        batch: list[int] = []
        queue = self._queue
        while queue and len(batch) < most:
            task = queue[0]
            if task.state is not T.QUEUED:
                queue.popleft()  # settled while it waited
                continue
            if worker.sent and worker.sent_bytes + task.new.size_bytes > AHEAD_BYTES:
                break
            queue.popleft()
            self._queued -= 1
            self._move_task(task, T.SENT)
            task.worker = worker.number
            worker.sent.append(task)
            worker.sent_bytes += task.new.size_bytes
            batch.append(task.new.task)
        if batch:
            if worker.left is not None:
                worker.left -= len(batch)
            if worker.state is W.IDLE:
                self._move_worker(worker, W.BUSY)
                self._await_start(worker)
            self._out.append(e.Send(worker.number, tuple(batch)))
        return bool(batch)

    def _await_start(self, worker: Worker) -> None:
        """Scenario 6: an idle worker is stopped, or stuck, and gets a task, whose timeout never starts."""
        worker.quiet_since = self._now
        if not worker.start_is_awaited:
            worker.start_is_awaited = True
            self._at(self._now + ACK_LIMIT_S, self._is_here, self._look_for_start, worker.number)

    def _is_here(self, number: int) -> bool:
        return number in self._workers

    def _look_for_start(self, number: int) -> None:
        worker = self._workers[number]
        worker.start_is_awaited = False
        if worker.state is W.BUSY and worker.sent[0].state is T.SENT:
            due = worker.quiet_since + ACK_LIMIT_S + worker.sent_bytes / READ_BYTES_PER_S
            if self._now >= due:
                self._kill(worker)
            else:
                worker.start_is_awaited = True
                self._at(due, self._is_here, self._look_for_start, number)

    def _man_the_seats(self) -> None:
        """Promise 1: a task that waits has a worker that lives or starts.  And a seat once manned stays so."""
        most = self._policy.max_workers
        wanted = 0
        if self._queued:
            wanted = min(most, most if self._policy.start_all else len(self._workers) + self._queued - self._starting)
            self._manned = max(self._manned, wanted)
        if self._state is P.OPEN:
            wanted = self._manned
        if self._queued and self._fit == self._starting and self._spawn_from > self._now + HURRIED_S:
            self._spawn_at(self._now + HURRIED_S)
        if self._now >= self._spawn_from:
            for _ in range(wanted - len(self._workers)):
                self._spawn()
        if self._queued and self._fit == 0 and not self._starved and self._workers:
            # Every seat is held by a worker that retires or is being killed.
            self._starved = True
            self._at(self._now + STARVED_S, _always, self._starved_too_long)

    def _spawn(self) -> None:
        self._worker_number += 1
        worker = Worker(self._worker_number, self._policy.max_tasks_per_child)
        self._workers[worker.number] = worker
        self._starting += 1
        self._fit += 1
        self._out.append(e.Spawn(worker.number))
        self._at(self._now + BOOT_LIMIT_S, self._is_booting, self._boot_overdue, worker.number)

    def _starved_too_long(self) -> None:
        self._starved = False
        if self._queued and self._fit == 0:
            for worker in tuple(self._workers.values()):
                if worker.state is W.RETIRING:
                    self._kill(worker)

    def _level(self) -> None:
        """Tasks that wait behind a slow one go to a worker, or a seat, that is free."""
        free = bool(self._idle) or len(self._workers) < self._policy.max_workers
        if self._queued or not free or self._balancing or self._mean_s is None:
            return
        for worker in self._workers.values():
            if worker.begun and len(worker.sent) > 1 and worker.state is W.BUSY:
                self._balancing = True
                self._at(max(worker.begun_at, self._now) + AHEAD_S, _always, self._level_now)
                return

    def _level_now(self) -> None:
        self._balancing = False
        if self._queued:
            return
        for worker in self._workers.values():
            if worker.state is W.BUSY and len(worker.sent) > 1 and self._is_slow(worker):
                self._out.append(e.TakeBack(worker.number))

    # --------------------------------------------------------------- plumbing

    def _move_task(self, task: Task, to: TaskState) -> None:
        if to not in TASK_EDGES[task.state]:
            raise IllegalTransition(f"{task!r} may not become {to.value}")
        task.state = to

    def _move_worker(self, worker: Worker, to: WorkerState) -> None:
        was = worker.state
        if to not in WORKER_EDGES[was]:
            raise IllegalTransition(f"{worker!r} may not become {to.value}")
        worker.state = to
        if was is W.IDLE:
            del self._idle[worker.number]
        elif was is W.STARTING:
            self._starting -= 1
        if to is W.IDLE:
            self._idle[worker.number] = worker
        self._fit += (to in _FIT) - (was in _FIT)

    def _move_pool(self, to: PoolState) -> None:
        if to not in POOL_EDGES[self._state]:
            raise IllegalTransition(f"a pool that is {self._state.value} may not become {to.value}")
        self._state = to


_FIT = frozenset({W.STARTING, W.IDLE, W.BUSY})


def _always(*key: Any) -> bool:
    return True


def _nothing(*key: Any) -> None:
    """A timer that only wants ``handle`` to look again."""


_HANDLERS: dict[type, str] = {
    e.TasksSubmitted: "_on_submitted",
    e.WorkerWanted: "_on_wanted",
    e.CancelRequested: "_on_cancel",
    e.WorkerBooted: "_on_booted",
    e.WorkerReady: "_on_ready",
    e.WorkerUnfit: "_on_unfit",
    e.Received: "_on_received",
    e.Withheld: "_on_withheld",
    e.TakenBack: "_on_taken_back",
    e.ChannelLost: "_on_channel_lost",
    e.WorkerDied: "_on_died",
    e.SpawnFailed: "_on_spawn_failed",
    e.RetryAnswered: "_on_answer",
    e.ShutdownRequested: "_on_shutdown",
    e.EndWorkersRequested: "_on_end_workers",
    e.Ticked: "_on_tick",
}
