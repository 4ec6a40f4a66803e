"""Decides, and so what becomes of each task.  No I/O, clock, thread, random or pickle: same events, same commands.

``Core(policy).handle(event) -> [Command]``, ``next_deadline()`` and ``snapshot()`` are its whole face.

Guarantees:

* every submitted task is settled exactly once, by ``Resolve`` or ``Fail``;
* a worker holds its seat from ``Spawn`` until ``WorkerDied`` (any exit code, 0 included), so there
  are never more than ``max_workers``;
* while a task waits there is a worker that lives or starts, or the pool breaks with the evidence.

Assumes: results are reported before the death of their worker; ``WorkerDied`` names what was not
begun; every command is carried out before the next event.

It is one state machine in two files.  Here is what becomes of tasks: answers, failures, other attempts, the end.  The
lower half, ``_seats``, is who gets what, when; it calls nothing of this one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from . import _events as e
from ._events import STALL, Command, Event, Failure
from ._records import Task, Worker, popped
from ._seats import Seats
from ._tables import POOL_EDGES, IllegalTransition, PoolState, TaskState, WorkerState
from ._timers import always
from .policy import PoolPolicy

W, T, P = WorkerState, TaskState, PoolState

ANSWER_LIMIT_S = 60.0  # for a retry policy to think, those of other tasks before it included
START_FAILURES = 4  # in a row, beyond one per seat: then the pool is broken
SHORTAGE_S = 3.0  # that a waiting task bears with a system that starts no process
UNBEGUN_DEATHS = 3  # workers that died with the same task next in line: then it is the task
PURSUE_AGAIN_S = 1.0


class Core(Seats):
    """The state machine of one pool.  See the head of this file for what it guarantees."""

    def __init__(self, policy: PoolPolicy) -> None:
        super().__init__(policy)
        self._broken_by: Failure | None = None
        self._short_since: float | None = None  # starts are refused, and a task waits, since then
        self._stall_is_watched = False

    # ------------------------------------------------------------------ face

    def handle(self, event: Event) -> list[Command]:
        """What must be done because of ``event``, in this order."""
        self._now = event.now
        self._out = []
        getattr(self, _HANDLERS[type(event)])(event)
        self._assign()
        self._man_the_seats()
        self._level()
        if self._policy.stall_timeout is not None and self._unsettled and not self._stall_is_watched:
            self._stall_is_watched = True
            self._moved_at = self._now
            self._at(self._now + self._policy.stall_timeout, always, self._look_for_stall, self._policy.stall_timeout)
        if self._state is not P.OPEN and not self._unsettled:
            self._wind_up()
        return self._out

    def next_deadline(self) -> float | None:
        """When ``Ticked`` is needed at the latest, in monotonic seconds; None: no timer runs."""
        return self._timers.next_deadline()

    def snapshot(self) -> e.Snapshot:
        tasks = {number: task.state.value for number, task in self._tasks.items()}
        tasks.update((number, T.QUEUED.value) for number in self._plain_in_queue())
        for worker in self._workers.values():
            tasks.update((number, T.SENT.value) for number in worker.sent if type(number) is int)
            if worker.begun and type(worker.sent[0]) is int:
                tasks[worker.sent[0]] = T.RUNNING.value
        return e.Snapshot(
            self._state.value,
            tasks,
            {number: worker.state.value for number, worker in self._workers.items()},
            len(self._timers.alive()),
            {"queued": self._queued, "failed_starts": self._failed_starts, "mean_s": self._mean_s},
        )

    def is_closed(self) -> bool:
        return self._state is P.CLOSED

    def __repr__(self) -> str:
        states = [worker.state.value for worker in self._workers.values()]
        told = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)) or "none"
        return f"<Core {self._state.value}: {self._unsettled} tasks ({self._queued} queued), workers: {told}>"

    # ---------------------------------------------------- tasks come and go

    def _on_submitted(self, event: e.TasksSubmitted) -> None:
        count = len(event.tasks)
        self._unsettled += count
        self._queued += count
        if event.like is not None:
            self._like.update(dict.fromkeys(event.tasks, event.like))  # type: ignore[arg-type]
        if self._broken_by is not None or self._state is P.CANCELLING or self._state is P.CLOSED:
            for new in event.tasks:
                self._settle(self._made_known(new), self._broken_by or Failure("cancelled"))
        elif event.plain:
            self._queue.extend(event.tasks)  # type: ignore[arg-type]
        else:
            for new in event.tasks:
                if isinstance(new, int):
                    self._queue.append(new)
                    continue
                self._queue.append(self._made_known(new))
                self._known_in_queue += 1
                if new.deadline is not None:
                    self._at(new.deadline, self._is_live, self._deadline_reached, new.task)

    def _on_cancel(self, event: e.CancelRequested) -> None:
        if event.unsent and event.task not in self._tasks:
            self._withdrawn.add(event.task)  # (a search for each of a million would be long)
            self._end_waiting([event.task])
            return
        task = self._found(event.task)
        if task is not None:
            self._withdraw(task, Failure("cancelled"), even_running=event.kill)

    def _on_range_cancelled(self, event: e.RangeCancelled) -> None:
        waiting = [task for task in self._plain_in_queue() if event.first <= task <= event.last]
        self._withdrawn.update(waiting)
        self._end_waiting(waiting)

    def _end_waiting(self, tasks: list[int]) -> None:
        """Plain ones, that are cancelled."""
        if tasks:
            self._forget_like(tasks)
            self._unsettled -= len(tasks)
            self._queued -= len(tasks)
            self._out.append(e.Cancel(tuple(tasks)))

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
        waited_s = 0.0 if worker.begun else worker.run_s(self._now)
        self._requeue(worker, event.tasks)
        if not worker.sent:
            self._waited_in_vain(worker, waited_s)
        for task in tuple(self._make_known(worker)):
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
        for task in self._make_known(worker):
            if task.new.task in event.tasks:
                task.wish = Failure("cancelled")
        self._requeue(worker, event.tasks)

    def _requeue(self, worker: Worker, numbers: Iterable[int]) -> None:
        """Put unbegun tasks back to the head of the queue, in their old order, without counting an attempt."""
        unbegun = set(numbers)
        sent = self._make_known(worker)
        back = [task for task in sent if task.new.task in unbegun]
        if not back:
            return
        stay = [task for task in sent if task.new.task not in unbegun]
        worker.sent = deque(stay)
        worker.sent_bytes = sum(task.new.size_bytes for task in stay)
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
            self._known_in_queue += 1
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
        self._unsettled -= 1
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
        if event.finished:
            self._finished(worker, event)
        if event.begun is not None:
            self._task_began(worker, event.begun)
        if worker.state is W.BUSY:
            self._after_answers(worker)
        elif worker.sent and worker.kills == 0 and worker.number_at_head() in event.finished:
            self._kill(worker)  # what was to end has ended within its grace: there is nothing to wait for

    def _finished(self, worker: Worker, event: e.Received) -> None:
        sent, done = worker.sent, list[int]()
        worker.quiet_since, worker.waited_s = self._now, 0.0
        finished: Sequence[int] = event.finished
        if len(finished) <= len(sent) and not (event.raised and self._like):
            heads = popped(sent, len(finished))
            if tuple(heads) == finished:  # all plain, as nearly always: nothing else need be known of them
                worker.begun = False
                self._forget_like(finished)
                self._unsettled -= len(heads)
                done, finished = list(finished), ()
            else:
                sent.extendleft(reversed(heads))
        for number in finished:
            if sent and sent[0] == number and number in event.raised and number in self._like:
                head = sent[0] = self._made_known(number)
                head.state, head.worker = T.RUNNING, worker.number
            if sent and sent[0] == number:  # plain: it may have raised, and that is its outcome
                self._like.pop(number, None)
                sent.popleft()
                worker.begun = False
                self._unsettled -= 1
                done.append(number)
                continue
            task = self._pop_sent(worker, number)
            if task is None:
                continue
            task.ok = number not in event.raised
            if task.new.deaths is None or (task.ok and not task.new.judge_results):
                self._move_task(task, T.SETTLED)
                del self._tasks[number]
                self._unsettled -= 1
                done.append(number)
            else:
                why = Failure("result" if task.ok else "error", worker.number, ran_s=event.run_s)
                self._attempt_failed(task, why)
        if done:
            self._out.append(e.Resolve(tuple(done)))
        self._note_answers(event.run_s)

    def _after_answers(self, worker: Worker) -> None:
        if worker.sent and not worker.begun:
            self._await_start(worker)
        elif not worker.sent and worker.left == 0:
            self._retire(worker)
        elif not worker.sent:
            self._move_worker(worker, W.IDLE)

    def _pop_sent(self, worker: Worker, number: int) -> Task | None:
        """The task as it leaves the worker; None for an answer nobody waits for.

        That of a doomed one comes too late; but not those of others that its worker went on to, see Scenario 6.
        """
        known = (task for task in worker.sent if isinstance(task, Task))
        task = next((task for task in known if task.state is not T.DOOMED), None)
        if task is None or task.new.task != number:
            return None
        worker.sent.remove(task)
        if task.wish is not None:
            task.wish = None
        worker.sent_bytes -= task.new.size_bytes
        worker.begun = False
        return task

    def _task_began(self, worker: Worker, number: int) -> None:
        head = worker.sent[0] if worker.sent else None
        if head is None or worker.begun or worker.number_at_head() != number:
            return
        if isinstance(head, Task) and head.state is not T.SENT:
            return
        worker.begun, worker.begun_at, worker.waited_s = True, self._now, 0.0
        self._moved_at = self._now
        self._failed_starts = 0
        self._out.append(e.Began(number, worker.number))
        if not isinstance(head, Task):
            like = self._like.get(head)
            if like is not None and like.timeout is not None:
                due = self._now + like.timeout
                self._at(due, self._is_at_head, self._limit_of_head_reached, worker.number, number, self._now)
            return
        self._move_task(head, T.RUNNING)
        if head.wish is not None and head.wish_kills:
            self._pursue(head)
        elif head.new.timeout is not None:
            self._at(self._now + head.new.timeout, self._is_attempt, self._limit_reached, number, head.attempt)

    def _is_attempt(self, number: int, attempt: int) -> bool:
        task = self._tasks.get(number)
        return task is not None and task.attempt == attempt and task.state is T.RUNNING

    def _limit_reached(self, number: int, attempt: int) -> None:
        task = self._tasks[number]
        self._withdraw(task, Failure("timeout", task.worker, seconds=task.new.timeout or 0.0), even_running=True)

    def _is_at_head(self, worker_number: int, number: int, begun_at: float) -> bool:
        worker = self._workers.get(worker_number)
        if worker is None or not worker.begun or worker.begun_at != begun_at or not worker.sent:
            return False
        return worker.number_at_head() == number

    def _limit_of_head_reached(self, worker_number: int, number: int, begun_at: float) -> None:
        self._make_known(self._workers[worker_number])
        self._limit_reached(number, 1)

    def _look_for_stall(self, stall_s: float) -> None:
        """What runs is stopped when nothing has moved for so long, and what starts: what waits may do better."""
        self._stall_is_watched = bool(self._unsettled)
        if not self._unsettled:
            return
        if self._now >= self._moved_at + stall_s:
            self._moved_at = self._now
            for worker in self._workers.values():
                self._make_known(worker)
            for task in tuple(self._tasks.values()):
                if task.state is T.RUNNING:
                    why = Failure("timeout", task.worker, seconds=stall_s, reason=STALL)
                    self._withdraw(task, why, even_running=True)
            for worker in tuple(self._workers.values()) if self._queued else ():
                if worker.state is W.STARTING and worker.booted:
                    self._kill(worker, ours=False)  # its initializer is stuck
        self._at(self._moved_at + stall_s, always, self._look_for_stall, stall_s)

    def _doom(self, task: Task, worker: Worker) -> None:
        """The task ends with its worker, which holds nothing else."""
        assert task.wish is not None
        self._move_task(task, T.DOOMED)
        task.failure, task.wish = task.wish._replace(worker=worker.number, ran_s=worker.run_s(self._now)), None
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
        self._known_in_queue += 1
        self._queued += 1

    # ------------------------------------------------- workers come and go

    def _on_ready(self, event: e.WorkerReady) -> None:
        worker = self._workers.get(event.worker)
        if worker is None or worker.state is not W.STARTING:
            return
        worker.ready = True
        self._moved_at = self._now
        self._failed_starts = 0
        self._short_since = None
        self._move_worker(worker, W.IDLE)

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

    def _on_died(self, event: e.WorkerDied) -> None:
        worker = self._workers.get(event.worker)
        if worker is None:
            return
        # A worker sends the answer of one task before it runs the next, so only one can have begun.
        # Scenario 6: (a) its task is doomed, with others behind it that it has tickets for, (b) it answers, too late,
        # and begins the next one, (c) the kill arrives.  Then both have, and neither may run again unasked.
        sent, ran_s = self._make_known(worker), worker.run_s(self._now)
        first = sent[0] if sent else None
        unbegun = set(event.unbegun)
        begun = [task for task in sent if task.state is T.DOOMED or task.new.task not in unbegun]
        self._requeue(worker, unbegun.difference(task.new.task for task in begun))
        worker.sent.clear()
        self._bury(worker)
        if begun:
            self._moved_at = self._now
            death = Failure("death", worker.number, event.exitcode, reason=worker.lost, peak_bytes=event.peak_bytes)
            death = death._replace(ran_s=ran_s)
            for task in begun:
                doom = task.failure if task.state is T.DOOMED else None
                self._attempt_failed(task, doom or death)
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
        plain = set(self._plain_in_queue())
        waiting = [one for one in self._queue if one in plain or (isinstance(one, Task) and one.state is T.QUEUED)]
        self._forget_queue()
        self._queue.extend(waiting[:spared])
        self._known_in_queue = sum(isinstance(one, Task) for one in self._queue)
        self._end_waiting([one for one in waiting[spared:] if isinstance(one, int)])
        for task in tuple(self._tasks.values()):
            if task.state is T.BACKOFF or (task.state is T.QUEUED and task not in self._queue):
                self._settle(task, Failure("cancelled"))
            elif task.state is T.ASKED:
                self._settle(task)

    def _on_end_workers(self, event: e.EndWorkersRequested) -> None:
        self._on_shutdown(e.ShutdownRequested(event.now, True))
        self._cancel_waiting(spared=0)
        for worker in tuple(self._workers.values()):
            # What was sent may have begun: it ends as one whose worker was ended.
            ran_s = worker.run_s(self._now)
            for task in tuple(self._make_known(worker)):
                self._settle(task, Failure("terminated", worker.number, ran_s=ran_s))
                ran_s = 0.0
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
        for one in self._plain_in_queue():
            self._made_known(one)
        self._forget_queue()
        for worker in self._workers.values():
            self._make_known(worker)
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
        worker.begun = False

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

    def _move_pool(self, to: PoolState) -> None:
        if to not in POOL_EDGES[self._state]:
            raise IllegalTransition(f"a pool that is {self._state.value} may not become {to.value}")
        self._state = to


_HANDLERS: dict[type, str] = {
    e.TasksSubmitted: "_on_submitted",
    e.SentDirectly: "_on_sent_directly",
    e.RangeCancelled: "_on_range_cancelled",
    e.WorkerWanted: "_on_wanted",
    e.AnsweredDirectly: "_on_answered_directly",
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
