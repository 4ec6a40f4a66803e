"""What the core decides in cases that a random history seldom meets."""

from __future__ import annotations

from typing import Any

import pytest

from safepool import _core, _seats
from safepool import _events as e
from safepool.policy import PoolPolicy
from safepool.testing import Simulation


def states(sim: Simulation) -> list[str]:
    """How the tasks stand, in the order of their submission."""
    open_ones = sim.core.snapshot().tasks
    return [open_ones.get(task) or sim.outcomes[task] for task in sim.tasks]


def test_cancelling_at_shutdown_spares_what_starting_workers_will_run() -> None:
    """A program that submits and at once shuts down with ``cancel_futures`` has as many answers as workers start."""
    sim = Simulation(PoolPolicy(max_workers=2))
    sim.submit_many(5)
    sim.shutdown(cancel=True)
    assert states(sim) == ["queued", "queued", "cancelled", "cancelled", "cancelled"]
    for worker in tuple(sim.workers):
        sim.ready(worker)
    assert states(sim)[:2] == ["sent", "sent"]
    sim.settle()
    assert states(sim)[:2] == ["answered", "answered"]


def test_cancelling_at_shutdown_leaves_an_idle_worker_what_it_was_about_to_begin() -> None:
    """The same a moment later: the workers have their tasks and have not begun them."""
    sim = Simulation(PoolPolicy(max_workers=2))
    sim.submit_many(5)
    for worker in tuple(sim.workers):
        sim.ready(worker)
    sim.shutdown(cancel=True)
    assert states(sim)[2:] == ["cancelled", "cancelled", "cancelled"]
    sim.settle()
    assert states(sim)[:2] == ["answered", "answered"]


def test_nobody_is_started_for_what_was_spared() -> None:
    """Who shuts down with ``cancel_futures`` and then kills the processes meets no new ones, and no task is run."""
    sim = Simulation(PoolPolicy(max_workers=2))
    sim.submit_many(5)
    sim.shutdown(cancel=True)
    for worker in tuple(sim.workers):
        sim.die(worker)
    assert set(states(sim)) == {"cancelled"}
    assert not sim.workers
    sim.settle()


def test_ending_the_workers_spares_nothing() -> None:
    """``kill_workers`` settles every task at once, also those that starting workers would have run."""
    sim = Simulation(PoolPolicy(max_workers=2))
    sim.submit_many(5)
    sim.end_workers(hard=True)
    assert set(states(sim)) == {"cancelled"}
    sim.settle()


def test_a_passing_shortage_breaks_nothing() -> None:
    """A system that starts no process for some seconds: an idle pool bears it for ever, a waiting task for a while."""
    sim = Simulation(PoolPolicy(max_workers=1))
    sim.submit()
    worker = next(iter(sim.workers))
    sim.ready(worker)
    sim.begin(worker)
    sim.finish(worker)
    sim.hear(worker)
    sim.spawns_fail = 10**6
    sim.die(worker)
    sim.advance(3600.0)
    assert sim.core.snapshot().pool == "open"
    sim.submit()
    sim.advance(_core.SHORTAGE_S - 0.5)
    assert states(sim)[1] == "queued"
    sim.spawns_fail = 0
    sim.advance(_seats.HURRIED_S)
    assert sim.workers
    sim.settle()


def test_a_shortage_that_lasts_breaks_the_pool_with_the_evidence() -> None:
    """A task does not wait for ever for a process that cannot be had."""
    sim = Simulation(PoolPolicy(max_workers=1))
    sim.spawns_fail = 10**6
    sim.submit()
    sim.advance(_core.SHORTAGE_S + 1.0)
    assert (states(sim), sim.core.snapshot().pool) == (["broken"], "closed")


def test_each_call_that_cannot_be_sent_starts_a_worker_however_fast_workers_start() -> None:
    """As with the stock pool, which counts a worker as idle when it has worked; CPython's tests count processes."""
    sim = Simulation(PoolPolicy(max_workers=3))
    for so_many in (1, 2, 3, 3):
        sim.want_worker()
        assert len(sim.workers) == so_many
        for worker in tuple(sim.workers):
            sim.ready(worker)
    sim.settle()


def test_what_stalls_is_stopped_and_what_waits_goes_on() -> None:
    """Both workers are stuck: nothing moves, so both tasks end at the pool's stall timeout, and the next ones begin."""
    sim = Simulation(PoolPolicy(max_workers=2, stall_timeout=5.0, take_back=False))
    sim.submit_many(3)
    for worker in tuple(sim.workers):
        sim.ready(worker)
        sim.begin(worker)
        sim.hear(worker)
    sim.advance(4.9)
    assert states(sim) == ["running", "running", "queued"]
    sim.advance(0.2)
    assert states(sim) == ["doomed", "doomed", "queued"]
    for worker in tuple(sim.workers):
        sim.die(worker)
    assert states(sim) == ["timeout", "timeout", "queued"]
    for worker in tuple(sim.workers):
        sim.ready(worker)
    sim.settle()
    assert states(sim)[2] == "answered"


def test_one_that_moves_keeps_the_others_from_stalling() -> None:
    """A long task is not stalled while short ones come and go."""
    sim = Simulation(PoolPolicy(max_workers=2, stall_timeout=5.0, take_back=False))
    sim.submit_many(4)
    long, short = tuple(sim.workers)
    for worker in (long, short):
        sim.ready(worker)
        sim.begin(worker)
        sim.hear(worker)
    for _ in range(2):
        sim.advance(3.0)
        sim.finish(short)
        sim.hear(short)
        sim.begin(short)
        sim.hear(short)
    assert states(sim) == ["running", "answered", "answered", "running"]
    sim.advance(5.1)
    assert states(sim)[0] == states(sim)[3] == "doomed"


def test_an_end_is_a_move_however_a_task_ends() -> None:
    """A neighbour that dies, or goes over its own limit, has moved."""
    sim = Simulation(PoolPolicy(max_workers=2, stall_timeout=5.0, take_back=False))
    sim.submit_many(2)
    long, short = tuple(sim.workers)
    for worker in (long, short):
        sim.ready(worker)
        sim.begin(worker)
        sim.hear(worker)
    sim.shutdown(cancel=False)
    sim.advance(4.0)
    sim.die(short)
    sim.advance(4.0)
    assert states(sim) == ["running", "death"]
    sim.advance(1.1)
    assert states(sim) == ["doomed", "death"]


def test_what_hangs_while_it_starts_has_stalled_too() -> None:
    """A task waits for a worker whose initializer never ends: it is killed, and the next one may do better."""
    sim = Simulation(PoolPolicy(max_workers=1, stall_timeout=5.0))
    sim.submit()
    (worker,) = sim.workers
    sim.boot(worker)
    sim.advance(4.9)
    assert not sim.workers[worker].kills
    sim.advance(0.2)
    assert sim.workers[worker].kills
    sim.die(worker)
    sim.settle()
    assert states(sim) == ["answered"]


def _doomed_with_another_behind() -> _core.Core:
    """Task 2 is to be killed and does not say that it began; its worker has drawn the ticket of 3, too."""
    core = _core.Core(PoolPolicy(max_workers=1))
    for event in (
        e.TasksSubmitted(0.0, (1,), plain=True),
        e.WorkerBooted(0.0, 1),
        e.WorkerReady(0.0, 1),
        e.Received(0.0, 1, (1,), run_s=1e-5),  # so tasks are short, and sent together
        e.TasksSubmitted(0.0, (2, 3), plain=True),
        e.CancelRequested(0.0, 2, kill=True, unsent=False),
        e.TakenBack(0.0, 1, ()),
    ):
        core.handle(event)
    assert e.Kill in map(type, core.handle(e.Ticked(_core.PURSUE_AGAIN_S)))
    return core


def _fails(commands: list[e.Command]) -> dict[int, str]:
    return {command.task: command.failure.kind for command in commands if isinstance(command, e.Fail)}


def test_what_began_behind_a_doomed_task_does_not_run_twice() -> None:
    """Scenario 6: the doomed one answers too late, and the next one has begun when the kill arrives."""
    core = _doomed_with_another_behind()
    core.handle(e.Received(1.1, 1, (2,), begun=3))
    commands = core.handle(e.WorkerDied(1.2, 1, -9, ()))
    assert _fails(commands) == {2: "cancelled", 3: "death"}
    assert not any(isinstance(command, e.Requeue) for command in commands)


def test_what_ended_behind_a_doomed_task_has_its_answer() -> None:
    """The same, and the next one has ended as well."""
    core = _doomed_with_another_behind()
    assert e.Resolve((3,)) in core.handle(e.Received(1.1, 1, (2, 3)))
    assert _fails(core.handle(e.WorkerDied(1.2, 1, -9, ()))) == {2: "cancelled"}


def _two_workers_that_know(run_s: float) -> _core.Core:
    """Both are idle, and know that a task takes so long."""
    core = _core.Core(PoolPolicy(max_workers=2))
    core.handle(e.TasksSubmitted(0.0, (1, 2), plain=True))
    for worker in (1, 2):
        core.handle(e.WorkerBooted(0.0, worker))
        core.handle(e.WorkerReady(0.0, worker))
    for task, worker in ((1, 1), (2, 2)):
        core.handle(e.Received(0.0, worker, (task,), run_s=run_s))
    return core


def _sent(commands: list[e.Command]) -> dict[int, tuple[int, ...]]:
    return {command.worker: command.tasks for command in commands if isinstance(command, e.Send)}


def _taken_from(commands: list[e.Command]) -> list[int]:
    return [command.worker for command in commands if isinstance(command, e.TakeBack)]


def _looked_at(commands: list[e.Command]) -> list[int]:
    return [command.worker for command in commands if isinstance(command, e.Look)]


def test_a_worker_has_more_to_do_before_it_is_done() -> None:
    """Of tasks that take 15 ms one is sent ahead: a worker that had to ask for it would wait."""
    core = _two_workers_that_know(0.015)
    sent = _sent(core.handle(e.TasksSubmitted(0.1, tuple(range(3, 23)), plain=True)))
    assert sorted(map(len, sent.values())) == [2, 2]


def test_a_free_worker_takes_what_waits_behind_another() -> None:
    """At the end one worker is free, and the other has two: what waits is sent where it runs at once."""
    core = _two_workers_that_know(0.010)
    first, second = _sent(core.handle(e.TasksSubmitted(0.1, (3, 4, 5), plain=True))).values()
    assert (len(first), len(second)) == (2, 1)
    (busy,) = (worker for worker in core._workers.values() if len(worker.sent) == 2)
    free = 3 - busy.number
    commands = core.handle(e.Received(0.105, free, second, run_s=0.005))
    assert _looked_at(commands) == [busy.number]
    assert not _taken_from(commands)
    assert _taken_from(core.handle(e.Received(0.105, busy.number, (), begun=first[0]))) == [busy.number]
    sent = _sent(core.handle(e.TakenBack(0.1051, busy.number, first[1:])))
    assert sent == {free: first[1:]}


def test_nobody_asks_again_and_again_for_what_has_begun() -> None:
    """The same, but the ticket is drawn: the next thing to ask for is what waits behind the next task."""
    core = _two_workers_that_know(0.010)
    first, second = _sent(core.handle(e.TasksSubmitted(0.1, (3, 4, 5), plain=True))).values()
    (busy,) = (worker for worker in core._workers.values() if len(worker.sent) == 2)
    core.handle(e.Received(0.104, busy.number, (), begun=first[0]))
    assert _taken_from(core.handle(e.Received(0.105, 3 - busy.number, second, run_s=0.005))) == [busy.number]
    assert not _taken_from(core.handle(e.TakenBack(0.1051, busy.number, ())))
    assert not _taken_from(core.handle(e.Ticked(0.11)))
    core.handle(e.Received(0.12, busy.number, first, run_s=0.01))
    assert not core.snapshot().tasks


def test_what_is_sent_behind_the_same_task_again_is_taken_again() -> None:
    """A worker that something was taken from is sent more, for its task is young; and then the other one is free."""
    core = _two_workers_that_know(0.010)
    first, second = _sent(core.handle(e.TasksSubmitted(0.1, (3, 4, 5), plain=True))).values()
    (busy,) = (worker for worker in core._workers.values() if len(worker.sent) == 2)
    free = core._workers[3 - busy.number]
    core.handle(e.Received(0.104, busy.number, (), begun=first[0]))
    core.handle(e.Received(0.105, free.number, second, run_s=0.005))
    core.handle(e.TakenBack(0.105, busy.number, first[1:]))
    sent = _sent(core.handle(e.TasksSubmitted(0.106, (6, 7, 8, 9), plain=True)))
    assert len(sent[busy.number]) == 1
    taken = []
    while len(free.sent):
        taken += _taken_from(core.handle(e.Received(0.110, free.number, tuple(map(_number, free.sent)), run_s=0.001)))
    assert taken == [busy.number]


def _number(one: Any) -> int:
    number: int = one if isinstance(one, int) else one.new.task
    return number


def test_what_waits_behind_one_that_takes_for_ever_is_queued_again() -> None:
    """Scenario 2 of ``_seats``: though nobody is free, and there is more to do."""
    core = _two_workers_that_know(0.005)
    sent = _sent(core.handle(e.TasksSubmitted(0.1, tuple(range(3, 10_000)), plain=True)))
    stuck, moving = sent
    behind = sent[stuck][1:]
    assert behind
    now, taken = 0.1, []
    for task in sent[moving]:
        now += 0.3
        commands = core.handle(e.Ticked(now))
        if stuck in _looked_at(commands):
            commands = core.handle(e.Received(now, stuck, (), begun=sent[stuck][0]))
        taken += _taken_from(commands)
        core.handle(e.Received(now, moving, (task,), run_s=0.005))
    assert taken == [stuck]
    core.handle(e.TakenBack(now, stuck, behind))
    in_hand = core._workers[moving].sent
    more = core.handle(e.Received(now, moving, tuple(in_hand), run_s=0.005))
    assert list(_sent(more)) == [moving]
    assert _sent(more)[moving][: len(behind)] == behind


def test_nothing_is_taken_from_a_worker_that_has_begun_nothing() -> None:
    """Scenario 3 of ``_seats``: one that is stopped would be sent something again, on and on."""
    core = _two_workers_that_know(0.010)
    core.handle(e.TasksSubmitted(0.1, (3, 4, 5), plain=True))
    (stopped,) = (worker for worker in core._workers.values() if len(worker.sent) == 2)
    free = 3 - stopped.number
    looked = 0
    killed = False
    now = 0.1
    core.handle(e.Received(0.105, free, tuple(core._workers[free].sent), run_s=0.005))
    while now < 0.1 + _seats.ACK_LIMIT_S + 1 and not killed:
        now += 0.25
        commands = core.handle(e.Ticked(now))
        assert not _taken_from(commands)
        looked += len(_looked_at(commands))
        killed = any(isinstance(command, e.Kill) for command in commands)
    assert killed
    assert 0 < looked < 50


@pytest.mark.parametrize(("each_s", "most"), [(0.5, 20), (6.0, 2), (0.001, None)])
def test_a_worker_that_begins_nothing_of_all_that_it_is_sent(each_s: float, most: int | None) -> None:
    """Scenario 4 of ``_seats``: all of it has a deadline, or is cancelled; ten seconds of that end the worker.

    Not one that had no time to begin anything.
    """
    core = _two_workers_that_know(0.010)
    now, killed_after = 0.1, None
    for task in range(3, 200):
        events = [e.TasksSubmitted(now, (task,), plain=True), e.CancelRequested(now + each_s, task)]
        commands = [command for event in events for command in core.handle(event)]
        taken = _taken_from(commands)
        if not taken:
            killed_after = task - 3
            break
        now += each_s
        killed = core.handle(e.TakenBack(now, taken[0], (task,)))
        if any(isinstance(command, e.Kill) for command in killed):
            killed_after = task - 2
            break
    assert killed_after == most
