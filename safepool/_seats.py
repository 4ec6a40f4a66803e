"""Who gets what, when: the seats of one pool, the workers that have them, the queue, and which task is where.

The lower half of the core, and as pure.  What becomes of a task is not decided here: nothing in here calls anything of
the upper half, ``_core``, and mypy would see it.

A plain task is its number and nothing else until something happens to it: so a million of them may wait, and each
costs next to nothing.  Whatever happens to one makes a ``Task`` of it.  What many have in common, a limit say, is
noted once (``_like``).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from . import _events as e
from ._events import Command
from ._records import Task, Worker, popped
from ._tables import TASK_EDGES, WORKER_EDGES, IllegalTransition, PoolState, TaskState, WorkerState
from ._timers import Timers, always
from .policy import PoolPolicy

W, T, P = WorkerState, TaskState, PoolState

BOOT_LIMIT_S = 60.0  # from launch to the worker's first word; its initializer is not included
RETIRE_GRACE_S = 5.0  # from AskExit to a kill
UNFIT_GRACE_S = 1.0  # for a worker whose initializer failed to end by itself
STARVED_S = 0.8  # a waiting task without a live or starting worker; under the promised second
TERM_GRACE_S = 2.0  # from SIGTERM to SIGKILL
KILL_AGAIN_S = (1.0, 4.0)  # SIGKILL is repeated once, then the worker is given up (D state)
RESPAWN_DELAYS_S = (0.0, 0.05, 0.1, 0.2, 0.4, 1.0, 2.0, 5.0)  # after failed starts, or idle deaths, in a row
HURRIED_S = 0.2  # the longest of them while nobody else is there to work: promise 1 has a second in all
LOOK_S = 0.02  # until it is looked up whether a task that was sent has begun
LOOK_AGAIN_S = 1.0
ACK_LIMIT_S = 10.0  # for an idle worker to begin what it is sent; after that it is frozen
READ_BYTES_PER_S = 1e6  # and more time for big calls
AHEAD_S = 0.020  # work kept at a worker, so that it never waits for us
STUCK_S = 1.0  # that one task runs while others wait behind it
AHEAD_TASKS = 2048
WORTH_MOVING_S = 0.001  # of work: to take it back and send it elsewhere takes a tenth
TOGETHER_S = 0.001  # of work that a worker may have for one ticket
TOGETHER_TASKS = 1000
AHEAD_BYTES = 256 * 1024


class Seats:
    """The lower half of the state machine of one pool.  See the head of this file."""

    def __init__(self, policy: PoolPolicy) -> None:
        self._policy = policy
        self._state = P.OPEN
        self._tasks: dict[int, Task] = {}
        self._workers: dict[int, Worker] = {}
        self._like: dict[int, e.NewTask] = {}  # of plain tasks that have something to be known of
        self._unsettled = 0
        self._queue: deque[int | Task] = deque()  # may hold settled tasks; they are passed over
        self._queued = 0
        self._known_in_queue = 0  # entries of the queue that are more than a number
        self._withdrawn: set[int] = set()  # plain ones that are settled and still in the queue
        self._idle: dict[int, Worker] = {}  # the last is the warmest
        self._starting = 0
        self._fit = 0  # starting, idle or busy: what can make progress
        self._timers = Timers()
        self._at = self._timers.at
        self._worker_number = 0
        self._spawn_from = 0.0
        self._manned = 0  # seats that were in use at some time; a dead worker's is filled again
        self._starved = False
        self._balancing = False
        self._mean_s: float | None = None
        self._failed_starts = 0
        self._idle_deaths = 0  # in a row, without a finished task between them
        self._moved_at = 0.0  # a task began or ended, or a worker got ready
        self._now = 0.0
        self._out: list[Command] = []

    # ----------------------------------------------------- which task is where

    def state_of(self, task: int) -> str:
        """The state of a task in a word, and where; for messages."""
        found = self._tasks.get(task)
        if found is None:
            # On the thread of whoever asks: the lists may change meanwhile, and then it is asked again.
            return self._state_of_plain(task)
        return found.state.value if found.worker is None else f"{found.state.value} at worker {found.worker}"

    def _state_of_plain(self, task: int) -> str:
        with suppress(RuntimeError):
            if task in self._queue:
                return T.QUEUED.value
            for worker in tuple(self._workers.values()):
                if task in worker.sent:
                    state = T.RUNNING if worker.begun and worker.sent[0] == task else T.SENT
                    return f"{state.value} at worker {worker.number}"
        return "settled"

    def _made_known(self, new: e.NewTask | int) -> Task:
        """What was only a number, or is new, is a ``Task`` from now on."""
        if isinstance(new, int):
            like = self._like.pop(new, None)
            new = e.NewTask(new) if like is None else like._replace(task=new)
        task = self._tasks[new.task] = Task(new)
        return task

    def _found(self, number: int) -> Task | None:
        """The task of this number, as a ``Task``; None: it is settled."""
        task = self._tasks.get(number)
        if task is not None:
            return task
        for worker in self._workers.values():
            if number in worker.sent:
                self._make_known(worker)
                return self._tasks[number]
        if number in self._queue and number not in self._withdrawn:
            task = self._queue[self._queue.index(number)] = self._made_known(number)
            self._known_in_queue += 1
        return task

    def _make_known(self, worker: Worker) -> deque[Task]:
        """All that a worker has, as ``Task``; for the rare cases in which it matters which one is which."""
        sent = worker.sent
        for at, number in enumerate(sent):
            if type(number) is int:
                task = sent[at] = self._made_known(number)
                task.worker = worker.number
                task.state = T.RUNNING if at == 0 and worker.begun else T.SENT
        return sent  # type: ignore[return-value]

    def _plain_in_queue(self) -> list[int]:
        return [task for task in self._queue if isinstance(task, int) and task not in self._withdrawn]

    def _forget_like(self, tasks: Sequence[int]) -> None:
        if self._like:
            pop = self._like.pop
            for task in tasks:
                pop(task, None)

    def _forget_queue(self) -> None:
        """All that is in it is settled."""
        self._queue.clear()
        self._withdrawn.clear()
        self._known_in_queue = 0

    def _move_task(self, task: Task, to: TaskState) -> None:
        if to not in TASK_EDGES[task.state]:
            raise IllegalTransition(f"{task!r} may not become {to.value}")
        task.state = to

    # ----------------------------------------------------- who gets what, when

    def mean_s(self) -> float:
        """What a task takes, as far as it is known; in seconds."""
        return self._mean_s or 0.0

    def lendable(self, most: int) -> list[int]:
        """Workers with nothing to do, the warmest last: a caller may send one plain task to each, until the next event.

        ``SentDirectly`` must be the next event of such a worker then.
        """
        if self._queued or not self._idle or self._state is not P.OPEN:
            return []
        found = [number for number, worker in itertools.islice(reversed(self._idle.items()), most) if worker.left != 0]
        found.reverse()
        return found

    def _assign(self) -> None:
        if not self._queued:
            if self._queue:
                self._forget_queue()
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
        """How many tasks one worker should hold: ``AHEAD_S`` of work beside the one it runs, but never others' part."""
        if self._mean_s is None or not self._policy.take_back:
            return 1
        ahead = AHEAD_TASKS if self._mean_s <= 0 else 1 + int(AHEAD_S / self._mean_s)
        fair = -(-self._queued // self._policy.max_workers)
        return max(1, min(ahead, AHEAD_TASKS, fair))

    def _together(self) -> int:
        mean_s = self._mean_s
        if self._policy.stall_timeout is not None:
            return 1  # what stalls is known by its ticket
        return 1 if mean_s is None else max(1, min(TOGETHER_TASKS, int(TOGETHER_S / max(mean_s, 1e-9))))

    def _is_slow(self, worker: Worker) -> bool:
        return worker.run_s(self._now) >= AHEAD_S

    def _send(self, worker: Worker, most: int) -> bool:
        if worker.left is not None:
            most = min(most, worker.left)
        if self._known_in_queue or self._withdrawn:
            batch = self._take(worker, most)
        else:
            batch = popped(self._queue, min(most, len(self._queue)))
            worker.sent.extend(batch)
            self._queued -= len(batch)
        if batch:
            if worker.left is not None:
                worker.left -= len(batch)
            if worker.state is W.IDLE:
                self._move_worker(worker, W.BUSY)
                self._await_start(worker)
            self._out.append(e.Send(worker.number, tuple(batch), self._together()))
            worker.levelled = 0
            if len(worker.sent) > 1 and not worker.is_watched:
                worker.is_watched = True
                self._at(self._now + STUCK_S, self._is_here, self._look_for_stuck, worker.number)
        return bool(batch)

    def _look_for_stuck(self, number: int) -> None:
        """Scenario 2: (a) tasks are short, and some are sent ahead, (b) one of them takes an hour, (c) those behind it
        wait, while all that was submitted after them is done by others, who are never free.  So they are queued again.
        """
        worker = self._workers[number]
        worker.is_watched = False
        if worker.state is not W.BUSY or len(worker.sent) < 2:
            return  # it is watched again when it is sent more
        due = worker.quiet_since + STUCK_S
        if self._now >= due and worker.begun:
            self._take_from(worker)
            return
        worker.is_watched = True
        if self._now >= due:
            self._out.append(e.Look(number))
            due = self._now + STUCK_S
        self._at(due, self._is_here, self._look_for_stuck, number)

    def _take_from(self, worker: Worker) -> None:
        """What waits behind the task that it runs; ``_level`` does so again only if more was sent since.

        Scenario 3: (a) a worker that has begun nothing is stopped, (b) all that it has is taken from it, (c) so it has
        nothing to do, and is sent something again, on and on, and nobody finds out.  So it must have begun something.
        """
        worker.levelled = worker.number_at_head()
        self._out.append(e.TakeBack(worker.number))

    def _take(self, worker: Worker, most: int) -> list[int]:
        """From a queue in which not all is plain."""
        batch: list[int] = []
        queue = self._queue
        while queue and len(batch) < most:
            task = queue[0]
            if isinstance(task, int):
                queue.popleft()
                if task in self._withdrawn:
                    self._withdrawn.discard(task)
                    continue
                worker.sent.append(task)
                batch.append(task)
                self._queued -= 1
                continue
            if task.state is not T.QUEUED:
                queue.popleft()  # settled while it waited
                self._known_in_queue -= 1
                continue
            if worker.sent and worker.sent_bytes + task.new.size_bytes > AHEAD_BYTES:
                break
            queue.popleft()
            self._known_in_queue -= 1
            self._queued -= 1
            self._move_task(task, T.SENT)
            task.worker = worker.number
            worker.sent.append(task)
            worker.sent_bytes += task.new.size_bytes
            batch.append(task.new.task)
        return batch

    def _on_sent_directly(self, event: e.SentDirectly) -> None:
        worker = self._workers.get(event.worker)
        self._unsettled += 1
        if worker is None or worker.state is not W.IDLE:
            self._queued += 1
            self._queue.append(event.task)
            return
        if worker.left is not None:
            worker.left -= 1
        worker.sent.append(event.task)
        self._move_worker(worker, W.BUSY)
        self._await_start(worker)

    def _on_answered_directly(self, event: e.AnsweredDirectly) -> None:
        worker = self._workers.get(event.worker)
        if worker is not None:
            worker.waited_s = 0.0
            self._note_answers(event.run_s)

    def _note_answers(self, run_s: float) -> None:
        """Tasks have come to something, after ``run_s`` each."""
        self._moved_at = self._now
        self._failed_starts = self._idle_deaths = 0
        # Quick to believe that tasks are long, slow to believe that they are short.
        mean = self._mean_s
        self._mean_s = run_s if mean is None else max(run_s, 0.8 * mean + 0.2 * run_s)

    def _await_start(self, worker: Worker) -> None:
        """Scenario 1: an idle worker is stopped, or stuck, and gets a task, whose timeout never starts.

        A plain task does not tell that it has begun, so that is looked up before anybody is blamed.

        Scenario 4: (a) a worker is stopped, (b) what it is sent has a deadline of a second, or is cancelled, and is
        taken from it, (c) so it has nothing to do, and is sent the next one, which it does not begin either: all that
        it is ever sent is lost.  So the times that it had something to begin are added up until it begins something.
        """
        worker.quiet_since = self._now
        if not worker.start_is_awaited:
            worker.start_is_awaited = True
            self._at(self._now + LOOK_S, self._is_here, self._look_for_start, worker.number)

    def _waited_in_vain(self, worker: Worker, waited_s: float) -> None:
        """It has begun nothing in all that time, and all was taken from it."""
        if waited_s > LOOK_S:  # one that is well is not blamed for a thousand tasks that are cancelled at once
            worker.waited_s += waited_s
            if worker.waited_s >= ACK_LIMIT_S and worker.state is W.IDLE:
                self._kill(worker)

    def _is_here(self, number: int) -> bool:
        return number in self._workers

    def _look_for_start(self, number: int) -> None:
        worker = self._workers[number]
        worker.start_is_awaited = False
        if worker.state is not W.BUSY or worker.begun:
            return
        limit_s = max(2 * LOOK_S, ACK_LIMIT_S - worker.waited_s)
        due = worker.quiet_since + limit_s + worker.sent_bytes / READ_BYTES_PER_S
        if self._now >= due:
            self._kill(worker)
            return
        worker.start_is_awaited = True
        if self._now < worker.quiet_since + LOOK_S:
            due = worker.quiet_since + LOOK_S
        else:
            self._out.append(e.Look(worker.number))
            due = min(due, self._now + LOOK_AGAIN_S)
        self._at(due, self._is_here, self._look_for_start, number)

    def _level(self) -> None:
        """Tasks that wait behind another go to a worker that is free, or a seat: soon, if they are worth it."""
        free = len(self._idle) + self._policy.max_workers - len(self._workers)
        if self._queued or not free or self._mean_s is None:
            return
        patience_s = WORTH_MOVING_S if self._idle and self._mean_s >= WORTH_MOVING_S else AHEAD_S
        for worker in self._workers.values():
            if worker.state is not W.BUSY or len(worker.sent) < 2 or worker.levelled == worker.number_at_head():
                continue
            due = worker.quiet_since + patience_s
            if due > self._now:
                if not self._balancing:
                    self._balancing = True
                    self._at(due, always, self._level_again)
            elif not worker.begun:  # as far as it was told, and that is told late of what was sent alone
                if worker.looked_up != worker.number_at_head():
                    worker.looked_up = worker.number_at_head()
                    self._out.append(e.Look(worker.number))
            elif free:
                free -= 1
                self._take_from(worker)

    def _level_again(self) -> None:
        """``handle`` does."""
        self._balancing = False

    # ------------------------------------------------------------ workers come

    def _on_wanted(self, event: e.WorkerWanted) -> None:
        # Also beside a worker that has nothing to do: if one of the stock pool's has not worked yet, it starts another.
        most = self._policy.max_workers
        self._manned = most if self._policy.start_all else min(most, max(self._manned, len(self._workers) + 1))

    def _man_the_seats(self) -> None:
        """Promise 1: a task that waits has a worker that lives or starts.  And a seat once manned stays so."""
        most = self._policy.max_workers
        if len(self._workers) >= most and (self._fit or not self._queued):
            return  # as nearly always
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
            self._at(self._now + STARVED_S, always, self._starved_too_long)

    def _spawn(self) -> None:
        self._worker_number += 1
        worker = Worker(self._worker_number, self._policy.max_tasks_per_child)
        self._workers[worker.number] = worker
        self._starting += 1
        self._fit += 1
        self._out.append(e.Spawn(worker.number))
        self._at(self._now + BOOT_LIMIT_S, self._is_booting, self._boot_overdue, worker.number)

    def _delay_spawn(self, row: int) -> None:
        self._spawn_at(self._now + RESPAWN_DELAYS_S[min(row, len(RESPAWN_DELAYS_S) - 1)])

    def _spawn_at(self, when: float) -> None:
        self._spawn_from = when
        if when > self._now:
            self._at(when, always, _nothing)

    def _starved_too_long(self) -> None:
        self._starved = False
        if self._queued and self._fit == 0:
            for worker in tuple(self._workers.values()):
                if worker.state is W.RETIRING:
                    self._kill(worker)

    def _is_booting(self, number: int) -> bool:
        worker = self._workers.get(number)
        return worker is not None and worker.state is W.STARTING and not worker.booted

    def _boot_overdue(self, number: int) -> None:
        self._kill(self._workers[number], ours=False)

    def _on_booted(self, event: e.WorkerBooted) -> None:
        worker = self._workers.get(event.worker)
        if worker is not None:
            worker.booted = True

    # -------------------------------------------------------------- workers go

    def _on_unfit(self, event: e.WorkerUnfit) -> None:
        worker = self._workers.get(event.worker)
        if worker is None:
            return
        worker.unfit = event.reason
        if worker.state is W.STARTING:
            # It ends by itself.  What it logs is on its way: a kill now would lose it.
            self._retire(worker, UNFIT_GRACE_S)

    def _on_channel_lost(self, event: e.ChannelLost) -> None:
        worker = self._workers.get(event.worker)
        if worker is not None and worker.state in (W.STARTING, W.IDLE, W.BUSY):
            worker.lost = event.reason
            self._kill(worker, ours=False)

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

    def _bury(self, worker: Worker) -> None:
        self._move_worker(worker, W.DEAD)
        del self._workers[worker.number]

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


_FIT = frozenset({W.STARTING, W.IDLE, W.BUSY})


def _nothing(*key: Any) -> None:
    """A timer that only wants ``handle`` to look again."""
