"""Seeded faults: each is a bug that a pool in the world had, put into the core; the simulation must notice."""

from __future__ import annotations

from typing import Any

from safepool import _core as c
from safepool import _events as e
from safepool._core import Core
from safepool._tables import TaskState, WorkerState


class ExitCodeZeroIgnored(Core):
    """A worker that ends with 0 is not counted as dead (so Pebble loses the future of os._exit(0))."""

    def _on_died(self, event: e.WorkerDied) -> None:
        if event.exitcode != 0:
            super()._on_died(event)


class CancelledTaskLeftInQueue(Core):
    """A cancelled task stays where the next free worker finds it."""

    def _settle(self, task: Any, failure: Any = None) -> None:
        queued = task.state is TaskState.QUEUED
        super()._settle(task, failure)
        if queued:
            task.state = TaskState.QUEUED
            self._queued += 1


class LateResultAccepted(Core):
    """The answer of a task whose worker is being killed for it is taken all the same."""

    def _pop_sent(self, worker: Any, number: int) -> Any:
        if worker.sent and self._make_known(worker)[0].state is TaskState.DOOMED:
            worker.sent[0].state = TaskState.RUNNING
        return super()._pop_sent(worker, number)


class RetiredNotReplaced(Core):
    """A worker that retired keeps its seat: the incident, in one line."""

    _ghosts = 0

    def _bury(self, worker: Any) -> None:
        self._ghosts += worker.state is WorkerState.RETIRING
        super()._bury(worker)

    def _man_the_seats(self) -> None:
        if self._ghosts + len(self._workers) < self._policy.max_workers:
            super()._man_the_seats()


class StallUnseenAfterTheFirst(Core):
    """Whoever looked once whether something moves does not look again."""

    _has_looked = False

    def _look_for_stall(self, stall_s: float) -> None:
        if not self._has_looked:
            super()._look_for_stall(stall_s)
        self._has_looked = True


class DeadlineDroppedOnRetry(Core):
    """The second attempt has no deadline any more."""

    def _deadline_reached(self, number: int) -> None:
        if self._tasks[number].attempt == 1:
            super()._deadline_reached(number)


class TimeoutDroppedOnRetry(Core):
    """The second attempt has no timeout any more."""

    def _task_began(self, worker: Any, number: int) -> None:
        task = self._tasks.get(number)
        if task is not None and task.attempt > 1:
            task.new = task.new._replace(timeout=None)
        super()._task_began(worker, number)


class RetiringSeatGivenAway(Core):
    """A successor starts while its predecessor still lives: more workers than asked for."""

    def _man_the_seats(self) -> None:
        hidden = {n: w for n, w in self._workers.items() if w.state is WorkerState.RETIRING}
        for number in hidden:
            del self._workers[number]
        super()._man_the_seats()
        self._workers.update(hidden)


class DeathBlamedOnTheQueue(Core):
    """Everything at a dead worker fails, not just what it ran (the stock pool and loky)."""

    def _on_died(self, event: e.WorkerDied) -> None:
        worker = self._workers.get(event.worker)
        if worker is not None:
            for task in list(self._make_known(worker))[1:]:
                worker.sent.remove(task)
                self._attempt_failed(task, e.Failure("death", worker.number, event.exitcode))
        super()._on_died(event)


class BegunTaskRunAgain(Core):
    """What a dead worker ran goes back to the queue, as if it had not begun."""

    def _on_died(self, event: e.WorkerDied) -> None:
        worker = self._workers.get(event.worker)
        if worker is not None and worker.sent and self._make_known(worker)[0].state is TaskState.RUNNING:
            worker.sent[0].state = TaskState.SENT
            event = event._replace(unbegun=tuple(task.new.task for task in worker.sent))
        super()._on_died(event)


class KillWithoutTakingBack(Core):
    """The kill for a timeout hits whatever the worker has begun meanwhile (Pebble's open race)."""

    def _pursue(self, task: Any) -> None:
        worker = self._workers[task.worker]
        if task.state is TaskState.RUNNING:
            task.wish = None
            task.failure = e.Failure("timeout", worker.number)
            if worker.state is not WorkerState.KILLING:
                self._kill(worker)
        else:
            super()._pursue(task)


class KillForgotten(Core):
    """Nobody looks whether a killed worker dies."""

    def _is_dying(self, number: int, kills: int) -> bool:
        return False


class CrashLoopForEver(Core):
    """Workers that die at their start are replaced for ever."""

    def _start_failed(self, reason: str, *, bear: bool = False) -> None:
        self._delay_spawn(0)


class BackoffForgottenAtShutdown(Core):
    """A shutdown does not wait for tasks that wait for their next attempt."""

    def _on_answer(self, event: e.RetryAnswered) -> None:
        super()._on_answer(event)
        for task in tuple(self._tasks.values()):
            if task.state is TaskState.BACKOFF and self._state is not c.P.OPEN:
                del self._tasks[task.new.task]


class ClosedTooEarly(Core):
    """The pool closes while a worker still lives."""

    def _wind_up(self) -> None:
        super()._wind_up()
        if self._workers and self._state is not c.P.CLOSED:
            self._state = c.P.CLOSED
            self._out.append(e.Close())


class SilentRetryPolicyWaitedFor(Core):
    """A retry policy that never answers keeps its task for ever."""

    def _no_answer(self, number: int, attempt: int) -> None:
        pass


class SentTaskCancelledBlindly(Core):
    """cancel() of a task that was sent says yes without asking the tickets."""

    def _withdraw(self, task: Any, why: e.Failure, *, even_running: bool) -> None:
        if task.state is TaskState.SENT and not even_running:
            self._workers[task.worker].sent.remove(task)
            self._settle(task, why)
        else:
            super()._withdraw(task, why, even_running=even_running)


class StartingDeathIgnored(Core):
    """A worker that dies before it is ready keeps its seat."""

    def _on_died(self, event: e.WorkerDied) -> None:
        worker = self._workers.get(event.worker)
        if worker is None or worker.ready:
            super()._on_died(event)


class RetriesUncounted(Core):
    """Deaths are not counted, so a poison task takes down workers for ever."""

    def _attempt_failed(self, task: Any, failure: e.Failure) -> None:
        super()._attempt_failed(task, failure)
        task.deaths = 0


class RetireeNeverKilled(Core):
    """A worker that was asked to exit and does not is waited for."""

    def _retire_overdue(self, number: int) -> None:
        pass

    def _starved_too_long(self) -> None:
        self._starved = False


class HangingBootWaitedFor(Core):
    """A worker that hangs before its first word counts as starting for ever."""

    def _boot_overdue(self, number: int) -> None:
        pass


class FrozenWorkerWaitedFor(Core):
    """A worker that never begins what it was sent is waited for."""

    def _look_for_start(self, number: int) -> None:
        pass


class FrozenWorkerForgiven(Core):
    """A worker that begins nothing has all the time anew whenever what it has is taken from it."""

    def _waited_in_vain(self, worker: Any, waited_s: float) -> None:
        pass


class FrozenWorkerEmptied(Core):
    """What waits at a worker is taken from it though it has begun nothing, and that counts for nothing."""

    def _look_for_start(self, number: int) -> None:
        super()._look_for_start(number)
        worker = self._workers[number]
        if worker.state is WorkerState.BUSY and not worker.begun:
            self._take_from(worker)

    def _waited_in_vain(self, worker: Any, waited_s: float) -> None:
        pass


class PlainTaskTakenForFrozen(Core):
    """A plain task does not say that it has begun, so its worker is killed as one that has not."""

    def _on_received(self, event: e.Received) -> None:
        if event.finished or event.begun is None or not isinstance(self._head(event.worker), int):
            super()._on_received(event)

    def _head(self, number: int) -> Any:
        worker = self._workers.get(number)
        return worker.sent[0] if worker is not None and worker.sent else None


class WithdrawnTaskStaysInQueue(Core):
    """A plain task that is cancelled while it waits is found by the next free worker all the same."""

    def _end_waiting(self, tasks: list[int]) -> None:
        super()._end_waiting(tasks)
        self._withdrawn.clear()


class LentWorkerSentTo(Core):
    """A worker that was lent to callers, and has a task of theirs, is taken for idle."""

    def _on_sent_directly(self, event: e.SentDirectly) -> None:
        self._on_submitted(e.TasksSubmitted(event.now, (event.task,)))


MUTANTS = [
    mutant
    for mutant in list(globals().values())
    if isinstance(mutant, type) and issubclass(mutant, Core) and mutant is not Core
]
