"""The simulation that safepool's own tests use: the real core, a virtual clock, virtual workers.

``Simulation`` plays the watchdog, the workers and the users of one pool, one step at a time, and after
every step checks what must always hold; what does not is a ``Violation``.  Everything that can happen
to a pool is a method here, so a test (or hypothesis) drives a pool through any history in
milliseconds, and a history that fails can be read, shrunk and replayed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import _events as e
from ._core import Core
from ._seats import ACK_LIMIT_S, KILL_AGAIN_S, LOOK_AGAIN_S, READ_BYTES_PER_S
from .policy import PoolPolicy

SHORTAGE_BOUND_S = 4.0
BOUND_S = 1.0  # promise 1: so long may work wait without a worker that lives or starts
FAIR_STEPS = 4000


class Violation(AssertionError):
    """An invariant of the pool does not hold."""


@dataclass
class VirtualWorker:
    """A worker as the outside world sees it.  ``pipe`` holds what it said and nobody has read."""

    number: int
    booted: bool = False
    ready: bool = False
    inbox: deque[int] = field(default_factory=deque)
    in_hand: int | None = None
    pipe: deque[tuple[str, int, bool]] = field(default_factory=deque)
    drawn: deque[int] = field(default_factory=deque)  # of the ticket that the task in hand came with, to be begun next
    ticket_of: dict[int, int] = field(default_factory=dict)  # plain tasks that share one: the first of them
    kills: int = 0
    killed_for: frozenset[int] = frozenset()  # the tasks that were doomed when it was killed
    asked_to_exit: bool = False
    deaf: bool = False
    stuck: bool = False  # stopped: does not boot, begins nothing, does not exit when asked
    immortal: bool = False  # uninterruptible sleep: even SIGKILL waits
    unheard: set[int] = field(default_factory=set)  # tasks whose answers its lost channel swallowed
    begins: int = 0
    waited_s: float = 0.0  # that it has had something to begin, and has not, since it last told of anything

    def can_work(self) -> bool:
        return not self.kills and not self.asked_to_exit


class Simulation:
    """One pool under test.  ``core`` makes the state machine, so that a broken one can be tried.

    ``violated`` tells whether a ``Violation`` was raised.  Times are virtual seconds.
    """

    def __init__(self, policy: PoolPolicy, core: Callable[[PoolPolicy], Core] = Core) -> None:
        self.policy = policy
        self.core = core(policy)
        self._make_core = core
        self.now = 0.0
        self.log: list[tuple[e.Event, list[e.Command]]] = []
        self.workers: dict[int, VirtualWorker] = {}
        self.tasks: dict[int, e.NewTask] = {}
        self.items: set[int] = set()
        self.outcomes: dict[int, str] = {}
        self.begins: dict[int, int] = {}
        self.retries: dict[int, int] = {}
        self.deaths: dict[int, int] = {}
        self.asked: dict[int, int] = {}  # task -> attempt its retry policy is asked about
        self.silent: set[int] = set()  # tasks whose retry policy never answers
        self.spawns_fail = 0
        self.closed = False
        self.violated = False
        self.broken_allowed = policy.on_worker_death == "break"
        self._mail: deque[e.Event] = deque()
        self._next: deque[e.Event] = deque()
        self._unclaimed: set[int] = set()  # cancelled by their user, and not at a worker
        self._cancel_wanted: set[int] = set()
        self._cancel_all = False
        self._abandoned: set[int] = set()
        self._sent: set[int] = set()
        self._doomed: set[int] = set()
        self._finished: dict[int, bool] = {}
        self._began_at: dict[int, float] = {}
        self._moved_at = 0.0  # a task began or ended, or a worker got ready
        self._starved_since: float | None = None
        self._refused_at = -1.0  # when the system last started no process
        self._starts_without_ready = 0

    # ------------------------------------------------------ what users do

    def submit(
        self,
        *,
        timeout: float | None = None,
        deadline: float | None = None,
        deaths: int | None = None,
        judge_results: bool = False,
        size_bytes: int = 0,
        silent: bool = False,
    ) -> int:
        """Submit a task; ``deaths`` gives it a retry policy, ``silent`` one that never answers."""
        task = len(self.tasks) + 1
        until = None if deadline is None else self.now + deadline
        new = e.NewTask(task, size_bytes, timeout, until, deaths, judge_results)
        self.tasks[task] = new
        if silent:
            self.silent.add(task)
        self._feed(e.TasksSubmitted(self.now, (self._as_sent(new),)))
        return task

    def submit_directly(self) -> int | None:
        """A caller submits a plain task and sends it itself, if a worker is lent to callers."""
        lent = self.core.lendable(1)
        if not lent:
            return None
        task = len(self.tasks) + 1
        self.tasks[task] = e.NewTask(task)
        worker = self.workers[lent[0]]
        worker.inbox.append(task)
        self._sent.add(task)
        self._feed(e.SentDirectly(self.now, worker.number, task))
        return task

    def _as_sent(self, new: e.NewTask) -> e.NewTask | int:
        """A plain task is its number."""
        return new.task if new == e.NewTask(new.task) else new

    def _tells_its_begin(self, task: int) -> bool:
        is_plain = isinstance(self._as_sent(self.tasks[task]), int)
        return not is_plain or self.policy.stall_timeout is not None or not self.policy.take_back

    def submit_many(self, count: int, **options: Any) -> None:
        """Alike, and no more than their numbers but for what they have in common."""
        tasks = tuple(range(len(self.tasks) + 1, len(self.tasks) + 1 + count))
        self.tasks.update((task, e.NewTask(task, **options)) for task in tasks)
        like = e.NewTask(0, **options)
        self._feed(e.TasksSubmitted(self.now, tasks, True, None if like == e.NewTask(0) else like))

    def submit_items(self, count: int) -> None:
        """Of a map: some of them may share a ticket, and nobody cancels or kills one of them alone."""
        first = len(self.tasks) + 1
        self.items.update(range(first, first + count))
        self.submit_many(count)

    def cancel(self, task: int, *, later: bool = False) -> None:
        """``future.cancel()``; with ``later`` the watchdog reads of it after the next step only."""
        if task in self.outcomes or task in self.items:
            return
        self._cancel_wanted.add(task)
        if task not in self._sent:
            self._unclaimed.add(task)
        event = e.CancelRequested(self.now, task, unsent=task not in self._sent)
        if later:
            self._mail.append(event)
        else:
            self._feed(event)

    def kill(self, task: int) -> None:
        if task in self.items:
            return
        self._cancel_wanted.add(task)
        self._feed(e.CancelRequested(self.now, task, kill=True))

    def cancel_range(self, first: int, last: int) -> None:
        """Of tasks that are plain; their users want none of them."""
        self._cancel_wanted.update(range(first, last + 1))
        self._feed(e.RangeCancelled(self.now, first, last))

    def want_worker(self) -> None:
        """A call came that cannot be sent."""
        self._feed(e.WorkerWanted(self.now))

    def shutdown(self, *, cancel: bool) -> None:
        self._cancel_all |= cancel
        self._feed(e.ShutdownRequested(self.now, cancel))

    def end_workers(self, *, hard: bool) -> None:
        self._cancel_all = True
        self._feed(e.EndWorkersRequested(self.now, hard))

    def answer(self, task: int, delay_s: float | None) -> None:
        """The retry policy of a task answers."""
        attempt = self.asked.pop(task, None)
        if attempt is not None:
            if delay_s is not None:
                self.retries[task] = self.retries.get(task, 0) + 1
            self._feed(e.RetryAnswered(self.now, task, attempt, delay_s))

    # ---------------------------------------------------- what workers do

    def boot(self, number: int) -> None:
        worker = self.workers[number]
        if not worker.booted and not worker.stuck:
            worker.booted = True
            self._feed(e.WorkerBooted(self.now, number))

    def ready(self, number: int) -> None:
        worker = self.workers[number]
        self.boot(number)
        if worker.booted and not worker.ready and not worker.deaf:
            worker.ready = True
            self._starts_without_ready = 0
            self._feed(e.WorkerReady(self.now, number))

    def unfit(self, number: int) -> None:
        self.broken_allowed = True
        self._feed(e.WorkerUnfit(self.now, number, "its initializer raised"))

    def begin(self, number: int, *, in_one_breath: bool = False) -> None:
        """The worker draws the next ticket, if it has one and nothing in hand.

        ``in_one_breath`` with an answer it always says so; else not of a plain task.
        """
        worker = self.workers[number]
        # (One that is stopped within a batch is as one that is stopped within a task.)
        is_free = worker.ready and not worker.deaf and worker.in_hand is None and (not worker.stuck or worker.drawn)
        if is_free and (worker.drawn or worker.inbox):
            of_a_batch = bool(worker.drawn)
            if not worker.drawn:
                ticket = worker.ticket_of.get(worker.inbox[0], 0)
                worker.drawn.append(worker.inbox.popleft())
                while ticket and worker.inbox and worker.ticket_of.get(worker.inbox[0]) == ticket:
                    worker.drawn.append(worker.inbox.popleft())
            task = worker.in_hand = worker.drawn.popleft()
            worker.waited_s = 0.0
            # (What shares a ticket with a task that has begun cannot be kept from beginning, but by its worker's end.)
            settled = task in self.outcomes and self.policy.take_back and not of_a_batch
            self._check(not settled, f"task {task} begins after it was settled")
            self.begins[task] = self.begins.get(task, 0) + 1
            worker.begins += 1
            if in_one_breath or self._tells_its_begin(task):
                worker.pipe.append(("begun", task, True))

    def finish(self, number: int, *, ok: bool = True) -> None:
        """The task in hand ends, and the worker goes on with the next."""
        worker = self.workers[number]
        if worker.in_hand is not None:
            worker.pipe.append(("finished", worker.in_hand, ok))
            worker.in_hand = None
            self.begin(number, in_one_breath=True)

    def hear(self, number: int, run_s: float = 0.0005) -> None:
        """The watchdog reads what the worker said."""
        self._feed_heard(self.workers[number], run_s)
        self._run_commands()

    def lose_channel(self, number: int) -> None:
        worker = self.workers[number]
        if not worker.deaf:
            self.hear(number)  # what it had written can still be read
            worker.deaf = True
            self._feed(e.ChannelLost(self.now, number, "closed"))

    def die(self, number: int, exitcode: int | None = -9) -> None:
        """The process ends, by itself or not; the watchdog hears its last words, then of its death."""
        worker = self.workers[number]
        self.hear(number)  # which may well make the core send it another task
        expected = not worker.can_work()
        if not worker.ready:
            self._starts_without_ready += 1
        del self.workers[number]
        unbegun = (*worker.drawn, *worker.inbox)
        self._sent.difference_update(unbegun)
        self._next.append(e.WorkerDied(self.now, number, exitcode, unbegun))
        self._run_commands()
        if self.policy.on_worker_death == "break" and not expected and not worker.deaf:
            self._check(self.core.snapshot().pool in ("broken", "closed"), "a death did not break the pool")

    # --------------------------------------------------------------- time

    def advance(self, seconds: float) -> None:
        """Let time pass; every timer on the way fires."""
        end = self.now + seconds
        for _ in range(FAIR_STEPS):
            due = self.core.next_deadline()
            self._check_starvation(min(end, due) if due is not None else end)
            if due is None or due > end:
                break
            self._pass_to(max(self.now, due))
            self._feed(e.Ticked(self.now))
            after = self.core.next_deadline()
            self._check(after is None or after > self.now, "a timer is due after the clock has ticked")
        else:
            raise Violation("the timers never come to rest")
        self._pass_to(end)
        self._check_limits()
        self._check_the_frozen()

    def _pass_to(self, now: float) -> None:
        for worker in self.workers.values():
            is_able = worker.ready and not worker.deaf and worker.can_work()
            if is_able and worker.inbox and worker.in_hand is None and not worker.drawn and not worker.pipe:
                worker.waited_s += now - self.now
        self.now = now

    def settle(self) -> None:
        """The faults stop: in a fair world everything must come to its end, and a shutdown to CLOSED."""
        self.spawns_fail = 0
        self.shutdown(cancel=False)
        for _ in range(FAIR_STEPS):
            if self.closed:
                break
            self._fair_step()
        self._check(self.closed, f"the pool did not close: {self.core!r}")
        lost = sorted(set(self.tasks) - set(self.outcomes))
        self._check(not lost, f"never settled: {lost}")
        self._check(not self.workers, "the pool closed and workers are left")
        self._check(self.core.next_deadline() is None, "the pool closed and timers are left")
        self.replay()

    def _fair_step(self) -> None:
        moved = [self._fair_worker(worker) for worker in tuple(self.workers.values())]
        for task in tuple(self.asked):
            if task not in self.silent:
                self.answer(task, None)
                moved.append(True)
        due = self.core.next_deadline()
        if not any(moved) and due is not None:
            self.advance(max(0.0, due - self.now))

    def _fair_worker(self, worker: VirtualWorker) -> bool:
        """Let one worker do what a worker should; False: there is nothing for it to do."""
        if worker.number not in self.workers:
            return False
        if worker.kills or (worker.asked_to_exit and not worker.stuck):
            if not worker.immortal:
                self.die(worker.number, -9 if worker.kills else 0)
            return not worker.immortal
        if not worker.ready and not worker.deaf:
            self.ready(worker.number)
            return worker.ready
        if not worker.inbox and not worker.drawn and worker.in_hand is None and not worker.pipe:
            return False
        if worker.stuck and worker.in_hand is None and not worker.drawn and not worker.pipe and not worker.deaf:
            return False
        self.begin(worker.number)
        self.finish(worker.number)
        if worker.deaf:
            self.die(worker.number, 1)
        else:
            self.hear(worker.number)
        return True

    def replay(self) -> None:
        """The same events into a new core give the same commands."""
        core = self._make_core(self.policy)
        for event, commands in self.log:
            again = core.handle(event)
            core.next_deadline()
            self._check([(type(c), c) for c in again] == [(type(c), c) for c in commands], f"replay differs at {event}")

    # ----------------------------------------------------- playing the watchdog

    def _feed(self, event: e.Event) -> None:
        self._next.append(event)
        self._run_commands()
        while self._mail:
            event = self._mail.popleft()
            if isinstance(event, e.CancelRequested) and event.task in self.outcomes:
                continue  # who reads the mail sees that
            self._next.append(event._replace(now=self.now))
            self._run_commands()

    def _run_commands(self) -> None:
        while self._next:
            event = self._next.popleft()
            try:
                commands = self.core.handle(event)
            except BaseException:
                self.violated = True
                raise
            self.log.append((event, list(commands)))
            if isinstance(event, e.Received | e.WorkerReady | e.WorkerDied):
                self._moved_at = event.now
            for command in commands:
                _ACTS[type(command)](self, command)
        self._check_always()

    def _feed_heard(self, worker: VirtualWorker, run_s: float) -> None:
        if worker.deaf:
            worker.unheard.update(task for _, task, _ in worker.pipe)
            worker.pipe.clear()
        if not worker.pipe:
            return
        worker.waited_s = 0.0
        finished = tuple(task for kind, task, _ in worker.pipe if kind == "finished")
        raised = frozenset(task for kind, task, ok in worker.pipe if kind == "finished" and not ok)
        # (What is doomed is its worker's until that dies, even if it answers.)
        worker.killed_for |= {task for task in finished if self.core.state_of(task).startswith("doomed")}
        kind, last, _ = worker.pipe[-1]
        for _, task, ok in worker.pipe:
            self._finished[task] = ok
        worker.pipe.clear()
        begun = last if kind == "begun" else None
        self._next.append(e.Received(self.now, worker.number, finished, begun, run_s, raised))

    def _act_spawn(self, command: e.Spawn) -> None:
        self._check(len(self.workers) < self.policy.max_workers, "more workers than max_workers")
        limit = 4 * self.policy.max_workers + 16
        alone = not any(worker.ready for worker in self.workers.values())
        self._check(not alone or self._starts_without_ready <= limit, "a crash loop: workers are started for ever")
        if self.spawns_fail:
            self.spawns_fail -= 1
            self._refused_at = self.now
            self._next.append(e.SpawnFailed(self.now, command.worker, "no process to be had"))
        else:
            self.workers[command.worker] = VirtualWorker(command.worker)

    def _act_send(self, command: e.Send) -> None:
        worker = self.workers.get(command.worker)
        self._check(worker is not None, f"{command} to a worker that is not there")
        assert worker is not None
        self._check(worker.ready and worker.can_work(), f"{command} to a worker that is not ready for it")
        for task in command.tasks:
            self._check(task not in self.outcomes, f"task {task} is sent after it was settled")
            self._check(task not in self._sent, f"task {task} is sent twice")
        withheld = tuple(task for task in command.tasks if task in self._unclaimed)
        going = [task for task in command.tasks if task not in self._unclaimed]
        self._sent.update(going)
        worker.inbox.extend(going)
        items = [task for task in going if task in self.items]
        for at in range(0, len(items), command.together):
            worker.ticket_of.update(dict.fromkeys(items[at : at + command.together], items[at]))
        if withheld:
            self._next.appendleft(e.Withheld(self.now, command.worker, withheld))

    def _act_take_back(self, command: e.TakeBack) -> None:
        worker = self.workers.get(command.worker)
        tasks = tuple(worker.inbox) if worker is not None and self.policy.take_back else ()
        if worker is not None and tasks:
            worker.inbox.clear()
        self._sent.difference_update(tasks)
        self._next.appendleft(e.TakenBack(self.now, command.worker, tasks))

    def _act_look(self, command: e.Look) -> None:
        worker = self.workers.get(command.worker)
        if worker is not None and worker.in_hand is not None:
            self._next.append(e.Received(self.now, worker.number, (), worker.in_hand))

    def _act_ask_exit(self, command: e.AskExit) -> None:
        worker = self.workers[command.worker]
        self._check(not worker.inbox and worker.in_hand is None, "a worker with tasks is asked to exit")
        worker.asked_to_exit = True

    def _act_kill(self, command: e.Kill) -> None:
        worker = self.workers.get(command.worker)
        if worker is None:
            return
        worker.kills += 1
        doomed = {t for t, s in self.core.snapshot().tasks.items() if s == "doomed"}
        at_worker = {t for t in (worker.in_hand, *worker.inbox, *(t for _, t, _ in worker.pipe)) if t is not None}
        worker.killed_for = frozenset(doomed & at_worker) | worker.killed_for
        self._doomed |= worker.killed_for

    def _act_abandon(self, command: e.Abandon) -> None:
        worker = self.workers.pop(command.worker, None)
        self._check(worker is not None and worker.kills >= len(KILL_AGAIN_S), "a worker is given up too early")
        if worker is not None:
            unbegun = (*worker.drawn, *worker.inbox)  # what it never returns to
            self._sent.difference_update(unbegun)
            self._starts_without_ready += not worker.ready
            self._abandoned.add(command.worker)
            self._feed_heard(worker, 0.0005)
            self._next.append(e.WorkerDied(self.now, command.worker, None, unbegun))

    def _act_began(self, command: e.Began) -> None:
        worker = self.workers.get(command.worker)
        there = worker is not None and (command.task == worker.in_hand or command.task not in worker.inbox)
        there |= command.worker in self._abandoned  # its last words
        self._check(there, f"{command}, but no live worker has it in hand")
        self._began_at[command.task] = self.now

    def _act_requeue(self, command: e.Requeue) -> None:
        for task in command.tasks:
            self._check(task not in self.outcomes, f"task {task} is queued again after it was settled")
            self._sent.discard(task)
            self._doomed.discard(task)
            self._finished.pop(task, None)
            self._began_at.pop(task, None)

    def _act_ask_retry(self, command: e.AskRetry) -> None:
        self._check(command.task not in self.outcomes, f"{command} after it was settled")
        if command.failure.kind == "death":
            self.deaths[command.task] = self.deaths.get(command.task, 0) + 1
            most = self.tasks[command.task].deaths or 0
            self._check(self.deaths[command.task] < most, f"task {command.task} may take down more than {most} workers")
        self.asked[command.task] = command.attempt

    def _act_break(self, command: e.Break) -> None:
        self.broken_allowed |= self._starts_without_ready > 0 or self._spawn_failures() > 0
        self._check(bool(command.failure.reason), "the pool breaks and does not say why")

    def _act_resolve(self, command: e.Resolve) -> None:
        for task in command.tasks:
            self._check(task in self._finished, f"task {task} is resolved with an answer nobody sent")
            self._check(task not in self._doomed, f"task {task} was killed and is resolved all the same")
            self._settle_once(task, "answered")

    def _act_fail(self, command: e.Fail) -> None:
        kind, task = command.failure.kind, command.task
        if kind == "death":
            self._check(self.begins.get(task, 0) > 0, f"task {task} never began and is said to have died")
        if command.failure.reason == e.STALL:
            self._check(self.policy.stall_timeout is not None, f"task {task} is said to have stalled")
        elif kind in ("timeout", "deadline"):
            limit = self.tasks[task].timeout if kind == "timeout" else self.tasks[task].deadline
            self._check(limit is not None, f"task {task} has no {kind} and failed by it")
        if kind == "cancelled":
            self._check(self._cancel_all or task in self._cancel_wanted, f"nobody cancelled task {task}")
        if kind == "broken":
            self.broken_allowed |= self._starts_without_ready > 0 or self._spawn_failures() > 0
            self._check(self.broken_allowed, "the pool broke without a reason")
        self._settle_once(task, kind)

    def _act_cancel(self, command: e.Cancel) -> None:
        for task in command.tasks:
            self._act_fail(e.Fail(task, e.Failure("cancelled")))

    def _spawn_failures(self) -> int:
        return sum(isinstance(event, e.SpawnFailed) for event, _ in self.log)

    def _act_close(self, command: e.Close) -> None:
        self._check(not self.closed, "closed twice")
        self._check(not self.workers, "the pool closes and workers are left")
        self.closed = True

    def _settle_once(self, task: int, outcome: str) -> None:
        self._check(task not in self.outcomes, f"task {task} is settled twice: {self.outcomes.get(task)}, {outcome}")
        self.outcomes[task] = outcome

    # ------------------------------------------------- what must always hold

    def _check(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.violated = True
            tail = "\n".join(f"  {event} -> {commands}" for event, commands in self.log[-8:])
            raise Violation(f"{otherwise} (at {self.now:.3f} s)\nlast steps:\n{tail}")

    def _check_always(self) -> None:
        snapshot = self.core.snapshot()
        self._check(len(self.workers) <= self.policy.max_workers, "more workers than max_workers")
        for number in snapshot.workers:
            self._check(number in self.workers, f"the core keeps worker {number}, which is gone")
        for task, state in snapshot.tasks.items():
            self._check(task not in self.outcomes, f"task {task} is settled and still {state}")
            if state in ("sent", "running", "doomed"):
                holders = [w for w in self.workers.values() if self._holds(w, task)]
                self._check(len(holders) == 1, f"task {task} is {state} at {len(holders)} workers")
        queued = sum(state == "queued" for state in snapshot.tasks.values())
        self._check(snapshot.extra["queued"] == queued, "the core miscounts its queue")
        for task in self.tasks:
            self._check(task in self.outcomes or task in snapshot.tasks, f"task {task} is forgotten")
        for number, state in snapshot.workers.items():
            if state == "killing":
                timers = self.core._timers.alive()
                timed = any(timer.act.__name__ == "_kill_overdue" and timer.key[0] == number for timer in timers)
                self._check(timed, f"worker {number} is being killed and no timer watches it")
        for task, count in self.begins.items():
            self._check(count <= 1 + self.retries.get(task, 0), f"task {task} ran {count} times")
        limit = self.policy.max_tasks_per_child
        for worker in self.workers.values():
            self._check(limit is None or worker.begins <= limit, f"worker {worker.number} ran too many tasks")
        if snapshot.pool == "closed":
            self._check(not snapshot.tasks and not snapshot.workers, "closed, and something is left")

    @staticmethod
    def _holds(worker: VirtualWorker, task: int) -> bool:
        said = {t for _, t, _ in worker.pipe}
        sent = task == worker.in_hand or task in worker.drawn or task in worker.inbox
        return sent or task in said | worker.unheard | worker.killed_for

    def _check_starvation(self, until: float) -> None:
        """Promise 1: work that waits has a worker that lives or starts, within a second.

        While the system refuses, trying once a second is as good, but not for long.
        """
        snapshot = self.core.snapshot()
        waits = any(state == "queued" for state in snapshot.tasks.values())
        helped = any(w.can_work() or w.kills for w in self.workers.values())
        if not waits or helped:
            self._starved_since = None
            return
        if self._starved_since is None:
            self._starved_since = self.now
        bound, due = self._starved_since + BOUND_S, self.core.next_deadline()
        if self._refused_at >= self._starved_since:
            bound = min(self._starved_since + SHORTAGE_BOUND_S, self._refused_at + BOUND_S)
        helps = due is not None and due <= bound
        self._check(until <= bound or helps, "work waits and no worker lives or starts")

    def _check_limits(self) -> None:
        """No task outlives its limit unnoticed."""
        for task, state in self.core.snapshot().tasks.items():
            new = self.tasks[task]
            if state in ("queued", "backoff", "asked"):
                self._check(new.deadline is None or new.deadline > self.now, f"task {task} is past its deadline")
            if state == "running" and task in self._began_at and not self._answer_is_on_the_way(task):
                limits = [new.deadline, None if new.timeout is None else self._began_at[task] + new.timeout]
                if self.policy.stall_timeout is not None:
                    limits.append(max(self._moved_at, self._began_at[task]) + self.policy.stall_timeout)
                over = [limit for limit in limits if limit is not None and limit < self.now]
                self._check(not over, f"task {task} runs past its limit")

    def _check_the_frozen(self) -> None:
        """Who begins nothing of all that it is sent does not keep its seat."""
        for worker in self.workers.values():
            size_bytes = sum(self.tasks[task].size_bytes for task in worker.inbox)
            bound_s = ACK_LIMIT_S + LOOK_AGAIN_S + size_bytes / READ_BYTES_PER_S
            is_over = worker.waited_s > bound_s and worker.can_work()
            self._check(not is_over, f"worker {worker.number} has begun nothing for {worker.waited_s:g} s")

    def _answer_is_on_the_way(self, task: int) -> bool:
        return any(kind == "finished" and t == task for w in self.workers.values() for kind, t, _ in w.pipe)


_ACTS: dict[type, Callable[[Simulation, Any], None]] = {
    e.Spawn: Simulation._act_spawn,
    e.Send: Simulation._act_send,
    e.TakeBack: Simulation._act_take_back,
    e.Look: Simulation._act_look,
    e.AskExit: Simulation._act_ask_exit,
    e.Kill: Simulation._act_kill,
    e.Abandon: Simulation._act_abandon,
    e.Began: Simulation._act_began,
    e.Requeue: Simulation._act_requeue,
    e.AskRetry: Simulation._act_ask_retry,
    e.Break: Simulation._act_break,
    e.Resolve: Simulation._act_resolve,
    e.Fail: Simulation._act_fail,
    e.Cancel: Simulation._act_cancel,
    e.Close: Simulation._act_close,
}
