"""A hypothesis state machine that drives ``safepool.testing.Simulation`` through every kind of trouble."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from safepool._core import Core
from safepool.policy import PoolPolicy
from safepool.testing import Simulation

MOST_TASKS = 40
pick = st.integers(0, 1000)


def machine(core: Callable[[PoolPolicy], Core] = Core) -> type[RuleBasedStateMachine]:
    """The state machine for a core; a broken one is given to see whether the simulation notices."""

    class PoolMachine(RuleBasedStateMachine):
        sim: Simulation

        @initialize(
            workers=st.integers(1, 3),
            turnover=st.sampled_from([None, None, 1, 2, 3]),
            death=st.sampled_from(["heal", "heal", "heal", "break"]),
            tickets=st.sampled_from([True, True, True, False]),
            all_at_once=st.booleans(),
            grace=st.sampled_from([0.0, 0.0, 0.2]),
            stall=st.sampled_from([None, None, 0.4]),
        )
        def make(
            self,
            workers: int,
            turnover: int | None,
            death: Any,
            tickets: bool,
            all_at_once: bool,
            grace: float,
            stall: float | None,
        ) -> None:
            policy = PoolPolicy(workers, turnover, death, all_at_once, tickets, grace=grace, stall_timeout=stall)
            self.sim = Simulation(policy, core)

        # ------------------------------------------------------------ users

        @precondition(lambda self: len(self.sim.tasks) < MOST_TASKS and not self.sim.closed)
        @rule(
            timeout=st.sampled_from([None, None, 0.01, 0.5]),
            deadline=st.sampled_from([None, None, 0.05, 2.0]),
            deaths=st.sampled_from([None, None, 1, 2]),
            size=st.sampled_from([0, 0, 200_000]),
            silent=st.sampled_from([False, False, False, True]),
        )
        def submit(
            self, timeout: float | None, deadline: float | None, deaths: int | None, size: int, silent: bool
        ) -> None:
            self.sim.submit(timeout=timeout, deadline=deadline, deaths=deaths, size_bytes=size, silent=silent)

        @precondition(lambda self: len(self.sim.tasks) < MOST_TASKS and not self.sim.closed)
        @rule(
            count=st.integers(2, 6), timeout=st.sampled_from([None, None, 0.1]), deaths=st.sampled_from([None, None, 2])
        )
        def submit_many(self, count: int, timeout: float | None, deaths: int | None) -> None:
            self.sim.submit_many(count, timeout=timeout, deaths=deaths)

        @precondition(lambda self: len(self.sim.tasks) < MOST_TASKS and not self.sim.closed)
        @rule(count=st.integers(2, 6))
        def submit_items(self, count: int) -> None:
            self.sim.submit_items(count)

        @precondition(lambda self: len(self.sim.tasks) < MOST_TASKS and not self.sim.closed)
        @rule(count=st.integers(1, 3))
        def submit_directly(self, count: int) -> None:
            for _ in range(count):
                self.sim.submit_directly()

        @precondition(lambda self: not self.sim.closed)
        @rule()
        def submit_what_cannot_be_sent(self) -> None:
            self.sim.want_worker()

        @precondition(lambda self: self.sim.tasks)
        @rule(n=pick, later=st.booleans())
        def cancel(self, n: int, later: bool) -> None:
            self.sim.cancel(self._unsettled(n), later=later)

        @precondition(lambda self: self.sim.tasks)
        @rule(n=pick, count=st.integers(1, 5))
        def cancel_range(self, n: int, count: int) -> None:
            first = self._unsettled(n)
            self.sim.cancel_range(first, first + count)

        @precondition(lambda self: self.sim.tasks)
        @rule(n=pick)
        def kill_task(self, n: int) -> None:
            self.sim.kill(self._unsettled(n))

        @precondition(lambda self: self.sim.asked)
        @rule(n=pick, delay=st.sampled_from([None, 0.0, 0.0, 0.3]))
        def retry_policy_answers(self, n: int, delay: float | None) -> None:
            asked = sorted(set(self.sim.asked) - self.sim.silent)
            if asked:
                self.sim.answer(asked[n % len(asked)], delay)

        @precondition(lambda self: len(self.sim.log) > 25 and not self.sim.closed)
        @rule(cancel=st.booleans(), n=st.integers(0, 3))
        def shutdown(self, cancel: bool, n: int) -> None:
            if n == 0:
                self.sim.shutdown(cancel=cancel)

        @precondition(lambda self: len(self.sim.log) > 25 and not self.sim.closed)
        @rule(hard=st.booleans(), n=st.integers(0, 9))
        def end_workers(self, hard: bool, n: int) -> None:
            if n == 0:
                self.sim.end_workers(hard=hard)

        # ---------------------------------------------------------- workers

        @precondition(lambda self: self.sim.workers)
        @rule(n=pick)
        def ready(self, n: int) -> None:
            self.sim.ready(self._worker(n))

        @precondition(lambda self: self.sim.workers)
        @rule(n=pick, heard=st.booleans())
        def begin(self, n: int, heard: bool) -> None:
            number = self._worker(n)
            self.sim.begin(number)
            if heard:
                self.sim.hear(number)

        @precondition(lambda self: self.sim.workers)
        @rule(n=pick, ok=st.booleans(), heard=st.booleans())
        def finish(self, n: int, ok: bool, heard: bool) -> None:
            number = self._worker(n)
            self.sim.begin(number)
            self.sim.finish(number, ok=ok)
            if heard:
                self.sim.hear(number)

        @precondition(lambda self: self.sim.workers)
        @rule(n=pick)
        def hear(self, n: int) -> None:
            self.sim.hear(self._worker(n))

        @precondition(lambda self: self.sim.workers)
        @rule()
        def all_ready_and_begin(self) -> None:
            """A shortcut into the depth: tasks run everywhere, and it is known."""
            for number in sorted(self.sim.workers):
                self.sim.ready(number)
                self.sim.begin(number)
                self.sim.hear(number)

        @precondition(lambda self: self.sim.workers)
        @rule(n=pick, code=st.sampled_from([0, -9, -11, 7, None]))
        def die(self, n: int, code: int | None) -> None:
            self.sim.die(self._worker(n), code)

        @precondition(lambda self: any(not w.can_work() for w in self.sim.workers.values()))
        @rule(n=pick)
        def a_doomed_one_dies(self, n: int) -> None:
            going = [w for w in self.sim.workers.values() if not w.can_work()]
            worker = going[n % len(going)]
            self.sim.die(worker.number, -9 if worker.kills else 0)

        @precondition(lambda self: self.sim.workers and len(self.sim.tasks) < MOST_TASKS)
        @rule(
            n=pick,
            deadline=st.sampled_from([None, 1.0]),
            timeout=st.sampled_from([None, 0.3]),
            silent=st.sampled_from([False, False, True]),
            delay=st.sampled_from([0.0, 0.2]),
            how=st.sampled_from(["error", "death", "timeout"]),
            drain=st.sampled_from([False, False, False, False, True]),
        )
        def fail_and_try_again(
            self, n: int, deadline: float | None, timeout: float | None, silent: bool, delay: float,
            how: str, drain: bool,
        ) -> None:  # fmt: skip
            """A task fails or takes its worker down, its policy wants more, and it hangs the second time."""
            self.sim.submit(deadline=deadline, timeout=timeout, deaths=2, silent=silent)
            for number in sorted(self.sim.workers):
                self.sim.ready(number)
                self.sim.begin(number)
                if how == "error":
                    self.sim.finish(number, ok=False)
                self.sim.hear(number)
                if how == "death" and self.sim.workers[number].in_hand is not None:
                    self.sim.die(number)
            if how == "timeout":
                self.sim.advance(0.4)
                for worker in [worker for worker in self.sim.workers.values() if worker.kills]:
                    self.sim.die(worker.number)
            if drain:
                self.sim.shutdown(cancel=False)
            for task in sorted(set(self.sim.asked) - self.sim.silent):
                self.sim.answer(task, delay)
            for number in sorted(self.sim.workers):
                self.sim.ready(number)
                self.sim.begin(number)
                self.sim.hear(number)
            self.sim.advance(delay + 0.4)

        @precondition(lambda self: self.sim.workers and len(self.sim.tasks) < MOST_TASKS)
        @rule(deaths=st.integers(1, 3))
        def take_down_workers(self, deaths: int) -> None:
            """A poison task: its policy always wants more, and every worker that begins it dies."""
            task = self.sim.submit(deaths=deaths)
            for _ in range(deaths + 1):
                for number in sorted(self.sim.workers):
                    self.sim.ready(number)
                    self.sim.begin(number)
                    self.sim.hear(number)
                for worker in [worker for worker in self.sim.workers.values() if worker.in_hand == task]:
                    self.sim.die(worker.number)
                self.sim.answer(task, 0.0)

        @precondition(lambda self: len(self.sim.tasks) < MOST_TASKS and not self.sim.closed)
        @rule()
        def run_for_long(self) -> None:
            """A plain task, which does not say that it has begun, takes longer than any task may take to begin."""
            task = self.sim.submit()
            for number in sorted(self.sim.workers):
                self.sim.ready(number)
                self.sim.begin(number)
                self.sim.hear(number)
            runs_it = [worker for worker in self.sim.workers.values() if worker.in_hand == task and worker.can_work()]
            self.sim.advance(12.0)
            is_well = self.sim.policy.stall_timeout is None and self.sim.core.snapshot().pool in ("open", "draining")
            for worker in runs_it if is_well else []:
                assert worker.can_work(), "a worker is killed that does what it should"

        @precondition(lambda self: self.sim.workers and len(self.sim.tasks) < MOST_TASKS)
        @rule(begun=st.booleans(), later=st.booleans(), die=st.booleans())
        def cancel_what_was_sent(self, begun: bool, later: bool, die: bool) -> None:
            """The newest task is with a worker, which may have begun it without our having heard of it."""
            for number in sorted(self.sim.workers):
                self.sim.ready(number)
            task = self.sim.submit()
            for number in sorted(self.sim.workers) if begun else []:
                self.sim.begin(number)
            self.sim.cancel(task, later=later)
            for number in sorted(self.sim.workers):
                self.sim.hear(number)
                if die:
                    self.sim.die(number)

        @precondition(lambda self: self.sim.workers)
        @rule(n=pick)
        def late_answer_then_death(self, n: int) -> None:
            """A task hangs past its limit, answers all the same, then the kill arrives."""
            number = self._worker(n)
            self.sim.begin(number)
            self.sim.hear(number)
            self.sim.advance(0.6)
            if number in self.sim.workers:
                self.sim.finish(number)
                self.sim.hear(number)
            if number in self.sim.workers and self.sim.workers[number].kills:
                self.sim.die(number)

        @precondition(lambda self: self.sim.workers)
        @rule(n=pick, immortal=st.sampled_from([False, False, True]))
        def get_stuck(self, n: int, immortal: bool) -> None:
            """The worker hangs at its start or its exit; an immortal one even when it is killed."""
            worker = self.sim.workers[self._worker(n)]
            worker.stuck = True
            worker.immortal = worker.immortal or immortal

        @precondition(lambda self: self.sim.workers and len(self.sim.tasks) < MOST_TASKS - 4 and not self.sim.closed)
        @rule(deadline=st.sampled_from([None, 0.5, 6.0]))
        def freeze_and_withdraw(self, deadline: float | None) -> None:
            """Workers are stopped, and what they are sent is taken from them again, and again."""
            for number in sorted(self.sim.workers):
                self.sim.ready(number)
                self.sim.workers[number].stuck = True
            for _ in range(4):
                if not self.sim.closed:
                    task = self.sim.submit(deadline=deadline)
                    self.sim.advance(6.0)
                    self.sim.cancel(task)

        @precondition(lambda self: any(not w.ready for w in self.sim.workers.values()))
        @rule()
        def hang_at_start(self) -> None:
            """A task waits for a worker that never gets ready."""
            for worker in self.sim.workers.values():
                worker.stuck = worker.stuck or not worker.ready
            self.sim.advance(70.0)

        @precondition(lambda self: self.sim.workers)
        @rule(n=pick)
        def lose_channel(self, n: int) -> None:
            self.sim.lose_channel(self._worker(n))

        @precondition(lambda self: len(self.sim.log) > 40 and any(not w.ready for w in self.sim.workers.values()))
        @rule(n=pick)
        def unfit(self, n: int) -> None:
            starting = [w for w in self.sim.workers.values() if not w.ready]
            if n % 4 == 0:
                self.sim.unfit(starting[n % len(starting)].number)

        @rule(count=st.integers(1, 3))
        def spawns_fail(self, count: int) -> None:
            self.sim.spawns_fail = count

        @precondition(lambda self: any(not w.ready and w.can_work() for w in self.sim.workers.values()))
        @rule()
        def crash_loop(self) -> None:
            """Every worker dies before it is ready, again and again."""
            for _ in range(30):
                starting = [w for w in self.sim.workers.values() if not w.ready and w.can_work()]
                if not starting:
                    break
                self.sim.die(starting[0].number, 1)
                self.sim.advance(0.5)

        # ------------------------------------------------------------- time

        @rule(seconds=st.sampled_from([0.001, 0.03, 0.6, 1.5, 6.0, 70.0]))
        def advance(self, seconds: float) -> None:
            self.sim.advance(seconds)

        def teardown(self) -> None:
            if hasattr(self, "sim") and not self.sim.violated:
                self.sim.settle()

        # ---------------------------------------------------------- picking

        def _worker(self, n: int) -> int:
            numbers = sorted(self.sim.workers)
            return numbers[n % len(numbers)]

        def _unsettled(self, n: int) -> int:
            tasks = sorted(set(self.sim.tasks) - set(self.sim.outcomes)) or sorted(self.sim.tasks)
            return tasks[n % len(tasks)]

    return PoolMachine
