"""The rows of the fault grid, each a scenario for any pool; run as a program, this plays one row against one pool.

A row has parts.  A part holds when everything resolves in bounded time, the answer or error is right and
prompt, nothing innocent is lost and the pool is usable afterwards, and nothing is left: no process, zombie,
thread or descriptor.  What goes wrong first in this order is its verdict: hang, lost, wrong, leak.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NamedTuple

import psutil

from benchmarks import fault_tasks as tasks
from benchmarks.pools import OURS, NotOffered, Pool, open_pool

LIMIT_S = 8.0  # what has not happened by then never does: a hang
PROMPT_S = 2.0
EXIT_S = 4.0  # for a program to end, whatever its tasks do
CLOSE_S = 5.0  # for a pool with nothing to do to shut down
GONE_S = 3.0  # from the end of a pool until nothing is left of it
LOOK_S = 0.005
SEAT_S = {"forkserver": 0.3, "spawn": 1.0}  # from a timeout until its seat is taken again; 0.1 if not named
PASS, HANG, LOST, WRONG, LEAK, NA = "pass", "hang", "lost", "wrong", "leak", "n/a"
#: Processes kept as long as the program runs.  (A spawned worker has "tracker_fd" among its words.)
HELPERS = ("multiprocessing.forkserver", "resource_tracker", "semaphore_tracker")
KEPT = ("safepool-keeper", "safepool-zygote", "safepool-spare")  # one of each, for all pools


class Hang(Exception):
    """Something did not happen in bounded time."""


class Answer(NamedTuple):
    """What a future came to."""

    value: Any
    error: BaseException | None


# ----------------------------------------------------------------- one trial


@dataclass
class Trial:
    """One part of a row against one pool: opens pools, waits with bounds, and collects what is wrong.

    ``slack`` seconds are added to every limit; ``brief`` asks for fewer rounds of what is repeated.
    """

    name: str
    start: str
    slack: float
    brief: bool
    folder: str
    evidence: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lost: int = 0
    wrong: bool = False
    leaks: bool = False
    seconds: float | None = None
    opened: list[Pool] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        return LOST if self.lost else WRONG if self.wrong else LEAK if self.leaks else PASS

    def open(self, workers: int, *, keep: bool = True, **options: Any) -> Pool:
        """A pool that is shut down at the end of the part, if it is to be kept."""
        pool = open_pool(self.name, workers, self.start, **options)
        if keep:
            self.opened.append(pool)
        return pool

    # --------------------------------------------------------------- verdicts

    def must(self, holds: object, words: str) -> None:
        """An answer, an error or its moment must be right."""
        if not holds:
            self.wrong = True
            self.evidence.append(f"wrong: {words}")

    def within(self, seconds: float, limit: float, words: str) -> None:
        self.must(seconds <= limit + self.slack, f"{words} took {seconds:.3f} s, not {limit:g} s")

    def lose(self, count: int, words: str) -> None:
        """So many innocent tasks are lost."""
        if count > 0:
            self.lost += count
            self.evidence.append(f"lost {count}: {words}")

    # ------------------------------------------------------------------ waits

    def until(self, condition: Callable[[], object], what: str, limit: float = LIMIT_S) -> float:
        """Seconds until ``condition()``.  Raises ``Hang`` if it does not come true."""
        began = monotonic()
        while not condition():
            if monotonic() - began > limit + self.slack:
                raise Hang(f"not within {limit + self.slack:g} s: {what}")
            sleep(LOOK_S)
        return monotonic() - began

    def bounded(self, act: Callable[[], object], what: str, limit: float = LIMIT_S) -> float:
        """Do something on a thread of its own; the seconds it took."""
        errors: list[BaseException] = []

        def run() -> None:
            try:
                act()
            except BaseException as error:
                errors.append(error)

        began = monotonic()
        thread = threading.Thread(target=run, name="bounded", daemon=True)
        thread.start()
        thread.join(limit + self.slack)
        if thread.is_alive():
            raise Hang(f"{what} did not return within {limit + self.slack:g} s")
        for error in errors:
            raise error
        return monotonic() - began

    def begun(self, name: str) -> tuple[int, float]:
        """The process that runs this task, and since when."""
        place = Path(self.folder) / name
        self.until(place.exists, f"the task {name} begins")
        pid, at = place.read_text().split()
        return int(pid), float(at)

    def release(self) -> None:
        (Path(self.folder) / "release").touch()

    def settle(self, futures: Sequence[Future[Any]], what: str, limit: float = LIMIT_S) -> list[Answer]:
        """What they came to.  Raises ``Hang`` if one comes to nothing."""
        end = monotonic() + limit + self.slack
        left = set(futures)
        while left and monotonic() < end:
            left = wait(left, max(0.0, min(end - monotonic(), limit if self.name == OURS else 0.05))).not_done
            if self.name != OURS:  # a future cancelled by its own pool may be done without telling those who wait
                left = {future for future in left if not future.done()}
        if left:
            raise Hang(f"{len(left)} of {len(futures)} futures never resolve: {what}")
        return [_answer(future) for future in futures]

    # ---------------------------------------------------------------- futures

    def submit(self, pool: Pool, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        """Submit; what ``submit`` itself raises becomes the error of the future."""
        try:
            return pool.submit(fn, *args)
        except Exception as error:
            refused: Future[Any] = Future()
            refused.set_exception(error)
            return refused

    def expect(self, futures: Sequence[Future[Any]], values: Sequence[Any], what: str, limit: float = LIMIT_S) -> None:
        """All of these innocent tasks return these values."""
        answers = self.settle(futures, what, limit)
        false = [a.value for a, value in zip(answers, values) if a.error is None and a.value != value]
        self.must(not false, f"{what}: false answers {false[:3]!r}")
        errors = [answer.error for answer in answers if answer.error is not None]
        self.lose(len(errors), f"{what}: {_words(errors[0]) if errors else ''}")

    def usable(self, pool: Pool, count: int = 3) -> None:
        futures = [self.submit(pool, tasks.echo, number) for number in range(count)]
        self.expect(futures, range(count), "tasks afterwards")

    def told(self, pool: Pool, future: Future[Any], code: int, since: float, what: str) -> None:
        """The future of a dead worker fails soon, with the pool's error for that, naming how it ended."""
        (answer,) = self.settle([future], what)
        seconds = monotonic() - since
        self.seconds = max(self.seconds or 0.0, seconds)
        self.within(seconds, PROMPT_S, f"the error of {what}")
        if answer.error is None:
            self.must(False, f"{what} returned {answer.value!r}")
            return
        self.must(isinstance(answer.error, pool.died), f"{what} failed with {_words(answer.error)}")
        self.must(_names(answer.error, code), f"{what} does not say how it ended ({code}): {_words(answer.error)}")

    # -------------------------------------------------------------- processes

    def workers(self) -> list[psutil.Process]:
        """The processes that are alive under this one, but for helpers."""
        return [process for process in family() if _status(process) not in (psutil.STATUS_ZOMBIE, "gone")]

    def kill_one(self) -> int:
        """Kill a worker, if there is one; how many were killed."""
        for process in random.sample(found := self.workers(), len(found)):
            with suppress(psutil.Error):
                process.kill()
                return 1
        return 0

    # ------------------------------------------------------------------- end

    def close(self) -> None:
        """Shut down what was opened; it has nothing to do any more."""
        while self.opened:
            self.bounded(self.opened.pop().shutdown, "shutdown", CLOSE_S)

    def audit(self, before: set[str]) -> None:
        """Nothing may be there now that was not there before."""
        end = monotonic() + GONE_S + self.slack
        gc.collect()
        while (left := census() - before) and monotonic() < end:
            sleep(0.02)
            gc.collect()  # what a thread still held a moment ago
        if left:
            self.leaks = True
            self.evidence.append("left: " + "; ".join(sorted(left)))


def _answer(future: Future[Any]) -> Answer:
    try:
        error = future.exception(0)
    except CancelledError as cancelled:
        return Answer(None, cancelled)
    return Answer(None, error) if error is not None else Answer(future.result(0), None)


def _words(error: BaseException) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}: {str(error)[:300]}"


def _all_words(error: BaseException) -> str:
    """Everything that a user would see of it: causes and notes included."""
    return str(error) + "".join(traceback.format_exception(error))


def _is(trial: Trial, error: BaseException | None, kind: type[BaseException], words: str) -> bool:
    """It is the error that was raised; some peers put the traceback of the worker into its text."""
    return type(error) is kind and (error.args == (words,) or (trial.name != OURS and words in str(error)))


def _names(error: BaseException, code: int) -> bool:
    if getattr(error, "exitcode", None) == code:
        return True
    word = signal.Signals(-code).name if code < 0 else str(code)
    return bool(re.search(rf"(?<![\w-])({word}|{code})(?!\w)", str(error)))


# --------------------------------------------------------------- what is there


def family() -> list[psutil.Process]:
    """All descendants of this process, zombies too, but for helpers that are kept by design."""
    return [process for process in psutil.Process().children(recursive=True) if not _is_helper(process)]


def _is_helper(process: psutil.Process) -> bool:
    # A worker that a fork server made has the server's command line, but not its parent.
    with suppress(psutil.Error):
        words = " ".join(process.cmdline())
        is_tracker = any(word in words for word in HELPERS[1:])
        return is_tracker or process.name() in KEPT or (HELPERS[0] in words and process.ppid() == os.getpid())
    return False


def _status(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.Error:
        return "gone"


def _has_ended(pid: int) -> bool:
    try:
        return _status(psutil.Process(pid)) in (psutil.STATUS_ZOMBIE, "gone")
    except psutil.Error:
        return True


def census() -> set[str]:
    """Processes, threads and descriptors, as words."""
    found = {f"process {process.pid} {_status(process)}" for process in family()}
    found = {words for words in found if not words.endswith(" gone")}
    found |= {f"thread {thread.name} ({thread.ident})" for thread in threading.enumerate()}
    with suppress(OSError):
        for number in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # that of the listing itself
                found.add(f"descriptor {number} -> {os.readlink(f'/proc/self/fd/{number}')}")
    return found


# --------------------------------------------------------------- rows: deaths


def two_held(trial: Trial, pool: Pool) -> tuple[list[Future[Any]], list[int]]:
    """Two tasks that run until they are released, and where."""
    futures = [trial.submit(pool, tasks.hold, trial.folder, name, name) for name in ("one", "two")]
    return futures, [trial.begun(name)[0] for name in ("one", "two")]


def one_killed(trial: Trial) -> None:
    pool = trial.open(2)
    (victim, survivor), (pid, _) = two_held(trial, pool)
    queued = [trial.submit(pool, tasks.echo, number) for number in range(12)]
    since = monotonic()
    os.kill(pid, signal.SIGKILL)
    trial.told(pool, victim, -signal.SIGKILL, since, "the victim")
    trial.release()
    trial.expect([survivor, *queued], ["two", *range(12)], "the other 13")
    trial.usable(pool)


def all_killed(trial: Trial) -> None:
    pool = trial.open(2)
    victims, pids = two_held(trial, pool)
    data = bytes(2_000_000)
    queued = [trial.submit(pool, tasks.size, number, data) for number in range(60)]
    since = monotonic()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for victim in victims:
        trial.told(pool, victim, -signal.SIGKILL, since, "a victim")
    trial.expect(queued, [(number, len(data)) for number in range(60)], "60 queued", 2 * LIMIT_S)
    trial.usable(pool)


def task_ends_its_worker(how: str, code: int, trial: Trial) -> None:
    pool = trial.open(2)
    neighbour = trial.submit(pool, tasks.hold, trial.folder, "neighbour", "neighbour")
    trial.begun("neighbour")
    before = [trial.submit(pool, tasks.echo, number) for number in range(3)]
    trial.settle(before, "before")
    since = monotonic()
    victim = trial.submit(pool, tasks.leave, how)
    after = [trial.submit(pool, tasks.echo, number) for number in range(5)]
    if how == "sys.exit()":
        (answer,) = trial.settle([victim], how)
        trial.seconds = monotonic() - since
        trial.within(trial.seconds, PROMPT_S, how)
        trial.must(_is(trial, answer.error, SystemExit, "said by sys.exit"), f"sys.exit() became {answer.error!r}")
    else:
        trial.told(pool, victim, code, since, how)
    trial.expect([*before, *after], [*range(3), *range(5)], "around it")
    trial.must(not neighbour.done(), "its neighbour ended with it")
    trial.release()
    trial.expect([neighbour], ["neighbour"], "the neighbour")
    trial.usable(pool)


def dies_as_it_is_sent(trial: Trial) -> None:
    """The worker is stopped, so the call stops half way in its pipe; then it is killed."""
    pool = trial.open(1)
    (answer,) = trial.settle([trial.submit(pool, os.getpid)], "a first task")
    if answer.error is not None:
        raise answer.error
    os.kill(answer.value, signal.SIGSTOP)
    data = bytes(20_000_000)
    futures: list[Future[Any]] = []

    def submit() -> None:
        futures.append(trial.submit(pool, tasks.size, 0, data))
        futures.extend(trial.submit(pool, tasks.echo, number) for number in range(5))

    submitting = threading.Thread(target=submit, daemon=True)
    submitting.start()
    sleep(0.3)
    since = monotonic()
    os.kill(answer.value, signal.SIGKILL)
    submitting.join(LIMIT_S + trial.slack)
    if submitting.is_alive():
        raise Hang("submit did not return")
    answers = trial.settle(futures, "what was sent")
    trial.seconds = monotonic() - since
    trial.within(trial.seconds, PROMPT_S, "all answers")
    failed = [a.error for a in answers if a.error is not None]
    trial.lose(len(failed) - 1, f"more than one of 6: {[_words(error) for error in failed[:2]]}")
    wanted = [(0, len(data)), *range(5)]
    trial.must(all(a.error or a.value == value for a, value in zip(answers, wanted)), "a false answer")
    trial.usable(pool)


def dies_as_it_reads(trial: Trial) -> None:
    """Unpickling the call kills the worker."""
    pool = trial.open(2)
    before = [trial.submit(pool, tasks.echo, number) for number in range(5)]
    since = monotonic()
    deadly = trial.submit(pool, tasks.echo, [bytes(1_000_000), tasks.Deadly(), bytes(1_000_000)])
    after = [trial.submit(pool, tasks.echo, number) for number in range(5)]
    trial.told(pool, deadly, -signal.SIGKILL, since, "the deadly call")
    trial.expect([*before, *after], [*range(5), *range(5)], "around it")
    trial.usable(pool)


def idle_pids(trial: Trial, pool: Pool) -> list[int]:
    """The processes of a pool of two that has nothing to do."""
    both = [trial.submit(pool, tasks.pid_after, 0.2) for _ in range(2)]
    return sorted({answer.value for answer in trial.settle(both, "two first tasks") if answer.error is None})


def idle_killed(trial: Trial) -> None:
    pool = trial.open(2)
    pid = idle_pids(trial, pool)[0]
    os.kill(pid, signal.SIGKILL)
    sleep(0.3)
    since = monotonic()
    trial.expect([trial.submit(pool, tasks.echo, number) for number in range(20)], range(20), "tasks after it")
    trial.seconds = monotonic() - since
    trial.within(trial.seconds, PROMPT_S, "20 tasks")
    trial.usable(pool)


def idle_killed_in_haste(trial: Trial) -> None:
    """The next task is submitted before the news can be there."""
    pool = trial.open(2)
    pid = idle_pids(trial, pool)[0]
    for number in range(10):
        os.kill(pid, signal.SIGKILL)
        since = monotonic()
        (answer,) = trial.settle([trial.submit(pool, tasks.pid_after, 0)], f"a task right after kill {number}")
        trial.seconds = max(trial.seconds or 0, monotonic() - since)
        if answer.error is not None:
            trial.lose(1, f"the task right after kill {number}: {_words(answer.error)}")
            return
        pid = answer.value
    trial.within(trial.seconds or 0, PROMPT_S, "a task right after a kill")
    trial.usable(pool)


def random_kills(trial: Trial) -> None:
    pool = trial.open(2)
    trial.usable(pool)
    seconds = 2.0 if trial.brief else 6.0
    futures: list[Future[Any]] = []
    began = monotonic()
    stop = threading.Event()

    def feed() -> None:
        for number in itertools.count():
            while not stop.is_set() and sum(not future.done() for future in futures[-200:]) >= 100:
                sleep(LOOK_S)
            if stop.is_set():
                return
            futures.append(trial.submit(pool, tasks.nap, 0.01, number))
            if number % 100 == 99 and all(future.done() and _answer(future).error for future in futures[-100:]):
                return  # it is broken: nothing to feed

    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    kills = 0
    while monotonic() - began < seconds:
        sleep(0.25)
        kills += trial.kill_one()
    stop.set()
    feeder.join(LIMIT_S + trial.slack)
    if feeder.is_alive():
        raise Hang("submit did not return")
    answers = trial.settle(list(futures), "what ran during the kills")
    failed = [answer.error for answer in answers if answer.error is not None]
    trial.notes.append(f"{kills} kills, {len(answers) - len(failed)} answers, {len(failed)} failed")
    trial.must(kills >= seconds, f"only {kills} workers were there to kill")
    false = [n for n, answer in enumerate(answers) if answer.error is None and answer.value != n]
    trial.must(not false, f"false answers to {false[:5]}")
    trial.must(all(isinstance(error, pool.died) for error in failed), f"failed with {set(map(type, failed))}")
    trial.lose(len(failed) - kills, f"{len(failed)} failed by {kills} kills, {_words(failed[0]) if failed else ''}")
    since = monotonic()
    trial.expect([trial.submit(pool, tasks.nap, 0.01, n) for n in range(50)], range(50), "50 tasks afterwards")
    trial.seconds = monotonic() - since
    trial.within(trial.seconds, PROMPT_S, "recovering its throughput")


def finds_all(finder: str, trial: Trial) -> None:
    pool = trial.open(2)
    if finder not in pool.finders:
        raise NotOffered("no as_completed of its own")
    held = [trial.submit(pool, tasks.hold, trial.folder, name) for name in ("one", "two")]
    futures = [*held, *(trial.submit(pool, tasks.nap, 0.02, number) for number in range(18))]
    pids = [trial.begun(name)[0] for name in ("one", "two")]
    found: list[Future[Any]] = []

    def find() -> None:
        limit = LIMIT_S + trial.slack
        found.extend(pool.finders[finder](futures, timeout=limit))

    finding = threading.Thread(target=find, daemon=True)
    finding.start()
    sleep(0.1)
    since = monotonic()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    finding.join(LIMIT_S + trial.slack + 1)
    trial.seconds = monotonic() - since
    if finding.is_alive() or len(found) < len(futures):
        raise Hang(f"as_completed yielded {len(found)} of {len(futures)}")
    trial.must(len(found) == len(set(found)) == len(futures), f"as_completed yielded {len(found)}, not each once")
    trial.within(trial.seconds, PROMPT_S, "as_completed")
    trial.must(all(isinstance(_answer(future).error, pool.died) for future in held), "a death is not told")
    trial.expect(futures[2:], range(18), "the other 18")
    trial.usable(pool)


# ------------------------------------------------------ rows: turnover, limits


def turnover(workers: int, most: int, trial: Trial) -> None:
    pool = trial.open(workers, max_tasks=most)
    began = monotonic()
    answers = [trial.settle([trial.submit(pool, tasks.pid_after, 0)], "single tasks", 2 * LIMIT_S)[0] for _ in range(5)]
    at_once = [trial.submit(pool, tasks.pid_after, 0) for _ in range(12)]
    answers += trial.settle(at_once, "12 at once", 2 * LIMIT_S)
    trial.seconds = monotonic() - began
    errors = [answer.error for answer in answers if answer.error is not None]
    trial.lose(len(errors), _words(errors[0]) if errors else "")
    pids = [answer.value for answer in answers if answer.error is None]
    busiest = max((pids.count(pid) for pid in pids), default=0)
    trial.must(busiest <= most, f"a worker ran {busiest} tasks, not {most}")


def over_its_limit(endless: Callable[[str, str], object], trial: Trial) -> None:
    pool = trial.open(2)
    idle_pids(trial, pool)
    limited = pool.limited(1.0, endless, trial.folder, "limited")
    others = [trial.submit(pool, tasks.nap, 0.1, number) for number in range(12)]
    pid, at = trial.begun("limited")
    (answer,) = trial.settle([limited], "the limited task")
    told = monotonic()
    trial.seconds = told - at
    trial.must(isinstance(answer.error, pool.timed_out), f"over the limit it came to {answer!r}")
    trial.must(trial.seconds >= 0.95, f"stopped after {trial.seconds:.3f} s, before its limit of 1 s")
    trial.within(trial.seconds, 1.1, "stopping it")
    gone = trial.until(lambda: _has_ended(pid), "the limited task's worker ends")
    trial.within(gone, 0.1, "the end of its worker")
    trial.expect(others, range(12), "the others")
    before = monotonic()
    both = [trial.submit(pool, tasks.hold, trial.folder, f"seat-{number}", number) for number in range(2)]
    seated = max(trial.begun(f"seat-{number}")[1] for number in range(2))
    # From when both could begin: the others may have ended later than the limited one.
    trial.within(seated - max(told, before), SEAT_S.get(trial.start, 0.1), "getting its seat back")
    trial.release()
    trial.expect(both, range(2), "two at once afterwards")
    trial.usable(pool)


def queue_does_not_count(trial: Trial) -> None:
    pool = trial.open(1)
    began = monotonic()
    futures = [pool.limited(1.2, tasks.nap, 0.6, number) for number in range(5)]
    trial.expect(futures, range(5), "five of 0.6 s under a limit of 1.2 s")
    trial.seconds = monotonic() - began
    trial.within(trial.seconds, 3.0 + PROMPT_S, "five of 0.6 s")


# ------------------------------------------------------------- rows: payloads

WORDS = "these are the original words"


def cannot_travel(make: Callable[[], tuple[Any, ...]], trial: Trial) -> None:
    pool = trial.open(2)
    before = [trial.submit(pool, tasks.echo, number) for number in range(5)]
    since = monotonic()
    bad = trial.submit(pool, *make())
    after = [trial.submit(pool, tasks.echo, number) for number in range(5)]
    (answer,) = trial.settle([bad], "what cannot travel")
    trial.seconds = monotonic() - since
    trial.within(trial.seconds, PROMPT_S, "its error")
    if answer.error is None:
        trial.must(False, f"it returned {answer.value!r}")
    else:
        trial.must(WORDS in _all_words(answer.error), f"the original text is not in {_words(answer.error)}")
    trial.expect([*before, *after], [*range(5), *range(5)], "normal tasks around it")
    trial.usable(pool)


UNTRAVELLED: dict[str, Callable[[], tuple[Any, ...]]] = {
    "argument": lambda: (tasks.echo, tasks.Unsendable(WORDS)),
    "result": lambda: (tasks.make_unsendable, WORDS),
    "exception": lambda: (tasks.raise_holder, WORDS),
    "exception to rebuild": lambda: (tasks.raise_two_arguments, "these are", "the original words"),
}


def travels(kind: type[BaseException], trial: Trial) -> None:
    pool = trial.open(1)
    (first,) = trial.settle([trial.submit(pool, os.getpid)], "before")
    since = monotonic()
    (answer,) = trial.settle([trial.submit(pool, tasks.raise_this, kind, WORDS)], kind.__name__)
    trial.seconds = monotonic() - since
    trial.within(trial.seconds, PROMPT_S, "its error")
    trial.must(_is(trial, answer.error, kind, WORDS), f"{kind.__name__} became {answer.error!r}")
    (last,) = trial.settle([trial.submit(pool, os.getpid)], "after")
    trial.lose(int(last.error is not None), f"the next task: {last.error!r}")
    trial.must(last.value == first.value, f"the worker changed from {first.value} to {last.value}")


def memory_error_travels(how: str, trial: Trial) -> None:
    if not sys.platform.startswith("linux"):
        raise NotOffered("RLIMIT_AS is Linux's")
    pool = trial.open(1)
    trial.usable(pool)
    since = monotonic()
    (answer,) = trial.settle([trial.submit(pool, tasks.run_out_of_memory, how)], "out of memory")
    trial.seconds = monotonic() - since
    trial.within(trial.seconds, PROMPT_S, "its error")
    trial.must(type(answer.error) is MemoryError, f"MemoryError became {answer.error!r}")
    trial.usable(pool)


# ------------------------------------------------------- rows: ends of programs


class Script:
    """A program of ``fault_scripts``, in a process group of its own; nobody reads its stdout."""

    def __init__(self, trial: Trial, program: str) -> None:
        self._trial = trial
        self._errors = Path(trial.folder) / "errors"
        self.before = set(_session())
        command = [sys.executable, "-m", "benchmarks.fault_scripts", program, trial.name, trial.start, trial.folder]
        with self._errors.open("wb") as errors:
            self.popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, process_group=0
            )

    def ended(self, limit: float) -> tuple[int, float]:
        """Its exit code and the seconds until then; then nothing may be left of it."""
        trial = self._trial
        seconds = trial.until(lambda: self.popen.poll() is not None, "the program ends", limit)
        end = monotonic() + GONE_S + trial.slack
        while (left := set(_session()) - self.before) and monotonic() < end:
            sleep(0.02)
        if left:
            trial.leaks = True
            trial.evidence.append(f"left of the program: {sorted(left)}")
        assert self.popen.stdout is not None
        self.popen.stdout.close()
        return self.popen.returncode, seconds

    def errors(self) -> str:
        return self._errors.read_text(errors="replace")

    def told(self, name: str) -> str | None:
        place = Path(self._trial.folder) / name
        return place.read_text() if place.exists() else None


def _session() -> Iterator[int]:
    """The processes of this session: what this one and its descendants have started, though their parents died.

    No zombies: those of a program that has ended are for the system to bury.
    """
    mine = os.getsid(0)
    for pid in psutil.pids():
        with suppress(OSError):
            if os.getsid(pid) == mine and pid != os.getpid() and not _has_ended(pid):
                yield pid


@contextmanager
def script(trial: Trial, program: str) -> Iterator[Script]:
    """A program that is surely over afterwards."""
    running = Script(trial, program)
    try:
        yield running
    finally:
        for pid in set(_session()) - running.before:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            running.popen.wait(CLOSE_S)


def prints_to_nobody(program: str, trial: Trial) -> None:
    if program == "prints_under_a_limit":
        trial.settle([trial.open(1).limited(5, tasks.echo, 1)], "a task under a limit")  # or it does not apply
        trial.close()
    with script(trial, program) as running:
        code, _ = running.ended(3 * LIMIT_S)
        trial.must(code == 0, f"the program failed ({code}): {running.errors()[-500:]}")
        others, stopped, limit = (running.told(name) for name in ("others", "stopped", "limit"))
        if others is None or stopped in (None, "no"):
            raise Hang(f"others: {others}, stopped: {stopped}")
        trial.lose(10 - int(others), "other tasks")
        trial.must(program == "prints" or limit == "held", f"the limit: {limit}")
        trial.seconds = float(stopped)


def script_raises(trial: Trial) -> None:
    with script(trial, "raises") as running:
        trial.begun("asleep")
        trial.begun("spinning")
        code, trial.seconds = running.ended(LIMIT_S)
        trial.within(trial.seconds, EXIT_S, "its end")
        trial.must(code == 1, f"exit code {code}, not 1")
        trial.must("RuntimeError: the script gives up" in running.errors(), f"stderr: {running.errors()[-500:]!r}")


def interrupted(program: str, trial: Trial) -> None:
    with script(trial, program) as running:
        trial.until(lambda: running.told("ready") is not None or running.popen.poll() is not None, "it is ready")
        sleep(0.2)
        os.killpg(running.popen.pid, signal.SIGINT)
        code, trial.seconds = running.ended(LIMIT_S)
        trial.within(trial.seconds, EXIT_S, "its end")
        errors = running.errors()
        if program == "interrupted_within":
            trial.must(running.told("interrupted") is not None, "no KeyboardInterrupt in the parent")
            trial.must(code == 0, f"exit code {code}")
            trial.must(not errors, f"stderr: {errors[-1000:]!r}")
        else:
            trial.must(code == -signal.SIGINT, f"exit code {code}")
            is_one = errors.count("Traceback") == 1 and errors.rstrip().endswith("KeyboardInterrupt")
            trial.must(is_one, f"not one traceback: {errors[-1000:]!r}")


def leaves(program: str, trial: Trial) -> None:
    with script(trial, program) as running:
        code, trial.seconds = running.ended(LIMIT_S)
        done = len(list(Path(trial.folder).glob("note-*")))
        trial.lose(6 - done, "submitted work that was not done at the exit")
        trial.must(code == 0, f"exit code {code}")
        trial.must(not running.errors(), f"stderr: {running.errors()[-1000:]!r}")


# ----------------------------------------------------------- rows: ends of pools


def queue_dropped(trial: Trial) -> None:
    pool = trial.open(2)
    held, _ = two_held(trial, pool)
    queued = [trial.submit(pool, tasks.echo, number) for number in range(10)]
    trial.seconds = trial.bounded(pool.drop_queue, "shutdown(wait=False)")
    trial.within(trial.seconds, 0.5, "shutdown(wait=False)")
    sleep(0.2)
    cancelled = [future for future in queued if future.cancelled()]
    ahead = 0 if trial.name == OURS else 3  # the stdlib has handed out one more than there are workers
    trial.must(len(cancelled) >= 10 - ahead, f"only {len(cancelled)} of 10 queued are cancelled")
    trial.must(not any(future.done() for future in held), "a running task did not go on")
    trial.release()
    trial.expect(held, ["one", "two"], "the running ones")
    rest = [(future, number) for number, future in enumerate(queued) if future not in cancelled]
    trial.expect([future for future, _ in rest], [number for _, number in rest], "those handed out")


def killed(trial: Trial) -> None:
    pool = trial.open(2)
    stubborn = trial.submit(pool, tasks.ignore_sigterm, trial.folder, "stubborn")
    spinning = trial.submit(pool, tasks.hold_the_gil, trial.folder, "spinning")
    queued = [trial.submit(pool, tasks.echo, number) for number in range(5)]
    trial.begun("stubborn")
    trial.begun("spinning")
    trial.seconds = trial.bounded(pool.kill, "the kill")
    trial.within(trial.seconds, 1.0, "the kill")
    if trial.name == OURS:
        trial.must(all(future.done() for future in [stubborn, spinning, *queued]), "not all are done when it returns")
    answers = trial.settle([stubborn, spinning, *queued], "after the kill", PROMPT_S)
    trial.must(answers[0].error and answers[1].error, f"killed tasks came to {answers[:2]}")


def initializer_fails(exits: bool, trial: Trial) -> None:
    began = monotonic()
    initializer: Callable[..., object] = tasks.exit_in_initializer if exits else tasks.raise_in_initializer
    initargs = (trial.folder, 3 if exits else WORDS)
    pool = trial.open(2, initializer=initializer, initargs=initargs)
    futures = [trial.submit(pool, tasks.echo, number) for number in range(5)]
    answers = trial.settle(futures, "with that initializer")
    trial.seconds = monotonic() - began
    trial.within(trial.seconds, PROMPT_S, "their errors")
    for answer in answers:
        if answer.error is None:
            trial.must(False, "a task ran uninitialised")
            break
        text = _all_words(answer.error)
        wanted = ["initializer", "3"] if exits else ["raise_in_initializer", f"ValueError: {WORDS}"]
        missing = [word for word in wanted if word not in text]
        trial.must(not missing, f"{missing} not in {_words(answer.error)}")
    starts = len(list(Path(trial.folder).glob("start-*")))
    sleep(0.5)
    again = len(list(Path(trial.folder).glob("start-*"))) - starts
    trial.must(starts <= 20 and again <= 2, f"a crash loop: {starts} starts, {again} more in the next 0.5 s")
    (late,) = trial.settle([refused := trial.submit(pool, tasks.echo, 1)], "a task for a broken pool", PROMPT_S)
    trial.must(late.error is not None and refused.done(), "submit does not say that the pool is broken")
    if trial.name == OURS:
        try:
            pool.submit(tasks.echo, 1)
        except Exception as error:
            trial.must(isinstance(error, OSError | RuntimeError), f"submit raised {_words(error)}")
        else:
            trial.must(False, "submit took a task")


def many_pools(trial: Trial) -> None:
    count, warm = (12, 4) if trial.brief else (200, 20)
    before: dict[str, int] = {}
    resident = 0
    began = monotonic()
    me = psutil.Process()
    for number in range(count):
        if number == warm:
            before, resident = _counts(), me.memory_info().rss
        pool = trial.open(1, keep=False)
        trial.expect([trial.submit(pool, tasks.echo, number)], [number], "its task")
        trial.bounded(pool.shutdown, "shutdown", CLOSE_S)
        if trial.lost:
            return
    trial.seconds = monotonic() - began
    end = monotonic() + GONE_S + trial.slack
    while (more := {kind: n for kind, n in _counts().items() if n > before[kind]}) and monotonic() < end:
        del pool
        gc.collect()
        pool = trial  # type: ignore[assignment]
        sleep(0.02)
    grown = (me.memory_info().rss - resident) / 1e6
    trial.notes.append(f"resident memory grew by {grown:.1f} MB")
    trial.leaks |= bool(more) or grown > 8
    if trial.leaks:
        trial.evidence.append(f"after {count - warm} pools: {more} for {before}, resident memory + {grown:.1f} MB")


def _counts() -> dict[str, int]:
    words = census()
    return {kind: sum(word.startswith(kind) for word in words) for kind in ("process", "thread", "descriptor")}


# -------------------------------------------------------------- rows: threads


def parent_holds_a_lock(trial: Trial) -> None:
    if trial.start == "fork":
        raise NotOffered("who asks for fork has its dangers")
    with tasks.LOCK:
        pool = trial.open(2)
        began = monotonic()
        futures = [trial.submit(pool, tasks.take_the_lock) for _ in range(4)]
        trial.expect(futures, ["taken"] * 4, "tasks that need the lock")
        trial.seconds = monotonic() - began
        trial.within(trial.seconds, PROMPT_S, "taking it")


def submitted_by_threads(deaths: int, trial: Trial) -> None:
    pool = trial.open(2)
    trial.usable(pool)
    futures: list[list[Future[Any]]] = [[] for _ in range(8)]
    began = monotonic()

    def feed(number: int) -> None:
        for n in range(50):
            futures[number].append(trial.submit(pool, tasks.nap, 0.004, (number, n)))
            if deaths:
                sleep(0.01)

    feeders = [threading.Thread(target=feed, args=(number,), daemon=True) for number in range(8)]
    for feeder in feeders:
        feeder.start()
    kills = 0
    for _ in range(deaths):
        sleep(0.1)
        kills += trial.kill_one()
    for feeder in feeders:
        feeder.join(LIMIT_S + trial.slack)
        if feeder.is_alive():
            raise Hang("submit did not return")
    answers = [trial.settle(of_one, "of a thread", 2 * LIMIT_S) for of_one in futures]
    trial.seconds = monotonic() - began
    flat = [(a, (number, n)) for number, of_one in enumerate(answers) for n, a in enumerate(of_one)]
    failed = [a.error for a, _ in flat if a.error is not None]
    trial.must(len(flat) == 400, f"{len(flat)} of 400 were submitted")
    trial.must(all(a.error or a.value == value for a, value in flat), "a false answer")
    trial.must(not deaths or kills >= 3, f"only {kills} workers were there to kill")
    trial.lose(len(failed) - kills, f"{len(failed)} of 400 by {kills} kills: {_words(failed[0]) if failed else ''}")
    trial.usable(pool)


def nested(trial: Trial) -> None:
    pool = trial.open(1, nested=True)
    began = monotonic()
    future = trial.submit(pool, tasks.squares_by_a_pool, trial.name, trial.start, [1, 2, 3])
    (answer,) = trial.settle([future], "a pool in a task", 2 * LIMIT_S)
    trial.seconds = monotonic() - began
    trial.must(answer.value == [1, 4, 9], f"a pool in a task: {answer!r}")
    trial.usable(pool)


class Chains:
    """Tasks whose done-callbacks submit the next one."""

    def __init__(self, trial: Trial, pool: Pool, count: int, length: int) -> None:
        self.answers: list[tuple[Answer, int]] = []
        self.ended = threading.Event()
        self._trial = trial
        self._pool = pool
        self._left = count
        self._lock = threading.Lock()
        for _ in range(count):
            self._go_on(length)

    def _go_on(self, length: int) -> None:
        self._trial.submit(self._pool, tasks.nap, 0.01, length).add_done_callback(partial(self._done, length))

    def _done(self, length: int, future: Future[Any]) -> None:
        with self._lock:
            self.answers.append((_answer(future), length))
        if length > 1:
            self._go_on(length - 1)
            return
        with self._lock:
            self._left -= 1
            if not self._left:
                self.ended.set()


def callbacks_submit(trial: Trial) -> None:
    pool = trial.open(2)
    trial.usable(pool)
    chains = Chains(trial, pool, 6, 25)
    began = monotonic()
    kills = 0
    while kills < 5 and not chains.ended.wait(0.1):
        kills += trial.kill_one()
    if not chains.ended.wait(2 * LIMIT_S + trial.slack):
        raise Hang(f"the chains stopped after {len(chains.answers)} of 150")
    trial.seconds = monotonic() - began
    trial.must(kills >= 3, f"only {kills} workers were there to kill")
    failed = [answer.error for answer, _ in chains.answers if answer.error is not None]
    trial.must(len(chains.answers) == 150, f"{len(chains.answers)} callbacks for 150 tasks")
    trial.must(all(answer.error or answer.value == value for answer, value in chains.answers), "a false answer")
    trial.lose(len(failed) - kills, f"{len(failed)} of 150 by {kills} kills: {_words(failed[0]) if failed else ''}")
    trial.usable(pool)


def dropped(trial: Trial) -> None:
    pool = trial.open(2, keep=False)
    began = monotonic()
    futures = [trial.submit(pool, tasks.nap, 0.1, number) for number in range(8)]
    del pool
    gc.collect()
    trial.expect(futures, range(8), "work of a dropped pool")
    trial.seconds = monotonic() - began
    trial.within(trial.seconds, PROMPT_S, "its work")


# --------------------------------------------------------------------- the grid

Part = Callable[[Trial], None]


class Row(NamedTuple):
    """One fault of the grid.  ``limit_s`` is for one part; ``alone``: the pools are in other programs."""

    number: int
    fault: str
    parts: dict[str, Part]
    limit_s: float = 40.0
    alone: bool = False


def _one(part: Part) -> dict[str, Part]:
    return {"all": part}


_GRID = (
    Row(1, "one of two workers killed", _one(one_killed)),
    Row(2, "all killed, 60 x 2 MB queued", _one(all_killed)),
    Row(
        3,
        "a task ends its worker",
        {
            how: partial(task_ends_its_worker, how, code)
            for how, code in (("os._exit(0)", 0), ("os._exit(7)", 7), ("sys.exit()", 0), ("SIGSEGV", -signal.SIGSEGV))
        },
    ),
    Row(4, "death half way through a read", {"in the pipe": dies_as_it_is_sent, "unpickling": dies_as_it_reads}),
    Row(5, "idle worker killed", {"quiet": idle_killed, "in haste": idle_killed_in_haste}),
    Row(6, "random kills, 4 per second", _one(random_kills), limit_s=60.0),
    Row(
        7,
        "max_tasks_per_child",
        {f"{w} workers, {n} tasks": partial(turnover, w, n) for w, n in ((1, 2), (2, 1), (2, 3))},
        limit_s=60.0,
    ),
    Row(
        8,
        "over a limit of 1 s",
        {
            "sleep": partial(over_its_limit, tasks.sleep_on),
            "C loop": partial(over_its_limit, tasks.hold_the_gil),
            "SIGTERM ignored": partial(over_its_limit, tasks.ignore_sigterm),
        },
    ),
    Row(9, "limits do not count the queue", _one(queue_does_not_count)),
    Row(
        10,
        "as_completed, all workers killed",
        {finder: partial(finds_all, finder) for finder in ("the stdlib's", "its own")},
    ),
    Row(11, "what cannot be pickled", {what: partial(cannot_travel, make) for what, make in UNTRAVELLED.items()}),
    Row(
        12,
        "KeyboardInterrupt, SystemExit",
        {kind.__name__: partial(travels, kind) for kind in (KeyboardInterrupt, SystemExit)},
    ),
    Row(
        13,
        "50 MB printed, nobody reads",
        {
            "without a limit": partial(prints_to_nobody, "prints"),
            "with a limit": partial(prints_to_nobody, "prints_under_a_limit"),
        },
        limit_s=60.0,
    ),
    Row(16, "script raises, tasks stuck", _one(script_raises), alone=True),
    Row(
        17,
        "Ctrl-C to the whole group",
        {
            "busy": partial(interrupted, "interrupted_busy"),
            "busy, in a with block": partial(interrupted, "interrupted_within"),
            "idle": partial(interrupted, "interrupted_idle"),
        },
        alone=True,
    ),
    Row(18, "shutdown(wait=False, cancel)", _one(queue_dropped)),
    Row(
        19,
        "exit without shutdown",
        {"idle": partial(leaves, "leaves_idle"), "busy": partial(leaves, "leaves_busy")},
        alone=True,
    ),
    Row(20, "kill_workers, SIGTERM ignored", _one(killed)),
    Row(21, "MemoryError near a limit", {how: partial(memory_error_travels, how) for how in ("at once", "in crumbs")}),
    Row(22, "a thread holds a lock at start", _one(parent_holds_a_lock)),
    Row(
        23,
        "initializer raises, exits",
        {"raises": partial(initializer_fails, False), "exits": partial(initializer_fails, True)},
    ),
    Row(24, "200 pools opened and shut down", _one(many_pools), limit_s=300.0),
    Row(
        25,
        "8 threads submit, workers die",
        {"in peace": partial(submitted_by_threads, 0), "amid deaths": partial(submitted_by_threads, 5)},
        limit_s=60.0,
    ),
    Row(26, "a pool in a task", _one(nested)),
    Row(27, "callbacks submit amid deaths", _one(callbacks_submit), limit_s=60.0),
    Row(28, "dropped without shutdown", _one(dropped)),
)
ROWS = {row.number: row for row in _GRID}


# ------------------------------------------------------- one row as a program


def play(trial: Trial, part: Part, *, alone: bool) -> str:
    """Run one part and look what it left; its verdict."""
    try:
        if not alone:
            _start_helpers(trial)
        before = census()
        began = monotonic()
        part(trial)
        if trial.seconds is None:
            trial.seconds = monotonic() - began
        trial.close()
        if trial.verdict == PASS:
            trial.audit(before)
    except NotOffered as reason:
        trial.evidence.append(str(reason))
        return NA
    except Hang as hang:
        trial.evidence.append(f"hang: {hang}")
        return HANG
    except BaseException as error:
        trial.must(False, "".join(traceback.format_exception(error))[-2000:])
    return trial.verdict


def _start_helpers(trial: Trial) -> None:
    """Have every process that is kept by design started, and every module loaded, before anything is counted."""
    pool = open_pool(trial.name, 1, trial.start)
    trial.settle([trial.submit(pool, tasks.echo, 0)], "a first task of a first pool")
    trial.bounded(pool.shutdown, "the first shutdown", CLOSE_S)
    del pool
    gc.collect()
    try:
        trial.until(lambda: not family(), "the first pool is gone", GONE_S)
    except Hang:
        trial.leaks = True
        trial.evidence.append(f"left of a first pool: {family()}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fault_rows", description="One row against one pool.")
    parser.add_argument("row", type=int)
    parser.add_argument("pool")
    parser.add_argument("start")
    parser.add_argument("folder", help="an empty folder; what happens is told in its file 'report'")
    parser.add_argument("--slack", type=float, default=0.2)
    parser.add_argument("--brief", action="store_true")
    parser.add_argument("--parts", help="comma-separated numbers")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a script has none
    row = ROWS[options.row]
    wanted = range(len(row.parts)) if options.parts is None else map(int, options.parts.split(","))
    parts = list(row.parts.items())
    folder = Path(options.folder)
    with (folder / "report").open("a") as report:

        def tell(**facts: Any) -> None:
            report.write(json.dumps(facts) + "\n")
            report.flush()

        for number in wanted:
            name, part = parts[number]
            place = folder / str(number)
            place.mkdir()
            tell(begun=number, part=name)
            faulthandler.dump_traceback_later(row.limit_s + options.slack - 1)
            trial = Trial(options.pool, options.start, options.slack, options.brief, str(place))
            verdict = play(trial, part, alone=row.alone)
            faulthandler.cancel_dump_traceback_later()
            facts = {"seconds": trial.seconds, "lost": trial.lost, "evidence": trial.evidence, "notes": trial.notes}
            tell(ended=number, part=name, verdict=verdict, **facts)
            if verdict != PASS:
                os._exit(0)  # something is left of this part; the next one gets a process of its own
        tell(done=True)


if __name__ == "__main__":
    main()
