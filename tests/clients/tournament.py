"""One SCML tournament, the same on any pool; whatever happens, this process ends and says how far it came.

    python tournament.py --pool safepool --worlds 30 --workers 8 --recycle 2 --out scores.json

Runs in an environment with negmas 0.11.3 and scml 0.7.7 (``constraints-negmas.txt``), or with negmas 0.16.0 and scml
0.8.4 (``constraints-negmas-new.txt``), and for ``--pool safepool`` with safepool.  ``--fault`` has something go wrong:
workers are killed after the first world, or an agent of world ``BAD_WORLD`` misbehaves.  Exit codes: 0, all worlds are
done; 1, some failed; 75, nothing moved for ``--give-up`` seconds (``Done= Running= Pending=`` is printed, the workers
are killed).

The score table depends on the arguments only: every world is seeded with its own number.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import faulthandler
import json
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NoReturn

AsCompleted = Callable[..., Iterator[Future[Any]]]

FAULTS = ("kill one", "kill all", "exit", "stuck", "print")
FAULT = "TOURNAMENT_FAULT"  # tells workers which
BAD_WORLD = 3
WORLD_S = 20.0  # for one world, which takes a second: then it is stuck
PRINTED = 40_000  # bytes per step
GAVE_UP = 75
GIVE_UP_S = 120.0
LOOK_S = 0.25
KILLED_S = 5.0  # for killed workers to be gone
STEPS = 10  # days in a world: about a second of work
PLAYERS = 3  # competitors, all of them in every world; each configuration makes that many worlds
NO_LIMIT_S = 3600  # of a world, a negotiation, a step


def main() -> int:
    options = arguments()
    if os.environ.get("PYTHONHASHSEED") != "0":
        # negmas iterates over sets of strings, so the scores depend on their hashes.
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "PYTHONHASHSEED": "0"})
    watch = Watch(options.give_up)
    watch.start()
    began = time.monotonic()
    with ExitStack() as stack:
        if options.pool == "safepool":
            import safepool

            limit_s = WORLD_S if options.fault in ("stuck", "print") else None
            summary = options.out.with_suffix(".summary")
            stack.enter_context(safepool.patch(timeout=limit_s, summary=summary))
        stack.callback(setattr, concurrent.futures, "as_completed", concurrent.futures.as_completed)
        watched = watch.as_completed(concurrent.futures.as_completed)
        concurrent.futures.as_completed = watched  # type: ignore[assignment]
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tournament-", dir=options.out.parent))
        if options.fault is not None:
            prepare(options.fault, watch)
        results = play(options, folder, watch)
    report = {
        "pool": options.pool,
        "python": sys.version.split()[0],
        "seconds": round(time.monotonic() - began, 1),
        "futures": sorted(watch.kinds),
        "worlds": len({world_number(world) for world in results.scores["world"]}),
        "scores": table(results.scores),
        "totals": sorted(results.total_scores[["agent_type", "score"]].values.tolist()),
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{report['worlds']} of {options.worlds} worlds done in {report['seconds']} s", flush=True)
    # negmas swallows the errors of worlds and makes its table of the others.
    return 0 if report["worlds"] == options.worlds else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pool", choices=["stock", "safepool", "serial"], required=True)
    parser.add_argument("--worlds", type=int, default=30, help=f"how many; a multiple of {PLAYERS}")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--recycle", type=int, default=2, help="worlds per worker process (MAX_TASKS_PER_CHILD)")
    parser.add_argument("--out", type=Path, required=True, help="file for the score table (JSON)")
    parser.add_argument("--fault", choices=FAULTS)
    parser.add_argument("--give-up", type=float, default=GIVE_UP_S, metavar="SECONDS", help="when nothing moves")
    options = parser.parse_args()
    if options.worlds < PLAYERS or options.worlds % PLAYERS:
        parser.error(f"--worlds must be a multiple of {PLAYERS}, the number of competitors; got {options.worlds}")
    if options.workers < 1 or options.recycle < 1 or not options.give_up > 0:
        parser.error("--workers, --recycle and --give-up must be positive")
    options.out = options.out.absolute()
    return options


# ----------------------------------------------------------------- the tournament


def play(options: argparse.Namespace, folder: str, watch: Watch) -> Any:
    """What scml's ``anac2024_oneshot`` does, with short worlds and a world generator that seeds."""
    import importlib

    import numpy
    from negmas.helpers.numeric import truncated_mean
    from scml import utils
    from scml.oneshot.agents import GreedyOneShotAgent, GreedySingleAgreementAgent, GreedySyncAgent

    tournaments = importlib.import_module("negmas.tournaments.tournaments")
    tournaments.MAX_TASKS_PER_CHILD = options.recycle
    # negmas takes a fraction of the processors and rounds it down.
    share = (options.workers + 0.5) / multiprocessing.cpu_count()
    random.seed(0)
    numpy.random.seed(0)
    return tournaments.tournament(
        competitors=[GreedyOneShotAgent, GreedySingleAgreementAgent, GreedySyncAgent],
        competitor_params=None,
        non_competitors=utils.DefaultAgentsOneShot,
        non_competitor_params=[{} for _ in utils.DefaultAgentsOneShot],
        n_competitors_per_world=PLAYERS,
        round_robin=True,
        n_configs=options.worlds // PLAYERS,
        max_worlds_per_config=None,
        n_runs_per_world=1,
        n_agents_per_competitor=1,
        config_generator=utils.anac2024_config_generator_oneshot,
        config_assigner=utils.anac_assigner_oneshot,
        world_generator=seeded_world,
        score_calculator=utils.balance_calculator_oneshot,
        metric=truncated_mean,
        tournament_path=folder,
        parallelism="serial" if options.pool == "serial" else f"parallel:{share}",
        tournament_progress_callback=watch.world_ended,
        compact=True,
        # The rest goes to the worlds.
        oneshot_world=True,
        n_processes=2,
        n_steps=STEPS,
        publish_exogenous_summary=True,
        publish_trading_prices=True,
        # The limits are real seconds: on a loaded machine the usual minute could change the scores.
        time_limit=NO_LIMIT_S,
        neg_time_limit=NO_LIMIT_S,
        neg_hidden_time_limit=NO_LIMIT_S,
        neg_step_time_limit=NO_LIMIT_S,
    )


def seeded_world(**kwargs: Any) -> Any:
    """A world whose course depends on its number only: not on what ran in this process before, nor on the clock."""
    import numpy
    from negmas.mechanisms import Mechanism
    from scml.utils import anac2024_oneshot_world_generator

    number = world_number(kwargs["world_params"]["name"])
    # A negotiation draws one more random number for every second it lasts, which on a loaded machine
    # changes all that follow; here it lasts no time, and ends by its number of steps.
    Mechanism.time = property(lambda mechanism: 0.0)
    random.seed(number)
    numpy.random.seed(number)
    world = anac2024_oneshot_world_generator(**kwargs)
    misbehave = MISBEHAVIOURS.get(os.environ.get(FAULT, ""))
    if misbehave is not None and number == BAD_WORLD:
        next(iter(world.agents.values())).step = misbehave
    return world


def world_number(name: str) -> int:
    """negmas ends the name of a world with its number; the rest of it is a time and random letters."""
    return int(name.rpartition(".")[2])


def table(scores: Any) -> list[tuple[int, str, float]]:
    """Rows of (world, agent, score).  The floats are exact: JSON writes them so that they read back the same."""
    rows = zip(scores["world"], scores["agent_type"], scores["score"], strict=True)
    return sorted((world_number(world), agent, score) for world, agent, score in rows)


# --------------------------------------------------------------------- the faults


def leave() -> None:
    os._exit(0)


def never_return() -> None:
    while True:
        pass


def print_too_much() -> None:
    print("x" * PRINTED, flush=True)


MISBEHAVIOURS = {"exit": leave, "stuck": never_return, "print": print_too_much}


def prepare(fault: str, watch: Watch) -> None:
    os.environ[FAULT] = fault
    if fault == "print":
        # Workers print into a pipe that nobody reads; what this process says goes where it went.
        said = os.dup(1)
        read, write = os.pipe()
        os.set_inheritable(read, False)
        os.dup2(write, 1)
        sys.stdout = open(said, "w", buffering=1)  # noqa: SIM115
    elif fault in ("kill one", "kill all"):
        threading.Thread(target=kill_workers, args=(watch, fault == "kill all"), daemon=True).start()


def kill_workers(watch: Watch, all_of_them: bool) -> None:
    """When the first world has ended: those that work, and not what starts them."""
    import psutil

    while not watch.ended:
        time.sleep(0.01)
    names = ("safepool-worker",)
    workers = [one for one in psutil.Process().children(recursive=True) if one.name() in names]
    for worker in workers if all_of_them else workers[:1]:
        worker.kill()


# ---------------------------------------------------------------------- the watch


class Watch(threading.Thread):
    """Ends the process when nothing moves: no future changes its state and no world ends.

    Nobody stops it: it also watches the evaluation, and the end of the interpreter.
    """

    def __init__(self, give_up_s: float) -> None:
        super().__init__(name="watch", daemon=True)
        self._give_up_s = give_up_s
        self._futures: list[Future[Any]] = []
        self.ended = 0
        self.kinds: set[str] = set()  # of the futures that were awaited: whose pool it really was

    def as_completed(self, inner: AsCompleted) -> AsCompleted:
        """``inner``, an ``as_completed``, and this sees the futures."""

        def watched(fs: Iterable[Future[Any]], timeout: float | None = None) -> Iterator[Future[Any]]:
            self._futures = list(fs)
            self.kinds.update(f"{type(future).__module__}.{type(future).__qualname__}" for future in self._futures)
            return inner(self._futures, timeout)

        return watched

    def world_ended(self, result: Any, index: int, of: int) -> None:
        """negmas calls this in the main process; all there is to see of a serial run."""
        self.ended += 1

    def counts(self) -> tuple[int, int, int]:
        """How many worlds are (done, running, pending), as their futures have it."""
        done = sum(future.done() for future in self._futures)
        running = sum(future.running() for future in self._futures)
        return done, running, max(0, len(self._futures) - done - running)

    def run(self) -> None:
        before: object = None
        moved_at = time.monotonic()
        while True:
            time.sleep(LOOK_S)
            now = (self.counts(), self.ended)
            if now != before:
                before, moved_at = now, time.monotonic()
            elif time.monotonic() - moved_at >= self._give_up_s:
                self._give_up()

    def _give_up(self) -> NoReturn:
        done, running, pending = self.counts()
        # Printing blocks for ever if nobody reads it.
        threading.Timer(2 * KILLED_S, os._exit, (GAVE_UP,)).start()
        try:
            faulthandler.dump_traceback()
            print(
                f"\nNothing moved for {self._give_up_s:g} s: Done={done} Running={running} Pending={pending}; "
                f"{self.ended} worlds were reported",
                flush=True,
            )
            end_children()
        finally:
            os._exit(GAVE_UP)  # the main thread hangs: nothing gentler would end this process


def end_children() -> None:
    """Kill what this process has started."""
    import psutil  # negmas needs it too

    children = psutil.Process().children(recursive=True)
    for child in children:
        with suppress(psutil.NoSuchProcess):  # it ended by itself
            child.kill()
    psutil.wait_procs(children, timeout=KILLED_S)


if __name__ == "__main__":
    sys.exit(main())
