"""The only thread that touches workers: readiness and time become events, commands become acts.

Guarantees:

* callers only post (``submit``, ``cancel`` ...) and never wait for a lock held over I/O;
* nothing here waits without a bound, unpickles, or calls the user's code;
* an error in here, a bug of ours, fails every future with the event log: it may not be a hang.
"""

from __future__ import annotations

import os
import selectors
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from . import _events as e
from . import _os, _stacks
from ._call import Call
from ._core import Core
from ._evidence import error_of
from ._launch import Launcher, Processes
from ._link import Link
from ._log import CRITICAL, WARNING, tell
from ._payload import SPENT
from ._side import Side
from ._worker import Setup
from .errors import Attempt, PoolBroken, with_attempts
from .leaving import Leftover
from .policy import PoolPolicy

if TYPE_CHECKING:
    from ._packets import Left
    from .future import SafeFuture

EVENTS_KEPT = 1000
STATUS_LIMIT_S = 1.5  # for the exit status of a dead worker to reach us, once its family is ended
STATUS_AGAIN_S = 0.002
STATUS_LOST_S = 0.05  # the same, when it seems that somebody else took it
ANSWER_LIMIT_S = 2.0  # for the watchdog to answer a caller
LONGEST_S = 3600.0  # that is slept at a time: a selector takes no more than some weeks
JOIN_SLICE_S = 1.0
LAUNCH_SLICE_S = 0.002
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Observer(Protocol):
    """Sees what happens, and changes nothing."""

    def saw(self, event: e.Event, commands: Sequence[e.Command], calls: Mapping[int, Call]) -> None:
        """``commands``: the core's answer to ``event``, not yet carried out.  On the watchdog: must not block."""

    def unsent(self, future: SafeFuture, error: BaseException) -> None:
        """A call could not be pickled; on the thread of whoever submitted it."""


class Launched(NamedTuple):
    """What came of a launch, on its way to the watchdog."""

    worker: int
    outcome: Link | e.SpawnFailed


def _discard(link: Link) -> None:
    """A worker that came too late to be of use."""
    link.process.kill(hard=True)
    link.process.process.join(STATUS_LIMIT_S)
    link.close()


_here = threading.local()  # ``is_watchdog`` on the threads that no pool may wait on


class Watchdog:
    """The thread of one pool, its core, its workers and its mailbox.

    ``core`` is injected for tests.
    """

    def __init__(
        self,
        policy: PoolPolicy,
        launcher: Launcher,
        setup: Setup,
        name: str,
        *,
        core: Core | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.name = name
        self.processes = Processes()  # pid -> multiprocessing's process, alive or not yet buried
        self.broken: str | None = None
        self._broken_by = e.Failure("broken", reason="it was shut down before the task was queued")
        self.thread: threading.Thread | None = None
        self.progress = 0  # counts what moves: begun and finished tasks, workers that got ready
        self._policy = policy
        self._launcher = launcher
        self._setup = setup
        self._core = Core(policy) if core is None else core
        self.observer = observer
        self._pid = os.getpid()
        self._side = Side(f"{name}-callbacks")
        self._judges = Side(f"{name}-retries")
        self._launches = Side(f"{name}-launches")
        self._sides = (self._side, self._judges, self._launches)
        self._start_lock = threading.RLock()
        self._mailbox: deque[Call | Launched | Callable[[], None]] = deque()
        self._awake = True
        self._closed = threading.Event()
        self._is_mute = False
        self._own = ExitStack()  # the selector and the ends of the wake-up channel
        self._batch_done: list[threading.Event] = []  # callers to be told at the end of this round
        self._calls: dict[int, Call] = {}
        self._links: dict[int, Link] = {}
        self._pids: dict[int, int] = {}
        self._launching: set[int] = set()
        self._doomed_launches: set[int] = set()  # to be killed as soon as they are there
        self._abandoned: set[int] = set()  # not wanted any more when they are there
        self._watched: dict[int, int] = {}  # worker -> the descriptor that reports its death, then its status
        self._writing: set[int] = set()
        self._dying: dict[int, tuple[Link, float]] = {}
        self._asked: dict[int, tuple[Link, float, bool]] = {}  # to be killed when they have said what they are doing
        self._told_leftovers: set[str] = set()
        self._events: deque[e.Event] = deque()
        self.event_log: deque[str | e.Event] = deque(maxlen=EVENTS_KEPT)

    # -------------------------------------------------------- callers' side

    def submit(self, call: Call) -> None:
        self._mailbox.append(call)
        if call.options.retry is not None:
            with suppress(RuntimeError):  # it is tried again when there is something to ask
                self._judges.stand_by()
        if self.thread is None:
            self._start()
            if self._policy.start_all:
                # Scenario 3: (a) a program submits and comes to its end, (b) workers are to be forked.
                # From Python 3.12 on that is refused, so it is done before ``submit`` returns.
                self.await_launches()
        if not self._awake:
            self._wake()
        if self._closed.is_set():
            # Scenario 1: (a) a thread passes the check for shutdown, (b) the pool closes, (c) it posts.
            self._return_mail()

    def post(self, act: Callable[[], None]) -> None:
        """Have the watchdog call ``act``, soon; nothing happens if it is closed or never ran."""
        self._mailbox.append(act)
        if self.thread is not None and not self._awake:
            self._wake()

    def ask(self, act: Callable[[], None]) -> None:
        """Like ``post``, and wait until it is done, for at most ``ANSWER_LIMIT_S``."""
        if self.thread is None or self._closed.is_set() or getattr(_here, "is_watchdog", False):
            # (The garbage collector may run a user's finalizer on any thread, a watchdog's included.)
            self.post(act)
            return
        answered = threading.Event()

        def act_and_answer() -> None:
            self._batch_done.append(answered)
            act()

        self.post(act_and_answer)
        end = monotonic() + ANSWER_LIMIT_S
        while not answered.wait(min(0.1, ANSWER_LIMIT_S)) and monotonic() < end and not self._closed.is_set():
            self.check()

    def await_launches(self) -> None:
        """Wait until the workers for what was submitted so far are there, for at most ``ANSWER_LIMIT_S``."""
        if self.thread is None:
            return
        end = monotonic() + ANSWER_LIMIT_S
        self.ask(lambda: None)
        while self._launching and monotonic() < end and not self.is_own_thread():
            sleep(LAUNCH_SLICE_S)

    def want_worker(self) -> None:
        """As ``submit``, for a call that cannot be sent."""
        if self.thread is None:
            self._start()
        self.post(lambda: self._events.append(e.WorkerWanted(monotonic())))

    def cancel(self, task: int, *, kill: bool = False, wait: bool = False) -> None:
        if self.is_fork():
            return  # the task is its owner's

        def act() -> None:
            self._events.append(e.CancelRequested(monotonic(), task, kill))

        (self.ask if wait else self.post)(act)

    def shutdown(self, *, cancel: bool) -> None:
        if self.is_fork():
            return  # called by the garbage collector, perhaps; a thread that is not here may hold the lock
        with self._start_lock:
            if self.thread is None:
                self._closed.set()  # nothing ever ran, and now nothing will
                for side in self._sides:
                    side.close()
        self.post(lambda: self._events.append(e.ShutdownRequested(monotonic(), cancel)))

    def stacks(self, limit_s: float) -> dict[int, str]:
        """What each worker is doing, by pid; "" for one that does not say it in time.  On the thread of a caller."""
        asked = {link.process.pid: link.process for link in tuple(self._links.values())}
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

    def end_workers(self, *, hard: bool) -> None:
        self.ask(lambda: self._events.append(e.EndWorkersRequested(monotonic(), hard)))

    def join(self, limit_s: float | None = None) -> bool:
        """Wait until the pool is closed and its callbacks have run; True: it is."""
        if self.thread is None or self.is_own_thread():
            return self.thread is None
        end = None if limit_s is None else monotonic() + limit_s
        while not self._closed.wait(JOIN_SLICE_S if end is None else min(JOIN_SLICE_S, max(0.0, end - monotonic()))):
            self.check()
            if end is not None and monotonic() >= end:
                return False
        self.thread.join(JOIN_SLICE_S)
        self._side.join()
        self._launches.leave()
        self._judges.leave()
        return True

    def is_closed(self) -> bool:
        return self._closed.is_set()

    def is_own_thread(self) -> bool:
        """Is this thread one that the pool itself needs in order to end?"""
        return getattr(_here, "is_watchdog", False) or any(side.is_current() for side in self._sides)

    def is_fork(self) -> bool:
        """Are we in a child that the user's process forked?  Then the pool is not ours to use."""
        return os.getpid() != self._pid

    def check(self) -> None:
        """See that the watchdog lives; if it does not, no future may wait for it."""
        if self.is_fork():
            reason = f"this process is a fork of {self._pid}, which owns the pool; make a pool of your own here"
            raise PoolBroken(reason, reason=reason)
        if self.thread is not None and not self.thread.is_alive() and not self._closed.is_set():
            self._crashed("its thread is gone")

    def deliver(self, job: Callable[[], object]) -> None:
        if not self._is_mute:
            self._side.put(job)

    def mute(self) -> None:
        """Call back nobody any more."""
        self._is_mute = True

    def _tell(self, message: str, *args: object, error: BaseException | None = None, level: int = CRITICAL) -> None:
        """To the log; on a thread nobody waits for: its handlers may block, and stderr may be a pipe that is full."""
        with suppress(RuntimeError):
            words = level, message, *args
            threading.Thread(target=tell, args=words, kwargs={"error": error}, daemon=True).start()

    def state_of(self, task: int) -> str:
        """In words, of a task that is not done: what the core does not know has not been read yet."""
        state = self._core.state_of(task)
        return "queued" if state == "settled" else state

    def __repr__(self) -> str:
        return f"<Watchdog {self.name} {self._core!r}>"

    def _start(self) -> None:
        with self._start_lock:
            if self.thread is not None or self._closed.is_set():
                return
            try:
                with _os.above_standard():
                    self._wake_w, self._wake_r = _os.open_channel()
                    for end in (self._wake_w, _os.keep(self._wake_r)):
                        self._own.callback(_os.close, end)
                        end.setblocking(False)
                    self._selector = self._own.enter_context(selectors.DefaultSelector())
                self._selector.register(self._wake_r, READ, None)
                thread = threading.Thread(target=self._run, name=f"{self.name}-watchdog", daemon=True)
                self._side.stand_by()
                self._launches.stand_by()
                thread.start()
                # Scenario 4: (a) a thread starts the watchdog, (b) another one submits, sees it and leaves its call
                # to it, (c) the start fails.  So it is not seen before it runs.
                self.thread = thread
            except (RuntimeError, OSError) as error:
                self._own.close()
                self._refuse_mail(f"its watchdog cannot be started now: {error}; a later submit tries again")

    def _refuse_mail(self, reason: str) -> None:
        while self._mailbox:
            item = self._mailbox.popleft()
            if isinstance(item, Call):
                error = PoolBroken(f"{item.future} cannot be run by pool {self.name!r}: {reason}", reason=reason)
                item.future.failed(error)

    def _wake(self) -> None:
        # Scenario 5: (a) this says that the watchdog is awake, (b) a signal handler of the user's raises, here, and
        # the byte is never sent.  From then on nobody would wake it: so only the watchdog itself says so.
        with suppress(OSError):  # full: it will wake; closed: nobody is there
            self._wake_w.send(b"!")

    # ---------------------------------------------------------- the thread

    def _run(self) -> None:
        _here.is_watchdog = True
        try:
            if hasattr(signal, "pthread_sigmask"):
                # Workers start with SIGINT held back until they have a handler for it.
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            while not self._core.is_closed():
                self._turn()
            self._close()
        except BaseException:
            self._crashed(traceback.format_exc())

    def _turn(self) -> None:
        """One round: wait, read the mail, listen to the workers, let time pass."""
        self._awake = False
        timeout = 0.0 if self._mailbox else self._timeout()
        ready = self._selector.select(timeout)
        self._awake = True
        self._read_mailbox()
        self._drain()
        # Deaths first: they read their channel to the end, and a closed channel is then no news.
        for key, mask in sorted(ready, key=_deaths_first) if len(ready) > 1 else ready:
            if key.data is None:
                self._empty_wake_pipe()
            elif key.data[1]:
                self._died(key.data[0])
            else:
                self._channel_ready(key.data[0], mask)
            self._drain()
        self._kill_the_asked()
        self._look_after_the_dying()
        now = monotonic()
        due = self._core.next_deadline()
        if due is not None and due <= now:
            self._events.append(e.Ticked(now))
            self._drain()
        if self._batch_done:
            for answered in self._batch_done:
                answered.set()
            self._batch_done.clear()

    def _timeout(self) -> float | None:
        now = monotonic()
        moments = [self._core.next_deadline(), *(side.relieve(now) for side in self._sides)]
        for link, limit in self._dying.values():
            moments.append(limit if link.worker in self._watched else now + STATUS_AGAIN_S)
        if self._asked:
            moments.append(now + _stacks.LOOK_AGAIN_S)
        if len(self._watched) < len(self._links):
            moments.append(now + _os.ASK_AGAIN_S)
        known = [moment for moment in moments if moment is not None]
        return min(max(0.0, min(known) - now), LONGEST_S) if known else None

    def _empty_wake_pipe(self) -> None:
        with suppress(OSError):
            self._wake_r.recv(4096)

    def _read_mailbox(self) -> None:
        mailbox = self._mailbox
        fresh: list[e.NewTask] = []
        for _ in range(len(mailbox)):
            item = mailbox.popleft()
            if isinstance(item, Call):
                self._calls[item.future._task] = item
                fresh.append(item.as_new_task())
                continue
            if fresh:
                self._events.append(e.TasksSubmitted(monotonic(), tuple(fresh)))
                fresh.clear()
            if isinstance(item, Launched):
                self._launched(*item)
            else:
                item()
        if fresh:
            self._events.append(e.TasksSubmitted(monotonic(), tuple(fresh)))

    def _drain(self) -> None:
        """Hand events to the core and carry out its commands until there are none; then write."""
        while self._events:
            event = self._events.popleft()
            self.event_log.append(_for_the_log(event))
            commands = self._core.handle(event)
            if self.observer is not None:
                self.observer.saw(event, commands, self._calls)
            for command in commands:
                _ACTS[type(command)](self, command)
        if self._writing:
            self._write()

    def _write(self) -> None:
        for worker in tuple(self._writing):
            link = self._links.get(worker)
            if link is None or link.flush():
                self._writing.discard(worker)
            self._register(worker, link)

    def _register(self, worker: int, link: Link | None) -> None:
        """Ask the selector for what we now want of this worker's channel."""
        if link is None or link.is_deaf:
            return
        wanted = READ | WRITE if worker in self._writing else READ
        if link.wanted != wanted:
            link.wanted = wanted
            self._selector.modify(link, wanted, (link, False))

    def _channel_ready(self, link: Link, mask: int) -> None:
        if link.worker not in self._links or link.is_deaf:
            return
        if mask & READ:
            self._hear(link)
        if mask & WRITE:
            self._writing.add(link.worker)

    def _hear(self, link: Link, most_bytes: int = 1 << 22) -> None:
        heard = link.hear(most_bytes)
        now, worker = monotonic(), link.worker
        if heard.booted:
            self._events.append(e.WorkerBooted(now, worker))
        if heard.unfit is not None:
            self._events.append(e.WorkerUnfit(now, worker, f"its initializer failed in the worker:\n{heard.unfit}"))
        if heard.ready:
            self.progress += 1
            self._events.append(e.WorkerReady(now, worker))
        for task, left in heard.left:
            self._note_leftovers(task, left)
        if heard.answers or heard.begun is not None:
            self.progress += 1
            finished = []
            for answer in heard.answers:
                call = self._calls.get(answer.task)
                if call is not None:
                    call.answer = answer
                finished.append((answer.task, answer.ok))
            self._events.append(e.Received(now, worker, tuple(finished), heard.begun, heard.run_s))
        if heard.lost is not None and not link.is_deaf:
            link.is_deaf = True
            self._selector.unregister(link)
            self._events.append(e.ChannelLost(now, worker, heard.lost))

    # -------------------------------------------------------- deaths

    def _died(self, link: Link) -> None:
        """The kernel says that the process is dead; its status may take a moment to reach us."""
        if self._links.get(link.worker) is not link or link.worker in self._dying:
            return
        self._stop_watching(link)
        self._watch(link, link.process.status_fileno())
        self._dying[link.worker] = (link, monotonic() + STATUS_LIMIT_S)

    def _watch(self, link: Link, fd: int | None) -> None:
        """For its death, then for its status."""
        if fd is not None:
            self._selector.register(fd, READ, (link, True))
            self._watched[link.worker] = fd

    def _stop_watching(self, link: Link) -> None:
        fd = self._watched.pop(link.worker, None)
        if fd is not None:
            self._selector.unregister(fd)

    def _look_after_the_dying(self) -> None:
        if len(self._watched) < len(self._links):
            for link in tuple(self._links.values()):
                if link.worker not in self._watched and link.process.is_dead():
                    self._died(link)
        for worker, (link, limit) in tuple(self._dying.items()):
            code = link.process.exitcode()
            if code is None and link.process.is_status_lost():
                # Or another thread of ours has taken it and not yet told: a launch asks for all children.
                self._dying[worker] = link, min(limit, monotonic() + STATUS_LOST_S)
            if code is not None or monotonic() >= limit:
                del self._dying[worker]
                self._hear(link, most_bytes=1 << 62)  # "answered, then died" is one fact: first the answer
                self._drain()
                unbegun, (peak_bytes, left) = link.unbegun(), link.process.last_words()
                for task in link.unanswered():
                    self._note_leftovers(task, left, tell=False)  # ended with their worker, as they were to be
                self._events.append(e.WorkerDied(monotonic(), worker, code, unbegun, peak_bytes))
                self._forget(link)
                self._drain()

    def _note_leftovers(self, task: int, left: Sequence[Left], *, tell: bool = True) -> None:
        call = self._calls.get(task)
        if call is None or not left:
            return
        call.future.leftovers += tuple(Leftover(pid, command, str(call.future), gone) for pid, command, gone in left)
        fresh = {command for _, command, _ in left} - self._told_leftovers
        if tell and fresh:  # a run of many tasks says the same of each
            self._told_leftovers |= fresh
            ended = "and were ended" if all(gone for *_, gone in left) else "that still run"
            listed = ", ".join(f"{pid} ({command})" for pid, command, _ in left)
            self._tell("safepool: %s left processes behind %s: %s", str(call.future), ended, listed, level=WARNING)

    def _forget(self, link: Link) -> None:
        del self._links[link.worker]
        self.processes.pop(link.process.pid, None)
        self._writing.discard(link.worker)
        self._asked.pop(link.worker, None)
        if not link.is_deaf:
            self._selector.unregister(link)
        self._stop_watching(link)
        link.close()

    # ---------------------------------------------------------- the acts

    def _act_spawn(self, command: e.Spawn) -> None:
        # On a thread of its own: a start context may block (a fork server that is stopped, a child
        # that dies with its start-up pipe full), and limits are kept all the same.
        self._launching.add(command.worker)
        self._launches.put(lambda: self._launch(command.worker))

    def _launch(self, worker: int) -> None:
        """On the launches' thread."""
        outcome: Link | e.SpawnFailed
        try:
            with _os.above_standard():
                outcome = Link(worker, self._launcher, self._setup, take_back=self._policy.take_back)
        except (OSError, MemoryError, EOFError) as error:
            reason = f"worker {worker} could not be launched: {type(error).__name__}: {error}"
            outcome = e.SpawnFailed(monotonic(), worker, reason)
        except BaseException:  # whatever the pickling of an initializer's arguments may raise
            reason = f"worker {worker} cannot be launched:\n{traceback.format_exc()}"
            outcome = e.SpawnFailed(monotonic(), worker, reason, fatal=True)
        self._mailbox.append(Launched(worker, outcome))
        if not self._awake:
            self._wake()
        if self._closed.is_set():
            self._return_mail()

    def _launched(self, worker: int, outcome: Link | e.SpawnFailed) -> None:
        try:
            self._take_in(worker, outcome)
        finally:
            self._launching.discard(worker)  # not before ``processes`` shows it: see ``await_launches``

    def _take_in(self, worker: int, outcome: Link | e.SpawnFailed) -> None:
        abandoned, doomed = worker in self._abandoned, worker in self._doomed_launches
        self._abandoned.discard(worker)
        self._doomed_launches.discard(worker)
        if isinstance(outcome, e.SpawnFailed):
            if not abandoned:
                self._events.append(outcome._replace(now=monotonic()))
            return
        if abandoned:
            _discard(outcome)
            return
        self._links[worker] = outcome
        self._pids[worker] = outcome.process.pid
        self.processes[outcome.process.pid] = outcome.process.process
        if len(self._pids) > 2 * len(self._links) + EVENTS_KEPT:
            del self._pids[next(iter(self._pids))]
        self._selector.register(outcome, READ, (outcome, False))
        outcome.wanted = READ
        self._watch(outcome, outcome.process.fileno())
        self._writing.add(worker)
        if doomed:
            outcome.process.kill(hard=True)

    def _act_send(self, command: e.Send) -> None:
        link = self._links.get(command.worker)
        calls = []
        for task in command.tasks:
            call = self._calls[task]
            if call.future.claim():
                calls.append((task, call.payload))
        if len(calls) < len(command.tasks):
            # Scenario 2: (a) the core sends a task, (b) its user cancels it, (c) it is claimed here.
            # The future says cancelled, so it must not go out.
            claimed = {task for task, _ in calls}
            withheld = tuple(task for task in command.tasks if task not in claimed)
            self._events.appendleft(e.Withheld(monotonic(), command.worker, withheld))
        if link is not None and calls:
            link.send(calls)
            self._writing.add(command.worker)

    def _act_take_back(self, command: e.TakeBack) -> None:
        link = self._links.get(command.worker)
        tasks = link.take_back() if link is not None else ()
        self._events.appendleft(e.TakenBack(monotonic(), command.worker, tasks))

    def _act_ask_exit(self, command: e.AskExit) -> None:
        link = self._links.get(command.worker)
        if link is not None:
            link.ask_exit()
            self._writing.add(command.worker)

    def _act_kill(self, command: e.Kill) -> None:
        link = self._links.get(command.worker)
        if command.worker in self._asked:
            link, limit, hard = self._asked[command.worker]
            self._asked[command.worker] = link, limit, hard or command.hard
        elif link is not None and link.process.stacks is not None and link.unanswered():
            link.process.ask_stacks()
            self._asked[command.worker] = link, monotonic() + _stacks.ANSWER_LIMIT_S, command.hard
        elif link is not None:
            link.process.kill(hard=command.hard)
        elif command.worker in self._launching:
            self._doomed_launches.add(command.worker)

    def _kill_the_asked(self) -> None:
        """Those that have said what they are doing, or do not say it in time."""
        for worker, (link, limit, hard) in tuple(self._asked.items()):
            assert link.process.stacks is not None
            if link.process.stacks.is_written() or monotonic() >= limit:
                del self._asked[worker]
                for task in link.unanswered()[:1]:
                    call = self._calls.get(task)
                    if call is not None:
                        call.future.stacks = link.process.stacks.take() or call.future.stacks
                link.process.kill(hard=hard)

    def _act_abandon(self, command: e.Abandon) -> None:
        link = self._links.get(command.worker)
        if link is not None:
            self._tell("safepool: %r does not die even of SIGKILL; it is given up and replaced", link.process)
            self._dying.pop(command.worker, None)
            self._hear(link)
            self._events.append(e.WorkerDied(monotonic(), command.worker, None, link.unbegun()))
            self._forget(link)
        elif command.worker in self._launching:
            self._tell("safepool: worker %d is being launched for ever; it is given up", command.worker)
            self._abandoned.add(command.worker)
            self._events.append(e.WorkerDied(monotonic(), command.worker, None, ()))

    def _act_began(self, command: e.Began) -> None:
        call = self._calls[command.task]
        call.future.begin(self._pids.get(command.worker))
        if call.options.retry is None:
            call.payload = SPENT  # it will never be sent again

    def _act_requeue(self, command: e.Requeue) -> None:
        for task in command.tasks:
            call = self._calls[task]
            call.answer = call.error = None
            call.future.stacks = ""
            call.future.requeue()

    def _act_ask_retry(self, command: e.AskRetry) -> None:
        call = self._calls[command.task]
        pid = self._pids.get(command.failure.worker or 0)
        kind, task, attempt, ended = command.failure.kind, command.task, command.attempt, monotonic()
        if kind not in ("error", "result"):
            call.answer = None  # one that came too late
            call.error = error_of(command.failure, call.future, call.options, pid)

        def judge() -> None:
            delay_s = None
            try:
                delay_s = call.ask_policy(kind, attempt, pid, ended)
            finally:
                self.post(lambda: self._events.append(e.RetryAnswered(monotonic(), task, attempt, delay_s)))

        self._judges.put(judge)

    def _act_break(self, command: e.Break) -> None:
        self._broken_by = command.failure
        self.broken = command.failure.reason

    def _act_resolve(self, command: e.Resolve) -> None:
        for task in command.tasks:
            call = self._calls[task]
            if call.error is not None:
                call.future.failed(_with_its_attempts(call, call.error))
            else:
                assert call.answer is not None
                call.future.answered(call.answer)
            del self._calls[task]  # not before its future knows: a breakdown fails what is in here

    def _act_fail(self, command: e.Fail) -> None:
        call, failure = self._calls[command.task], command.failure
        if failure.kind == "cancelled":
            call.future.cancelled_by_pool()
        elif call.error is not None and failure.kind in ("death", "timeout"):
            call.future.failed(_with_its_attempts(call, call.error))  # the one its retry policy saw
        else:
            call.future.failed(self._final_error(call, failure))
        del self._calls[command.task]

    def _final_error(self, call: Call, failure: e.Failure) -> BaseException:
        pid = self._pids.get(failure.worker) if failure.worker is not None else None
        error = error_of(failure, call.future, call.options, pid)
        if call.options.retry is not None and failure.kind in ("death", "poison", "timeout"):
            # An attempt that its policy was not asked about.
            cause = "timeout" if failure.kind == "timeout" else "death"
            call.future.attempts += (Attempt(len(call.future.attempts) + 1, cause, pid, error),)
        return _with_its_attempts(call, error)

    def _act_close(self, command: e.Close) -> None:
        pass  # ``_run`` sees it

    # ------------------------------------------------------------ the end

    def _close(self) -> None:
        self._closed.set()
        self._let_go()

    def _let_go(self) -> None:
        """Of everything that is not a worker's."""
        self._return_mail()
        self._setup = Setup()  # what its initializer was given is not kept
        self._own.close()
        for side in self._sides:
            side.close()

    def _return_mail(self) -> None:
        """What was posted too late fails, rather than wait for a thread that is gone."""
        while self._mailbox:
            try:
                item = self._mailbox.popleft()
            except IndexError:
                return
            if isinstance(item, Call):
                pid = self._pids.get(self._broken_by.worker or 0)
                item.future.failed(error_of(self._broken_by, item.future, item.options, pid))
            elif isinstance(item, Launched) and isinstance(item.outcome, Link):
                _discard(item.outcome)

    def _fail_all(self, error: PoolBroken) -> None:
        calls, self._calls = self._calls, {}
        calls.update((item.future._task, item) for item in tuple(self._mailbox) if isinstance(item, Call))
        for call in calls.values():
            call.future.failed(error)

    def _crashed(self, trouble: str) -> None:
        """A bug of ours, or of the system's: fail everything, loudly, with the evidence; kill every worker."""
        log = tuple(map(repr, tuple(self.event_log)))
        message = (
            f"the watchdog of pool {self.name!r} broke down, and every unfinished task with it; please report this. "
            f"{trouble.strip()}\nLast events:\n" + "\n".join(log[-20:])
        )
        self.broken = message
        self._tell("safepool: %s", message)
        for link in tuple(self._links.values()):
            try:
                _discard(link)
            except Exception as error:
                self._tell("safepool: while killing %r", link, error=error)
        self._fail_all(PoolBroken(message, reason=trouble, event_log=log))
        self._links.clear()
        self.processes.clear()
        self._closed.set()
        self._let_go()


def _with_its_attempts(call: Call, error: BaseException) -> BaseException:
    # If it is final they are on it; and only then can it be the user's, whose methods must not be called here.
    return error if call.is_final or not call.future.attempts else with_attempts(error, call.future.attempts)


def _deaths_first(item: tuple[selectors.SelectorKey, int]) -> bool:
    data = item[0].data
    return data is None or not data[1]


def _for_the_log(event: e.Event) -> str | e.Event:
    if isinstance(event, e.TasksSubmitted) and len(event.tasks) > 8:
        return f"TasksSubmitted(now={event.now}, {len(event.tasks)} tasks from {event.tasks[0].task} on)"
    return event


_ACTS: dict[type, Callable[[Watchdog, Any], None]] = {
    e.Spawn: Watchdog._act_spawn,
    e.Send: Watchdog._act_send,
    e.TakeBack: Watchdog._act_take_back,
    e.AskExit: Watchdog._act_ask_exit,
    e.Kill: Watchdog._act_kill,
    e.Abandon: Watchdog._act_abandon,
    e.Began: Watchdog._act_began,
    e.Requeue: Watchdog._act_requeue,
    e.AskRetry: Watchdog._act_ask_retry,
    e.Break: Watchdog._act_break,
    e.Resolve: Watchdog._act_resolve,
    e.Fail: Watchdog._act_fail,
    e.Close: Watchdog._act_close,
}
