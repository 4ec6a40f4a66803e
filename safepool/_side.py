"""A thread for other people's code: callbacks, retry policies and launches run here, never on the watchdog.

Jobs run one after another, in order.  A job that takes longer than ``PATIENCE_S`` is left to itself and
the rest goes on beside it: one callback that blocks does not stop all others.

Scenario 1: (a) a program submits and comes to its end, (b) a job is put.  From Python 3.12 on no thread
can be started any more, and the exit finishes the work all the same: so a thread is started before there
is a job (``stand_by``), and stays until the side is closed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from time import monotonic, sleep
from typing import Any

from ._log import ERROR, tell

PATIENCE_S = 10.0
LOOK_S = 60.0  # how often a thread without work looks whether it missed something
JOIN_SLICE_S = 1.0
START_S = 0.005  # for a thread that was started to say that it is there

Job = Callable[[], object]


class Side:
    """A queue of jobs and the thread that runs them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.jobs: deque[Job] = deque()
        self._lock = threading.RLock()  # on no user's thread is there a call while it is held: see Scenario 3
        self._sleeper: Any = None  # a lock: released when there is something for the thread to do
        self._thread: threading.Thread | None = None
        self._last: threading.Thread | None = None  # the same, also once it is told to end
        self._busy_since: float | None = None
        self._closed = False

    def stand_by(self) -> None:
        """Have a thread ready for jobs to come.  Raises ``RuntimeError`` if none can be had."""
        if self._thread is None and not self._closed:
            self._start()

    @property
    def is_standing_by(self) -> bool:
        return self._thread is not None

    def put(self, job: Job) -> None:
        self.jobs.append(job)
        if not self._wake():
            self._try_to_start()

    def _wake(self) -> bool:
        """False: there is no thread."""
        with self._lock:
            is_there, sleeper = self._thread is not None, self._sleeper
        if sleeper is not None and sleeper.locked():
            with suppress(RuntimeError):  # another one was faster
                sleeper.release()
        return is_there

    def _try_to_start(self) -> bool:
        with suppress(RuntimeError):  # no more threads are to be had now; ``relieve`` tries again
            self._start()
            return True
        return False

    def _start(self) -> None:
        threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def relieve(self, now: float) -> float | None:
        """Replace the thread if its job takes too long; when to look again, in monotonic seconds."""
        if not self.jobs:
            return None
        since = self._busy_since
        due = (since or now) + PATIENCE_S
        if now >= due:
            self._dismiss(since)
            due = now + PATIENCE_S
        if self._thread is None:
            self._try_to_start()
        return due

    def _dismiss(self, since: float | None) -> None:
        """Whoever has been busy since then; the rest goes on without it."""
        with self._lock:
            if self._busy_since == since:
                self._thread = self._busy_since = None

    def _run(self) -> None:
        me = threading.current_thread()
        with self._lock:
            # Scenario 3: (a) a thread is being started, (b) a signal handler of the user's runs there: it waits for the
            # pool, which needs that thread, or raises.  So no lock is held for a start, it is the new one that says
            # that it is there, and there may be two: then one ends.
            if self._thread is None:
                self._thread = self._last = me
                self._busy_since = None
        while (job := self._next(me)) is not None:
            try:
                job()
            except BaseException as error:
                tell(ERROR, "an unexpected error on thread %s", self._name, error=error)
            del job
            with self._lock:
                if self._thread is me:
                    self._busy_since = None

    def _next(self, me: threading.Thread) -> Job | None:
        while True:
            sleeper = threading.Lock()
            sleeper.acquire(blocking=False)
            with self._lock:
                if self._thread is not me:
                    return None
                if self.jobs:
                    self._busy_since = monotonic()
                    return self.jobs.popleft()
                if self._closed:
                    self._thread = None
                    return None
                self._sleeper = sleeper
            sleeper.acquire(timeout=LOOK_S)

    def close(self) -> None:
        """No job will come after those that are here: the thread may end after them."""
        self._closed = True
        self._wake()

    def join(self) -> None:
        """Wait until all jobs are done, but for none longer than ``PATIENCE_S``."""
        if self._thread is threading.current_thread():
            return
        self._await_jobs()
        self.leave()

    def leave(self) -> None:
        """Wait a moment for the thread's end, so that no trace of it is left; not for a job that takes longer.

        Scenario 2: (a) a launch has posted what came of it, which was all that the pool waited for, (b) the pool is
        closed, (c) whoever shut it down counts threads, before the launch has returned.
        """
        last = self._last
        if last is not None and last is not threading.current_thread():
            last.join(JOIN_SLICE_S)

    def _await_jobs(self) -> None:
        while (thread := self._thread) is not None or self.jobs:
            since, now = self._busy_since, monotonic()
            left = (since or now) + PATIENCE_S - now
            if thread is None:
                if not self._try_to_start():
                    return
                sleep(START_S)
            elif left > 0:
                thread.join(min(left, JOIN_SLICE_S))
            elif self.jobs:
                self._dismiss(since)
            else:
                return

    def is_current(self) -> bool:
        return self._thread is threading.current_thread()


def tell_aside(level: int, message: str, *args: object, error: BaseException | None = None) -> None:
    """As ``tell``, on a thread nobody waits for: its handlers may block, and stderr may be a pipe that is full."""
    with suppress(RuntimeError):
        words = level, message, *args
        threading.Thread(target=tell, args=words, kwargs={"error": error}, daemon=True).start()
