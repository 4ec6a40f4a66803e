"""The only thread that touches workers: readiness and time become events, commands become acts.

It has the mailbox, the core and the order in which things are done.  What is done with workers is in ``_links``, what
futures are told in ``_pending``.

Guarantees:

* callers only post (``submit``, ``cancel`` ...) and never wait for a lock held over I/O;
* nothing here waits without a bound, unpickles, or calls the user's code;
* an error in here, a bug of ours, fails every future with the event log: it may not be a hang.
"""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from time import monotonic, sleep
from typing import Any, Protocol

from . import _bulk, _held_up, _os
from . import _events as e
from ._call import as_task
from ._core import Core
from ._evidence import error_of
from ._launch import Launcher, Processes
from ._link import Link
from ._links import ANSWERS, CHANNEL, DEATH, Launched, Links, discard
from ._loans import Loan, Loans
from ._log import CRITICAL
from ._os import selecting
from ._pending import Pending, Work, refuse
from ._side import Side, tell_aside
from ._stream import Stream
from ._words import last_line
from ._worker import Setup
from .errors import PoolBroken
from .future import SafeFuture
from .policy import PoolPolicy

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

EVENTS_KEPT = 1000
ANSWER_LIMIT_S = 2.0  # for the watchdog to answer a caller
LONGEST_S = 3600.0  # that is slept at a time: a selector takes no more than some weeks
JOIN_SLICE_S = 1.0
LAUNCH_SLICE_S = 0.002
MOST_LENT = 8  # idle workers that callers may send to directly
LENT_FOR_S = 1.0  # after the last answer: a pool that nobody uses sleeps without being woken for it
CALLER_LIMIT_S = 0.2  # for a caller that has taken a worker to have sent it its task
CALLER_SLICE_S = 0.0001
HELD_UP_LIMIT_S = 0.1  # for what waits for another thread's lock when the pool is closed
COME_BACK_S = 0.05  # how often to see whether callers that were called away are back


class Observer(Protocol):
    """Sees what happens, and changes nothing."""

    def saw(self, event: e.Event, commands: Sequence[e.Command], pool: Observed) -> None:
        """``commands``: the core's answer to ``event``, not yet carried out.  On the watchdog: must not block."""

    def round_ended(self, pool: Observed) -> None:
        """All commands of some events were carried out.  As above."""

    def unsent(self, future: SafeFuture, error: BaseException) -> None:
        """A call could not be pickled; on the thread of whoever submitted it."""


class Observed:
    """What an observer may ask of a pool, on its watchdog."""

    def __init__(self, pending: Pending, links: Links, deliver: Callable[[Callable[[], object]], None]) -> None:
        self._pending = pending
        self._links = links
        self.deliver = deliver
        self.one = pending.one  # the future of a task, or what stands for it

    def pid_of(self, worker: int) -> int | None:
        return self._links.pids.get(worker)

    def failed_of(self, event: e.Event, tasks: tuple[int, ...]) -> list[int]:
        """Those of ``tasks`` that did not return, though their workers answered; ``event`` has settled them."""
        if type(event) is e.Received:
            return [task for task in tasks if task in event.raised] if event.raised else []
        return [task for task in tasks if (future := self.one(task)) is not None and not _has_returned(future)]

    def text_of(self, task: int) -> str:
        """Of what its last attempt raised, in a line; "" if its worker does not tell."""
        return last_line(self._pending.taken_text(task))

    def why_of(self, task: int) -> str:
        """The same, of a task that has failed."""
        future = self.one(task)
        return future.attempts[-1]._words if future is not None and future.attempts else self.text_of(task)


def _has_returned(future: SafeFuture) -> bool:
    answer = future.last_answer()
    return (future._record is None or future._record.error is None) and (answer is None or answer.ok)


class Means:
    """What a watchdog is woken by; all that it owns."""

    wake_w: socket.socket
    wake_r: socket.socket
    selector: selecting.Selector
    lending: Loans

    def __init__(self, own: ExitStack) -> None:
        self.own = own


_process = object()  # another one in each fork


def _be_another_process() -> None:
    global _process
    _process = object()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_be_another_process)

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
        observers: Sequence[Observer] = (),
    ) -> None:
        self.name = name
        self.processes = Processes()  # pid -> multiprocessing's process, alive or not yet buried
        self.broken: str | None = None
        self._broken_by = e.Failure("broken", reason="it was shut down before the task was queued")
        self.thread: threading.Thread | None = None
        self._policy = policy
        self._launcher = launcher
        self._setup = setup
        self._core = Core(policy) if core is None else core
        self.observers = tuple(observers)
        self._pid = os.getpid()
        self._process = _process
        self._side = Side(f"{name}-callbacks")
        self._judges = Side(f"{name}-retries")
        self._launches = Side(f"{name}-launches")
        self._sides = (self._side, self._judges, self._launches)
        self._start_lock = threading.RLock()
        self._mailbox: deque[Work | Launched | Callable[[], None]] = deque()
        self._lending = Loans(None, None)  # others, once it runs
        self._loans: tuple[Loan, ...] = ()  # only while the watchdog sleeps
        self._called_in: tuple[Loan, ...] = ()  # those that it sees to just now
        self._can_hear = False  # callers may hear the workers that they have
        self._awake = True
        self._due: float | None = None  # when ``Ticked`` is needed at the latest
        # Scenario 5: (a) somebody asks threading whether the thread lives, (b) a signal handler of the user's raises
        # while that looks.  Then it takes the thread for dead (CPython's bpo-45274).  So nobody asks.
        self._has_ended = False
        self._closed = threading.Event()
        self._is_mute = False
        self._own = ExitStack()  # the selector and the ends of the wake-up channel
        self._held_up: deque[Callable[[], bool]] = deque()  # for another thread has a lock: see ``_Sync``
        self._held_up_s = _held_up.FIRST_LOOK_S
        self._unanswered: list[threading.Lock] = []  # of callers, to be released at the end of this round
        self._events: deque[e.Event] = deque()
        self._pending = Pending()
        self._links = Links(self._events, self._pending, self.processes)
        self._observed = Observed(self._pending, self._links, self.deliver)
        self._always_told = not policy.take_back or policy.stall_timeout is not None
        self._store: _bulk.Store | None = None  # for big arguments, once there was one
        self._trim_at: float | None = None  # when to give back what it keeps
        self.event_log: deque[str | e.Event] = deque(maxlen=EVENTS_KEPT)

    # -------------------------------------------------------- callers' side

    def submit(self, future: Work) -> None:
        if self._loans and type(future._payload) is tuple and future._kind.is_plain and self._send_directly(future):
            return
        self._mailbox.append(future)
        if future._kind.options.retry is not None and not self._judges.is_standing_by:
            with suppress(RuntimeError):  # it is tried again when there is something to ask
                self._judges.stand_by()
        if self.thread is None:
            self._start()
            if self._policy.start_all:
                # Scenario 2: (a) a program submits and comes to its end, (b) workers are to be forked.
                # From Python 3.12 on that is refused, so it is done before ``submit`` returns.
                self.await_launches()
        if not self._awake:
            self._wake()
        if self._closed.is_set():
            # Scenario 1: (a) a thread passes the check for shutdown, (b) the pool closes, (c) it posts.
            self._return_mail()

    def made_store(self) -> _bulk.Store:
        """The one of this pool, for what is big; it keeps nothing once the pool is closed."""
        if self._store is None:
            with self._start_lock:
                if self._store is None:
                    self._store = _bulk.Store()
                    if self._closed.is_set():
                        self._store.close()
        return self._store

    def _send_directly(self, future: SafeFuture) -> bool:
        """To an idle worker, on the thread of the caller.  False: none is lent.

        A worker is only lent while the watchdog sleeps, so nothing is decided about it meanwhile.
        """
        future._sent = True
        for loan in self._loans:
            if not loan.takers and loan.take(future):
                return True
        future._sent = False
        return False

    def hear(self, future: SafeFuture, limit_s: float) -> bool:
        """On the thread of a caller: have its answer from the worker itself, if the watchdog sleeps; is it done?"""
        for loan in self._loans if self._can_hear and limit_s > 0 else ():
            if loan.is_of(future):
                try:
                    return loan.hear(future, min(limit_s, LENT_FOR_S))
                finally:
                    if loan.heard:  # something that only the watchdog understands
                        self._wake()
        return False

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
        # Scenario 6: (a) a caller waits for an answer, (b) a signal handler of the user's runs there, and waits for the
        # pool, while the caller has the lock of a ``threading.Event``.  So it is a lock that is only ever released.
        unanswered = threading.Lock()
        unanswered.acquire(blocking=False)

        def act_and_answer() -> None:
            self._unanswered.append(unanswered)
            act()

        self.post(act_and_answer)
        end = monotonic() + ANSWER_LIMIT_S
        while not unanswered.acquire(timeout=min(0.1, ANSWER_LIMIT_S)):
            if monotonic() >= end or self._closed.is_set():
                return
            self.check()

    def await_launches(self) -> None:
        """Wait until the workers for what was submitted so far are there, for at most ``ANSWER_LIMIT_S``."""
        if self.thread is None:
            return
        end = monotonic() + ANSWER_LIMIT_S
        self.ask(lambda: None)
        while self._links.launching and monotonic() < end and not self.is_own_thread():
            sleep(LAUNCH_SLICE_S)

    def want_worker(self) -> None:
        """As ``submit``, for a call that cannot be sent."""
        if self.thread is None:
            self._start()
        self.post(lambda: self._events.append(e.WorkerWanted(monotonic())))

    def cancel(self, task: int, *, kill: bool = False, wait: bool = False, unsent: bool = False) -> None:
        if self.is_fork():
            return  # the task is its owner's

        def act() -> None:
            self._drain()  # what was posted before may settle it
            if task in self._pending.futures:  # else it is settled, or has never been told to the core
                self._events.append(e.CancelRequested(monotonic(), task, kill, unsent))

        (self.ask if wait else self.post)(act)

    def look(self, *, wait: bool) -> None:
        """See which tasks have begun, and which have ended that their workers have not told of."""

        def act() -> None:
            for worker in self._links.by_worker:
                self._links.look(worker, self._core.mean_s())

        (self.ask if wait else self.post)(act)

    def cancel_range(self, first: int, last: int) -> None:
        """Of the items of a stream."""
        if not self.is_fork():
            self.post(lambda: self._events.append(e.RangeCancelled(monotonic(), first, last)))

    def shutdown(self, *, cancel: bool) -> None:
        if self.is_fork():
            return  # called by the garbage collector, perhaps; a thread that is not here may hold the lock
        with self._start_lock:
            if self.thread is None:
                self._closed.set()  # nothing ever ran, and now nothing will
                self._close_store()
                for side in self._sides:
                    side.close()
        self.post(lambda: self._events.append(e.ShutdownRequested(monotonic(), cancel)))

    def stacks(self, limit_s: float) -> dict[int, str]:
        """What each worker is doing, by pid; "" for one that does not say it in time."""
        return self._links.stacks(limit_s)

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
        return self._process is not _process

    def check(self) -> None:
        """See that the watchdog lives; if it does not, no future may wait for it."""
        if self.is_fork():
            reason = f"this process is a fork of {self._pid}, which owns the pool; make a pool of your own here"
            raise PoolBroken(reason, reason=reason)
        if self._has_ended and not self._closed.is_set():
            self._crashed("its thread is gone")

    def deliver(self, job: Callable[[], object]) -> None:
        if not self._is_mute:
            self._side.put(job)

    def try_until_done(self, job: Callable[[], bool]) -> None:
        """It returns whether it is done, and may not wait for anything."""
        self._held_up.append(job)
        self._held_up_s = _held_up.FIRST_LOOK_S
        if self._closed.is_set():
            self._leave_held_up()
        elif self.thread is not None and not self._awake:
            self._wake()

    def _leave_held_up(self) -> None:
        """Nobody waits for these: it may be who shuts the pool down that has the lock.

        Scenario 8: (a) the watchdog tries them for the last time, (b) another thread, which has one more, leaves them
        all to others, (c) a waiter is told twice.  So each is taken by one thread.
        """
        with suppress(IndexError):
            while True:
                _held_up.try_until_done(self._held_up.popleft())

    def mute(self) -> None:
        """Call back nobody any more."""
        self._is_mute = True

    @property
    def progress(self) -> int:
        """Counts what moves."""
        return self._links.progress

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
            means = Means(ExitStack())
            try:
                self._provide(means)
                self._side.stand_by()
                self._launches.stand_by()
            except (RuntimeError, OSError) as error:
                means.own.close()
                self._refuse_mail(error)
                return
            except BaseException:  # of a signal handler of the user's
                means.own.close()
                raise
            thread = threading.Thread(target=self._run, args=(means,), name=f"{self.name}-watchdog", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                if "new thread" not in str(error):
                    raise  # of a handler, and then the thread may well come: its means are its own
                means.own.close()
                self._refuse_mail(error)
                return
            # Scenario 3: (a) a thread starts the watchdog, (b) another one submits, sees it and leaves its call to it,
            # (c) the start fails.  So it is not seen before it runs.
            self._be_run_by(thread, means)

    def _provide(self, means: Means) -> None:
        own = means.own
        with _os.above_standard():
            means.wake_w, means.wake_r = _os.open_channel()
            for end in (means.wake_w, _os.keep(means.wake_r)):
                own.callback(_os.close, end)
                end.setblocking(False)
            means.selector = selecting.Selector()
            own.callback(means.selector.close)
        means.selector.register(means.wake_r, selecting.READ, None)
        listen = getattr(means.selector, "listen", None)
        means.lending = Loans(listen, self._made_bell(own) if listen is not None else None)

    def _be_run_by(self, thread: threading.Thread, means: Means) -> None:
        """Unless another one runs it, for a start may be interrupted.

        Scenario 7: (a) a thread is being started, (b) a signal handler of the user's submits, or raises and it is tried
        again, (c) two threads run one pool; or none is known, and the pool is taken for one that never ran.  So the
        thread says itself that it runs, and this is one step.
        """
        if self.thread is None:
            self._own, self._selector, self._lending = means.own, means.selector, means.lending
            self._wake_w, self._wake_r, self._links.selector = means.wake_w, means.wake_r, means.selector
            self.thread = thread

    def _made_bell(self, own: ExitStack) -> _os.End | None:
        """For callers that hear workers themselves: not where somebody watches for stalls, and would learn it late."""
        policy = self._policy
        may_hear = policy.stall_timeout is None and policy.max_tasks_per_child is None
        if not may_hear or "board" not in _os.CAPABILITIES:
            return None
        with suppress(OSError):
            bell = _os.open_token()
            own.callback(_os.close, bell)
            return bell
        return None

    def _refuse_mail(self, error: Exception) -> None:
        reason = f"its watchdog cannot be started now: {error}; a later submit tries again"
        while self._mailbox:
            item = self._mailbox.popleft()
            if isinstance(item, Work):
                item.failed(PoolBroken(f"{item} cannot be run by pool {self.name!r}: {reason}", reason=reason))

    def _wake(self) -> None:
        # Scenario 4: (a) this says that the watchdog is awake, (b) a signal handler of the user's raises, here, and
        # the byte is never sent.  From then on nobody would wake it: so only the watchdog itself says so.
        with suppress(OSError):  # full: it will wake; closed: nobody is there
            self._wake_w.send(b"!")

    # ---------------------------------------------------------- the thread

    def _run(self, means: Means) -> None:
        me = threading.current_thread()
        self._be_run_by(me, means)
        if self.thread is not me or self._closed.is_set():  # (shut down within its start)
            means.own.close()
            return
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
        finally:
            self._has_ended = True

    def _turn(self) -> None:
        """One round: wait, read the mail, listen to the workers, let time pass."""
        self._lend()
        self._awake = False
        timeout = 0.0 if self._mailbox else self._timeout()
        ready = self._selector.ready(timeout)
        self._awake = True
        if self._loans or self._mailbox:
            self._call_in_loans()
            self._read_mailbox()
            self._drain()
        self._listen(ready)
        if self._links.glance_at is not None:
            self._links.glance(self._core.mean_s())
            self._drain()
        if not self._links.are_calm():
            self._end_workers()
        now = monotonic()
        self._due = self._core.next_deadline()
        if self._due is not None and self._due <= now:
            self._events.append(e.Ticked(now))
            self._drain()
            self._due = self._core.next_deadline()
        if self._store is not None:
            self._trim(now)
        if self._held_up and not _held_up.try_once(self._held_up):
            self._held_up_s = min(2 * self._held_up_s, _held_up.LONGEST_LOOK_S)
        for observer in self.observers:
            observer.round_ended(self._observed)
        if self._unanswered:
            for unanswered in self._unanswered:
                unanswered.release()
            self._unanswered.clear()

    def _listen(self, ready: list[Any]) -> None:
        """To what is ready: ``None``, somebody who woke us; or a link, and what of it."""
        # Deaths first: they read their channel to the end, and a closed channel is then no news.
        for data in sorted(ready, key=_deaths_first) if len(ready) > 1 else ready:
            if data is None:
                self._empty_wake_pipe()
                continue
            link, what = data
            if what is DEATH:
                self._links.died(link)
            elif link.worker not in self._links.by_worker:
                continue
            elif what is ANSWERS and not link.is_deaf:
                self._links.hear(link)
            elif what is CHANNEL:
                self._links.writing.add(link.worker)
            self._drain()

    def _end_workers(self) -> None:
        """Those that are to be killed, and those that have died."""
        self._links.kill_the_asked()
        for link, code in self._links.ended():
            self._links.hear(link, to_the_end=True)  # "answered, then died" is one fact: first the answer
            self._links.salvage(link, self._core.mean_s())
            self._drain()
            self._links.bury(link, code)
            try:
                self._drain()  # who waits for its task is told before anything else
            finally:
                self._links.close(link)

    def _trim(self, now: float) -> None:
        """Whatever makes a block free is an event, and this is called after it; then a timer runs, until none is."""
        assert self._store is not None
        if self._trim_at is None or self._trim_at <= now:
            self._trim_at = self._store.trim(now)

    def _timeout(self) -> float | None:
        now = monotonic()
        moments = [self._due, self._trim_at, self._links.glance_at]
        moments += [side.relieve(now) for side in self._sides if side.jobs]
        if not self._links.are_calm():
            moments += self._links.moments(now)
        if self._loans:
            moments.append(self._links.answered_at + LENT_FOR_S)
        if self._lending.rung_for:
            moments.append(now + COME_BACK_S)
        if self._held_up:
            moments.append(now + self._held_up_s)
        known = [moment for moment in moments if moment is not None]
        return min(max(0.0, min(known) - now), LONGEST_S) if known else None

    # ------------------------------------------------------ lent workers

    def _lend(self) -> None:
        """Until the watchdog wakes callers may send to idle workers; but not in a pool where nobody does any more."""
        if self._lending.rung_for and self._lending.have_come_back():
            self._links.listen_to_all(self._lending)
        free = self._core.lendable(MOST_LENT)
        if free and monotonic() < self._links.answered_at + LENT_FOR_S:
            links = map(self._links.by_worker.get, free)
            loans = (link.lend(self._lending) for link in links if link is not None)
            self._can_hear = self._lending.may_hear()
            self._loans = tuple(loan for loan in loans if loan is not None)

    def _call_in_loans(self) -> None:
        self._called_in, self._loans = self._loans, ()
        if self._called_in:
            self._lending.call_in(self._called_in)
        for loan in self._called_in:
            if loan.count:
                self._links.by_worker[loan.of.worker].called_in(loan)
                self._links.note_answers(loan.of.worker, loan.count, loan.total_s)
            future = loan.takers[0]
            if future is not None:
                self._was_sent(loan, future)
        self._called_in = ()

    def _held_by_callers(self) -> list[SafeFuture | None]:
        """When all is over: what they have sent, and nobody else knows of."""
        loans, self._loans = (*self._called_in, *self._loans), ()
        with suppress(Exception):
            self._lending.call_in(loans)
        return [loan.takers[0] for loan in loans if loan.is_taken()]

    def _was_sent(self, loan: Loan, future: SafeFuture) -> None:
        end = monotonic() + CALLER_LIMIT_S
        while not loan.is_over() and monotonic() < end:
            sleep(CALLER_SLICE_S)
        self._pending.futures[future._task] = future
        link = self._links.by_worker[loan.of.worker]
        link.sent_directly(loan, future)
        self._events.append(e.SentDirectly(monotonic(), loan.of.worker, future._task))
        if loan.heard:
            self._links.hear(link)
        if loan.is_complete() and loan.is_over():
            loan.forget()
        else:
            self._events.append(e.ChannelLost(monotonic(), loan.of.worker, "a caller could not send it all of a task"))

    def _empty_wake_pipe(self) -> None:
        with suppress(OSError):
            self._wake_r.recv(4096)

    def _read_mailbox(self) -> None:
        mailbox = self._mailbox
        fresh: list[e.NewTask | int] = []  # that have ``like`` in common
        futures, like = self._pending.futures, None
        for _ in range(len(mailbox)):
            try:
                item = mailbox.popleft()
            except IndexError:  # it was shut down within its start, and another thread returns the mail
                break
            if isinstance(item, SafeFuture):
                task, payload = item._task, item._payload
                if payload is None:  # cancelled meanwhile, and the core need not know
                    self._tell_observers(e.CancelRequested(monotonic(), task, unsent=True), (e.Cancel((task,)),))
                    continue
                futures[task] = item
                kind = item._kind
                new = task if type(payload) is tuple and kind.is_alike else as_task(item, payload)
                if type(new) is int and kind.like is not like:
                    self._hand_on(fresh, like)
                    like = kind.like
                elif type(new) is not int:
                    self._hand_on(fresh, like)
                    self._hand_on([new], None, plain=False)
                    continue
                fresh.append(new)
                continue
            self._hand_on(fresh, like)
            if isinstance(item, Stream):
                self._pending.add_stream(item)
                tasks = tuple(range(item.first, item.last + 1))
                self._events.append(e.TasksSubmitted(monotonic(), tasks, plain=True))
            elif isinstance(item, Launched):
                self._links.take_in(*item)
            else:
                item()
        self._hand_on(fresh, like)

    def _hand_on(self, fresh: list[e.NewTask | int], like: e.NewTask | None, *, plain: bool = True) -> None:
        """To the core, in order."""
        if fresh:
            self._events.append(e.TasksSubmitted(monotonic(), tuple(fresh), plain, like))
            fresh.clear()

    def _tell_observers(self, event: e.Event, commands: Sequence[e.Command]) -> None:
        for observer in self.observers:
            observer.saw(event, commands, self._observed)

    def _drain(self) -> None:
        """Hand events to the core and carry out its commands until there are none; then write."""
        while self._events:
            event = self._events.popleft()
            self.event_log.append(_for_the_log(event))
            commands = self._core.handle(event)
            if self.observers:
                self._tell_observers(event, commands)
            for command in commands:
                _ACTS[type(command)](self, command)
        if self._links.writing:
            self._links.write()

    # ---------------------------------------------------------- the acts

    def _act_spawn(self, command: e.Spawn) -> None:
        # On a thread of its own: a start context may block (a fork server that is stopped, a child
        # that dies with its start-up pipe full), and limits are kept all the same.
        self._links.launching.add(command.worker)
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

    def _act_send(self, command: e.Send) -> None:
        link = self._links.by_worker.get(command.worker)
        claimed, withheld = self._pending.claim(command.tasks, link, command.together)
        if withheld:
            self._events.appendleft(e.Withheld(monotonic(), command.worker, withheld))
        if link is not None and claimed:
            link.send(claimed, always_told=self._always_told)
            if command.together > 1:
                self._links.have_batches()
            self._links.writing.add(command.worker)

    def _act_fail(self, command: e.Fail) -> None:
        self._pending.fail(command.task, command.failure, self._links.pids.get(command.failure.worker or 0))

    def _act_ask_retry(self, command: e.AskRetry) -> None:
        future = self._pending.futures[command.task]
        record = future._made_record()
        pid = self._links.pids.get(command.failure.worker or 0)
        kind, task, attempt, ended = command.failure.kind, command.task, command.attempt, monotonic()
        if kind not in ("error", "result"):
            record.answer = None  # one that came too late
            record.error = error_of(command.failure, future, future._kind.options, pid)

        def judge() -> None:
            delay_s = None
            try:
                delay_s = record.ask_policy(future, kind, attempt, pid, ended)
            finally:
                self.post(lambda: self._events.append(e.RetryAnswered(monotonic(), task, attempt, delay_s)))

        self._judges.put(judge)

    def _act_break(self, command: e.Break) -> None:
        self._broken_by = command.failure
        self.broken = command.failure.reason

    # ------------------------------------------------------------ the end

    def _close(self) -> None:
        self._closed.set()
        self._let_go()

    def _let_go(self) -> None:
        """Of everything that is not a worker's."""
        self._return_mail()
        end = monotonic() + HELD_UP_LIMIT_S
        while self._held_up and not _held_up.try_once(self._held_up) and monotonic() < end:
            sleep(_held_up.FIRST_LOOK_S)
        self._leave_held_up()
        self._setup = Setup()  # what its initializer was given is not kept
        self._own.close()
        self._close_store()
        for side in self._sides:
            side.close()

    def _close_store(self) -> None:
        # (Without the lock, see Scenario 6.  Who is just making one finds that the pool is closed.)
        if self._store is not None:
            self._store.close()

    def _return_mail(self) -> None:
        """What was posted too late fails, rather than wait for a thread that is gone."""
        while self._mailbox:
            try:
                item = self._mailbox.popleft()
            except IndexError:
                return
            if isinstance(item, Work):
                refuse(item, self._broken_by, self._links.pids.get(self._broken_by.worker or 0))
            elif isinstance(item, Launched) and isinstance(item.outcome, Link):
                discard(item.outcome)

    def _crashed(self, trouble: str) -> None:
        """A bug of ours, or of the system's: fail everything, loudly, with the evidence; kill every worker."""
        log = tuple(map(repr, tuple(self.event_log)))
        message = (
            f"the watchdog of pool {self.name!r} broke down, and every unfinished task with it; please report this. "
            f"{trouble.strip()}\nLast events:\n" + "\n".join(log[-20:])
        )
        self.broken = message
        tell_aside(CRITICAL, "safepool: %s", message)
        held = self._held_by_callers()
        for link in tuple(self._links.by_worker.values()):
            try:
                discard(link)
            except Exception as error:
                tell_aside(CRITICAL, "safepool: while killing %r", link, error=error)
        self._pending.fail_all(PoolBroken(message, reason=trouble, event_log=log), (*self._mailbox, *held))
        self._links.by_worker.clear()
        self.processes.clear()
        self._closed.set()
        self._let_go()


def _deaths_first(data: tuple[Link, object] | None) -> bool:
    return data is None or data[1] is not DEATH


def _for_the_log(event: e.Event) -> str | e.Event:
    if isinstance(event, e.TasksSubmitted) and len(event.tasks) > 8:
        return f"TasksSubmitted(now={event.now}, {len(event.tasks)} tasks, the first of them {event.tasks[0]})"
    return event


_ACTS: dict[type, Callable[[Watchdog, Any], None]] = {
    e.Spawn: Watchdog._act_spawn,
    e.Send: Watchdog._act_send,
    e.TakeBack: lambda watchdog, command: watchdog._links.take_back(command.worker),
    e.Look: lambda watchdog, command: watchdog._links.look(command.worker, watchdog._core.mean_s()),
    e.AskExit: lambda watchdog, command: watchdog._links.ask_exit(command.worker),
    e.Kill: lambda watchdog, command: watchdog._links.kill(command.worker, hard=command.hard),
    e.Abandon: lambda watchdog, command: watchdog._links.abandon(command.worker, watchdog._core.mean_s()),
    e.Began: lambda watchdog, command: watchdog._pending.began(command.task, watchdog._links.pids.get(command.worker)),
    e.Requeue: lambda watchdog, command: watchdog._pending.requeue(command.tasks),
    e.AskRetry: Watchdog._act_ask_retry,
    e.Break: Watchdog._act_break,
    e.Resolve: lambda watchdog, command: watchdog._pending.resolve(command.tasks),
    e.Fail: Watchdog._act_fail,
    e.Cancel: lambda watchdog, command: watchdog._pending.cancel(command.tasks),
    e.Close: lambda watchdog, command: None,  # ``_run`` sees it
}
