"""``as_completed`` and ``wait`` for futures of any kind, which cannot wait for ever on ours.

Like those of ``concurrent.futures``, and beyond them: ``stall_timeout``; a ``TimeoutError`` that names
what is unfinished and in which state; and once a second a look after the pools behind the futures.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION, Future
from concurrent.futures._base import DoneAndNotDoneFutures
from contextlib import suppress
from time import monotonic

from .errors import Stalled, Unfinished
from .policy import seconds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

LOOK_AFTER_S = 1.0
TOLD = 10  # how many unfinished futures a message names


def as_completed(
    fs: Iterable[Future[Any]], timeout: float | None = None, *, stall_timeout: float | None = None
) -> Iterator[Future[Any]]:
    """Yield the futures as they complete, each once.

    ``timeout``: seconds from this call until the last one.  ``stall_timeout``: seconds during which
    nothing moves: none of these futures begins, is tried again or completes, and the pool of none does
    anything for others.  Raises ``Unfinished`` or ``Stalled``, both ``TimeoutError``; ``TypeError`` for
    arguments of the wrong type.
    """
    end = _end_of(timeout)
    watch = _Watch(_distinct(fs), stall_timeout)
    found = _as_they_come(watch, timeout, end)
    next(found)
    return found


def _as_they_come(watch: _Watch, timeout: float | None, end: float | None) -> Iterator[Any]:
    try:
        yield  # begun, it will leave the futures however it ends; one that was never begun would stay in them
        while watch.pending:
            watch.wait(end)
            if not watch.completed:
                raise watch.unfinished(timeout)
            while watch.completed:
                yield watch.completed.popleft()
    finally:
        watch.stop()


def wait(
    fs: Iterable[Future[Any]],
    timeout: float | None = None,
    return_when: str = ALL_COMPLETED,
    *,
    stall_timeout: float | None = None,
) -> DoneAndNotDoneFutures[Any]:
    """Wait until all, the first, or the first failed of the futures are done: ``(done, not_done)``.

    After ``timeout`` seconds it returns what is done, as the standard library does.  It raises
    ``Stalled``, a ``TimeoutError``, when nothing moves for ``stall_timeout`` seconds; see ``as_completed``.
    Raises ``ValueError`` for an unknown ``return_when``.
    """
    if return_when not in (ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION):
        raise ValueError(f"Invalid return condition: {return_when!r}")
    end = _end_of(timeout)
    futures = _distinct(fs)
    watch = _Watch(futures, stall_timeout)
    try:
        done: set[Future[Any]] = set()
        while True:
            watch.collect()
            done.update(watch.completed)
            watch.completed.clear()
            if not watch.pending or (return_when != ALL_COMPLETED and _is_enough(done, return_when)):
                break
            if end is not None and monotonic() >= end:
                break
            watch.wait(end)
    finally:
        watch.stop()
    return DoneAndNotDoneFutures(done, futures - done)


def _is_enough(done: set[Future[Any]], return_when: str) -> bool:
    if return_when == FIRST_COMPLETED:
        return bool(done)
    return any(not future.cancelled() and future.exception() is not None for future in done)


def _end_of(timeout: float | None) -> float | None:
    if timeout is None:
        return None
    if isinstance(timeout, (int, float)) and timeout < 0:
        timeout = 0  # as the standard library has it: no time at all
    length = seconds(timeout, "timeout", zero=True)
    return None if length is None else monotonic() + length


def _distinct(fs: Iterable[Future[Any]]) -> set[Future[Any]]:
    futures = set(fs)
    for future in futures:
        if not hasattr(future, "_condition"):
            raise TypeError(f"as_completed and wait need concurrent.futures futures; got {future!r}")
    return futures


class _Watch:
    """What is awaited: the futures report here, through the protocol of ``Future._waiters``."""

    def __init__(self, futures: set[Future[Any]], stall_timeout: float | None) -> None:
        self._stall_s = None if stall_timeout is None else seconds(stall_timeout, "stall_timeout")
        self._sleeper: Any = None  # a lock: released when something is reported
        self._reported: deque[Future[Any]] = deque()
        self.completed: deque[Future[Any]] = deque()
        self.pending = set(futures)
        self._homes = {id(f._home): f._home for f in futures if hasattr(f, "_home")}
        for future in futures:
            with _lock_of(future):
                if future.done():
                    self._reported.append(future)
                else:
                    future._waiters.append(self)  # type: ignore[arg-type]  # the protocol is what counts
        self._moved_at = monotonic()
        self._marks = self._look()

    def _add(self, future: Future[Any]) -> None:
        # No lock, for who waits may be held up by a signal handler of the user's, or a finalizer may cancel a future.
        self._reported.append(future)
        sleeper = self._sleeper
        if sleeper is not None and sleeper.locked():
            with suppress(RuntimeError):  # another one was faster
                sleeper.release()

    add_result = add_exception = add_cancelled = _add

    def wait(self, end: float | None) -> None:
        """Until something completed, or ``end``; fills ``completed``.  Raises ``Stalled``."""
        while not self.collect():
            now = monotonic()
            if end is not None and now >= end:
                return
            slice_s = LOOK_AFTER_S if self._stall_s is None else min(LOOK_AFTER_S, self._stall_s / 4)
            if end is not None:
                slice_s = min(slice_s, end - now)
            sleeper = threading.Lock()
            sleeper.acquire(blocking=False)
            self._sleeper = sleeper
            # (Looked at after that: who reports looks for a sleeper after it.)
            if not self._reported and not sleeper.acquire(timeout=max(0.0, slice_s)):
                self._look_after()

    def collect(self) -> bool:
        """Move what was reported from ``pending`` to ``completed``; is there any?"""
        while self._reported:
            future = self._reported.popleft()
            if future in self.pending:  # else it was found by ``_look_after``, and is reported too
                self.pending.discard(future)
                self.completed.append(future)
                self._leave(future)  # not to be kept alive by what is done
        if self.completed:
            self._moved_at = monotonic()
        return bool(self.completed)

    def _look_after(self) -> None:
        for home in self._homes.values():
            home.check()
        # A foreign pool may leave a cancelled future without telling anybody.
        for future in self.pending:
            if future.done():
                self._add(future)
        if self._stall_s is None:
            return
        marks, now = self._look(), monotonic()
        if marks != self._marks:
            self._marks, self._moved_at = marks, now
        elif now - self._moved_at >= self._stall_s:
            raise Stalled(
                f"nothing moved for {self._stall_s:g} s: {self._words()}",
                unfinished=list(self.pending),
                seconds=self._stall_s,
            )

    def _look(self) -> object:
        """What changes when something moves."""
        if self._stall_s is None:
            return None
        states = [(id(future), future._state, len(getattr(future, "attempts", ()))) for future in self.pending]
        return sorted(states), [home.progress for home in self._homes.values()]

    def unfinished(self, timeout: float | None) -> Unfinished:
        length = float(timeout or 0)
        return Unfinished(f"{self._words()} after {length:g} s", unfinished=list(self.pending), seconds=length)

    def _words(self) -> str:
        names = [_describe(future) for future, _ in zip(self.pending, range(TOLD))]
        more = f" and {len(self.pending) - TOLD} more" if len(self.pending) > TOLD else ""
        return f"{len(self.pending)} futures unfinished: {'; '.join(names)}{more}"

    def stop(self) -> None:
        for future in self.pending:
            self._leave(future)

    def _leave(self, future: Future[Any]) -> None:
        """Be told of this future no more.

        Scenario 1: (a) a future goes through its waiters and has told this one, (b) this one leaves, and the list
        gets shorter, (c) the next waiter is passed over, and waits for ever.  So it leaves under the future's lock.
        """
        with _lock_of(future):
            waiters: list[Any] = future._waiters
            if self in waiters:
                waiters.remove(self)


def _lock_of(future: Future[Any]) -> Any:
    return getattr(future, "_lock", None) or future._condition


def _describe(future: Future[Any]) -> str:
    home = getattr(future, "_home", None)
    if home is None:
        return repr(future)
    pid = f", process {future.worker_pid}" if future.running() else ""  # type: ignore[attr-defined]
    return f"{future} is {home.state_of(future._task)}{pid}"  # type: ignore[attr-defined]
