"""The workers of one pool as the watchdog sees them: what they say, and how they end, becomes events.

Only the watchdog calls this, but for ``stacks``.  Nothing here waits without a bound, and nothing is decided: events go
to the end of the queue that the watchdog drains, or to its head where the core must know before anything else.
"""

from __future__ import annotations

from time import monotonic, sleep
from typing import TYPE_CHECKING, NamedTuple

from . import _events as e
from . import _os, _stacks
from ._link import Link, Seen
from ._log import CRITICAL
from ._os import selecting
from ._side import tell_aside

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Iterator

    from ._launch import Processes
    from ._loans import Loans
    from ._pending import Pending

STATUS_LIMIT_S = 1.5  # for the exit status of a dead worker to reach us, once its family is ended
STATUS_AGAIN_S = 0.002
STATUS_LOST_S = 0.05  # the same, when it seems that somebody else took it
PIDS_KEPT = 1000  # of workers that are gone, for the errors that name them
GLANCE_S = 0.005  # a batch that is in hand for longer than that holds up others
ANSWERS, CHANNEL, DEATH = "answers", "channel", "death"  # what a descriptor that is ready tells of


class Launched(NamedTuple):
    """What came of a launch, on its way to the watchdog."""

    worker: int
    outcome: Link | e.SpawnFailed


def discard(link: Link) -> None:
    """A worker that came too late to be of use."""
    link.process.kill(hard=True)
    link.process.process.join(STATUS_LIMIT_S)
    link.close()


class Links:
    """Those that live, those that are being launched and those that are dying."""

    selector: selecting.Selector  # from the start of the watchdog on

    def __init__(self, events: deque[e.Event], pending: Pending, processes: Processes) -> None:
        self.by_worker: dict[int, Link] = {}
        self.pids: dict[int, int] = {}
        self.launching: set[int] = set()
        self.writing: set[int] = set()
        self.progress = 0  # counts what moves: begun and finished tasks, workers that got ready
        self.answered_at = float("-inf")  # when a worker last told of a task
        self._events = events
        self._pending = pending
        self._processes = processes
        self._doomed_launches: set[int] = set()  # to be killed as soon as they are there
        self._abandoned: set[int] = set()  # not wanted any more when they are there
        self._watched: dict[int, int] = {}  # worker -> the descriptor that reports its death, then its status
        self._dying: dict[int, tuple[Link, float]] = {}
        self.glance_at: float | None = None  # when to see whether a batch takes too long
        self._asked: dict[int, tuple[Link, float, bool]] = {}  # to be killed when they have said what they are doing

    def are_calm(self) -> bool:
        """No worker ends, or is to be ended, and the system will tell of each that does."""
        return not self._dying and not self._asked and len(self._watched) >= len(self.by_worker)

    def moments(self, now: float) -> Iterator[float]:
        """When to look again, if they are not calm, though no descriptor is ready."""
        for link, limit in self._dying.values():
            yield limit if link.worker in self._watched else now + STATUS_AGAIN_S
        if self._asked:
            yield now + _stacks.LOOK_AGAIN_S
        if len(self._watched) < len(self.by_worker):
            yield now + _os.ASK_AGAIN_S

    # -------------------------------------------------------- from launches

    def take_in(self, worker: int, outcome: Link | e.SpawnFailed) -> None:
        try:
            self._take_in(worker, outcome)
        finally:
            self.launching.discard(worker)  # not before ``processes`` shows it: see ``Watchdog.await_launches``

    def _take_in(self, worker: int, outcome: Link | e.SpawnFailed) -> None:
        abandoned, doomed = worker in self._abandoned, worker in self._doomed_launches
        self._abandoned.discard(worker)
        self._doomed_launches.discard(worker)
        if isinstance(outcome, e.SpawnFailed):
            if not abandoned:
                self._events.append(outcome._replace(now=monotonic()))
            return
        if abandoned:
            discard(outcome)
            return
        self.by_worker[worker] = outcome
        self.pids[worker] = outcome.process.pid
        self._processes[outcome.process.pid] = outcome.process.process
        if len(self.pids) > 2 * len(self.by_worker) + PIDS_KEPT:
            del self.pids[next(iter(self.pids))]
        self.selector.register(outcome.answers_fileno(), selecting.READ, (outcome, ANSWERS))
        self._watch(outcome, outcome.process.fileno())
        self.writing.add(worker)
        if doomed:
            outcome.process.kill(hard=True)

    # -------------------------------------------------------- in and out

    def write(self) -> None:
        for worker in tuple(self.writing):
            link = self.by_worker.get(worker)
            if link is None or link.flush():
                self.writing.discard(worker)
            self._register(worker, link)

    def _register(self, worker: int, link: Link | None) -> None:
        """Ask the selector for whether this worker's channel takes more, if there is more."""
        if link is None or link.is_deaf:
            return
        wanted = selecting.WRITE if worker in self.writing else 0
        if link.wanted != wanted:
            link.wanted = wanted
            if wanted:
                self.selector.register(link, wanted, (link, CHANNEL))
            else:
                self.selector.unregister(link)

    def listen_to_all(self, loans: Loans) -> None:
        """Whatever callers have had us not listen to."""
        for link in self.by_worker.values():
            if not link.is_deaf:
                loans.listen_to(link.answers_fileno())

    def note_answers(self, worker: int, count: int, total_s: float) -> None:
        """That callers have had from a lent worker."""
        self.progress += count
        self.answered_at = now = monotonic()
        self._events.append(e.AnsweredDirectly(now, worker, count, total_s / count))

    def hear(self, link: Link, *, to_the_end: bool = False) -> None:
        heard = link.hear(to_the_end=to_the_end)
        now, worker = monotonic(), link.worker
        if heard.booted:
            self._events.append(e.WorkerBooted(now, worker))
        if heard.unfit is not None:
            self._events.append(e.WorkerUnfit(now, worker, f"its initializer failed in the worker:\n{heard.unfit}"))
        if heard.ready:
            self.progress += 1
            self._events.append(e.WorkerReady(now, worker))
        for task, left in heard.left:
            self._pending.note_leftovers(task, left)
        if heard.returned:
            # Scenario 2: (a) a worker returns the rest of one batch, (b) it answers the next one, (c) both are read at
            # once.  First the rest: the core takes answers in the order in which it has sent the tasks.
            self._events.append(e.TakenBack(now, worker, tuple(heard.returned)))
        if heard.answered or heard.begun is not None:
            self.progress += 1
            self.answered_at = now
            answered, raised = tuple(heard.answered), frozenset(heard.raised)
            self._events.append(e.Received(now, worker, answered, heard.begun, heard.run_s, raised))
        if self.glance_at is None and link.has_batch():
            self.have_batches()
        if link.has_to_write():
            self.writing.add(worker)
        if heard.lost is not None and not link.is_deaf:
            self._be_deaf_to(link)
            self._events.append(e.ChannelLost(now, worker, heard.lost))

    def _be_deaf_to(self, link: Link) -> None:
        link.is_deaf = True
        self.selector.unregister(link.answers_fileno())
        if link.wanted:
            link.wanted = 0
            self.selector.unregister(link)

    def look(self, worker: int, mean_s: float) -> None:
        """What has it done that it has not told, and which task has it begun?  ``mean_s``: what a task takes."""
        link = self.by_worker.get(worker)
        if link is None:
            return
        seen = link.look()
        self._note(link, seen, mean_s)
        if seen.ended and not link.is_deaf:
            # Scenario 1: (a) a task has left something, which is on its way, (b) its result is taken from the board.
            # So that is heard before anybody learns of the result.
            self.hear(link)

    def _note(self, link: Link, seen: Seen, mean_s: float) -> None:
        ended, raised, begun = seen
        if ended or begun is not None:
            event = e.Received(monotonic(), link.worker, tuple(ended), begun, mean_s, frozenset(raised))
            self._events.append(event)

    def have_batches(self) -> None:
        """Tasks that share a ticket were sent: see that none of them holds up the others."""
        if self.glance_at is None:
            self.glance_at = monotonic() + GLANCE_S

    def glance(self, mean_s: float) -> None:
        """Where a batch takes too long: who waits for what has ended is told, and the rest goes to others."""
        now = monotonic()
        if self.glance_at is None or now < self.glance_at:
            return
        self.glance_at = None
        for worker, link in self.by_worker.items():
            if link.is_late():
                self.look(worker, mean_s)
                if rest := link.take_rest(0.0):
                    self._events.append(e.TakenBack(now, worker, rest))
            if link.has_batch():
                self.glance_at = now + GLANCE_S  # else again when it has told of the task that runs

    def take_back(self, worker: int) -> None:
        link = self.by_worker.get(worker)
        tasks = () if link is None else (*link.take_rest(), *link.take_back())
        self._events.appendleft(e.TakenBack(monotonic(), worker, tasks))

    def ask_exit(self, worker: int) -> None:
        link = self.by_worker.get(worker)
        if link is not None:
            link.ask_exit()
            self.writing.add(worker)

    def stacks(self, limit_s: float) -> dict[int, str]:
        """What each worker is doing, by pid; "" for one that does not say it in time.  On the thread of a caller."""
        asked = {link.process.pid: link.process for link in tuple(self.by_worker.values())}
        for process in asked.values():
            process.ask_stacks()
        found: dict[int, str] = dict.fromkeys(asked, "")
        end = monotonic() + limit_s
        while asked:
            is_late = monotonic() >= end
            for pid, process in tuple(asked.items()):
                stacks = process.stacks
                try:
                    if stacks is None or is_late or stacks.is_written():
                        del asked[pid]
                        found[pid] = "" if stacks is None else stacks.take()
                except OSError:
                    pass  # it has ended meanwhile, and its file is closed
            if asked:
                sleep(_stacks.LOOK_AGAIN_S)
        return found

    # ------------------------------------------------------- how they end

    def kill(self, worker: int, *, hard: bool) -> None:
        link = self.by_worker.get(worker)
        if worker in self._asked:
            link, limit, was_hard = self._asked[worker]
            self._asked[worker] = link, limit, was_hard or hard
        elif link is not None and link.process.stacks is not None and link.unanswered():
            link.process.ask_stacks()
            self._asked[worker] = link, monotonic() + _stacks.ANSWER_LIMIT_S, hard
        elif link is not None:
            link.process.kill(hard=hard)
        elif worker in self.launching:
            self._doomed_launches.add(worker)

    def kill_the_asked(self) -> None:
        """Those that have said what they are doing, or do not say it in time."""
        for worker, (link, limit, hard) in tuple(self._asked.items()):
            assert link.process.stacks is not None
            if link.process.stacks.is_written() or monotonic() >= limit:
                del self._asked[worker]
                for future in link.unanswered()[:1]:
                    if (one := future.one()) is not None:
                        one.stacks = link.process.stacks.take() or one.stacks
                link.process.kill(hard=hard)

    def died(self, link: Link) -> None:
        """The kernel says that the process is dead; its status may take a moment to reach us."""
        if self.by_worker.get(link.worker) is not link or link.worker in self._dying:
            return
        self._stop_watching(link)
        self._watch(link, link.process.status_fileno())
        self._dying[link.worker] = (link, monotonic() + STATUS_LIMIT_S)

    def _watch(self, link: Link, fd: int | None) -> None:
        """For its death, then for its status."""
        if fd is not None:
            self.selector.register(fd, selecting.READ, (link, DEATH))
            self._watched[link.worker] = fd

    def _stop_watching(self, link: Link) -> None:
        fd = self._watched.pop(link.worker, None)
        if fd is not None:
            self.selector.unregister(fd)

    def ended(self) -> Iterator[tuple[Link, int | None]]:
        """The dead, to be buried one by one; with the exit code, None if it is not to be had."""
        if len(self._watched) < len(self.by_worker):
            for link in tuple(self.by_worker.values()):
                if link.worker not in self._watched and link.process.is_dead():
                    self.died(link)
        for worker, (link, limit) in tuple(self._dying.items()):
            code = link.process.exitcode()
            if code is None and link.process.is_status_lost():
                # Or another thread of ours has taken it and not yet told: a launch asks for all children.
                self._dying[worker] = link, min(limit, monotonic() + STATUS_LOST_S)
            if code is not None or monotonic() >= limit:
                del self._dying[worker]
                yield link, code

    def salvage(self, link: Link, mean_s: float) -> None:
        """What a dead worker had finished and not sent.  ``mean_s``: what a task takes."""
        self._note(link, link.salvage(), mean_s)

    def bury(self, link: Link, code: int | None) -> None:
        """One that has ended, of which all has been heard."""
        unbegun, (peak_bytes, left) = link.unbegun(), link.process.last_words()
        for future in link.unanswered():
            # Ended with their worker, as they were to be.
            self._pending.note_leftovers(future._task, left, tell=False)
        self._events.append(e.WorkerDied(monotonic(), link.worker, code, unbegun, peak_bytes))
        self._forget(link)

    def close(self, link: Link) -> None:
        """One that is buried: give back its descriptors."""
        if not link.is_deaf:
            self._be_deaf_to(link)
        self._stop_watching(link)
        link.close()

    def abandon(self, worker: int, mean_s: float) -> None:
        """One that does not die, or is not there after all this time."""
        link = self.by_worker.get(worker)
        if link is not None:
            words = "safepool: %r does not die even of SIGKILL; it is given up and replaced"
            tell_aside(CRITICAL, words, link.process)
            self._dying.pop(worker, None)
            self.hear(link)
            self.salvage(link, mean_s)
            self._events.append(e.WorkerDied(monotonic(), worker, None, link.unbegun()))
            self._forget(link)
            self.close(link)
        elif worker in self.launching:
            tell_aside(CRITICAL, "safepool: worker %d is being launched for ever; it is given up", worker)
            self._abandoned.add(worker)
            self._events.append(e.WorkerDied(monotonic(), worker, None, ()))

    def _forget(self, link: Link) -> None:
        del self.by_worker[link.worker]
        self._processes.pop(link.process.pid, None)
        self.writing.discard(link.worker)
        self._asked.pop(link.worker, None)

    def __repr__(self) -> str:
        return f"<Links to {len(self.by_worker)} workers, {len(self.launching)} launching, {len(self._dying)} dying>"
