"""Idle workers that callers may send to, and hear, without asking anybody: while the watchdog sleeps, and no longer.

What became of a loan the watchdog finds out when it wakes and calls it in; until then nothing is decided about it.
"""

from __future__ import annotations

import select
import socket
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _os, _unpack, _wire  # (later, no descriptor may be left to load them by)
from ._wire import PLAIN, Frame

if TYPE_CHECKING:
    from .future import SafeFuture

MOST_DIRECT_BYTES = 4096  # that an idle worker's channel takes at once


class Borrowed(NamedTuple):
    """All that is to be known of a worker that is lent."""

    worker: int
    pid: int
    known: set[int]  # functions that it has
    tickets: int  # descriptors
    channel: int
    answers: int


class Loans:
    """What all loans of one pool have in common: the lock, and how a caller is called away from hearing a worker."""

    def __init__(self, selector: Any, bell: _os.End | None) -> None:
        """``bell``: None if callers cannot hear workers here."""
        self.lock = threading.RLock()  # held for a few lines; the garbage collector may run a user's finalizer in them
        self.selector = selector
        self.bell = bell
        self.rung_for: tuple[Loan, ...] = ()

    def can_hear(self) -> bool:
        """Nobody is on his way back from a loan that was called in."""
        if self.bell is None:
            return False
        if self.rung_for and all(loan.is_left for loan in self.rung_for):
            self.rung_for = ()
            _os.take_token(self.bell)
        return not self.rung_for

    def call_in(self, loans: tuple[Loan, ...]) -> None:
        """From here on no caller touches the worker of one of these, but for what he is writing to it."""
        with self.lock:
            for loan in loans:
                loan.is_called_in = True
                loan.takers.append(None)
                if loan.is_heard:
                    self.resume(loan.of.answers)
            heard = tuple(loan for loan in loans if not loan.is_left)
            if heard and self.bell is not None:
                self.rung_for += heard
                _os.put_token(self.bell, 1)

    def resume(self, fd: int) -> None:
        try:  # noqa: SIM105  (this is the hottest path of who waits for one task at a time)
            self.selector.resume(fd)
        except OSError:
            pass  # its worker is gone


class Loan:
    """An idle worker that a caller may send a plain task to, without asking anybody; and what came of that.

    The first on the list of takers has it; whoever ends the loan puts None there.  All that is to be known of the
    worker is here in advance, so the caller changes nothing but this.

    Scenario 1: (a) a caller takes a worker, (b) a signal handler of the user's raises, (c) nobody knows who has it.
    But the list says so, and ``written`` whether all was sent: ``map`` has no lines between which a handler could run.

    Who has it may also hear the answer, while the watchdog sleeps: then nobody else need be woken for it, and the next
    caller finds the worker idle.

    Scenario 2: (a) a caller hears a worker, (b) the watchdog wakes, for another task, say.  It calls the loan in: what
    was read is its, with all that follows, and it rings for the caller to come back and wait as everybody does.

    Scenario 3: (a) a caller has the watchdog not listen to a worker, (b) a signal handler of the user's raises, where
    it likes.  While there are loans the watchdog sleeps for a second at most, and then it calls them in.
    """

    __slots__ = (
        "_loans", "_poll", "count", "heard", "is_called_in", "is_heard", "is_left", "is_left_off", "number", "of",
        "takers", "to_close", "total_s", "written",
    )  # fmt: skip

    def __init__(self, of: Borrowed, number: int, loans: Loans) -> None:
        """``number``: of the next call at that worker."""
        self.of = of
        self.number = number
        self.takers: list[SafeFuture | None] = []
        self.written: list[int] = []  # what ``os.write`` said, of the ticket and of the call
        self.is_left_off = False  # the caller will not write to the worker any more
        self.to_close: list[socket.socket | _os.End] = []  # when it is over
        self.heard: list[bytes] = []  # what a caller has read
        self.is_heard = False  # a caller does, or did, and the watchdog may not listen
        self.is_left = True  # nobody waits for the worker's answer
        self.is_called_in = False
        self.count = 0  # tasks that callers have had the results of
        self.total_s = 0.0  # that they have run
        self._loans = loans
        self._poll: Any = None

    def take(self, future: SafeFuture) -> bool:
        """Send it, if nobody was faster.  False: nothing has happened."""
        number, data = self.number, self._call(future)
        if len(data) > MOST_DIRECT_BYTES:
            return False
        try:
            self.takers.append(future)
            if not self.is_of(future):
                return False
            if number != self.number:  # another caller has had it, and is done, since
                number, data = self.number, self._call(future)
            self.written.extend(
                map(_os.write, (self.of.tickets, self.of.channel), (_wire.encode_tickets(number, number), data))
            )
        except OSError:
            pass  # the worker has just died
        finally:
            if self.is_of(future):
                self.is_left_off = True
                for end in self.to_close:
                    end.close()
        return True

    def _call(self, future: SafeFuture) -> bytes:
        function = future._kind.function
        assert function is not None
        data = _wire.encode_calls(self.number, function.number, False, [future._payload])
        if function.number not in self.of.known:
            data = _wire.encode(Frame(_wire.FUNCTION, function.number, body=function.data)) + data
        return data

    def is_of(self, future: SafeFuture) -> bool:
        try:
            return self.takers[0] is future
        except IndexError:  # (it may be lent again between a look at its length and one at the first)
            return False

    def is_taken(self) -> bool:
        return bool(self.takers) and self.takers[0] is not None

    def is_complete(self) -> bool:
        return len(self.written) == 2

    def is_over(self) -> bool:
        """All is written, or never will be."""
        return self.is_left_off or self.is_complete()

    def forget(self) -> None:
        """Who had it, once all was sent: a busy worker is not to keep a future alive that its user has dropped."""
        self.takers[:] = [None]  # (whoever comes now finds that he is not the first)

    # ------------------------------------------------- who hears the answer

    def hear(self, future: SafeFuture, limit_s: float) -> bool:
        """On the thread of who has it: wait for the answer; False: it is to be waited for as always.

        The future is done then, and the worker may be lent to the next caller.  Raises nothing of its own.
        """
        is_done, lock = False, self._loans.lock
        try:
            with lock:
                if self.is_called_in or self.is_heard or not self.is_of(future) or not self.is_complete():
                    return False
                self.is_heard, self.is_left = True, False
                self._loans.selector.pause(self.of.answers)
            self._wait(limit_s)
            with lock:
                if not self.is_called_in:
                    self.heard.extend(map(_os.read, (self.of.answers,), (_wire.READ_BYTES,)))
            told = _wire.result_in(b"".join(self.heard), self.number)
            is_done = told is not None and self._settle(future, *told)
        except (OSError, ValueError, TypeError, EOFError, KeyError):
            pass  # it was rung for, or is late, or a task has written there: the watchdog finds out
        finally:
            with lock:
                if not self.is_called_in:
                    if is_done and told is not None:
                        self._be_lent_again(future, told[1])
                    self._loans.resume(self.of.answers)
                    self.is_heard = False
                self.is_left = True
        return is_done

    def _wait(self, limit_s: float) -> None:
        if self._poll is None:
            assert self._loans.bell is not None
            self._poll = select.poll()
            for fd in (self.of.answers, self._loans.bell.fileno()):
                self._poll.register(fd, select.POLLIN)
        self._poll.poll(limit_s * 1000)

    def _settle(self, future: SafeFuture, kind: int, run_s: float, body: bytes) -> bool:
        future._pid = self.of.pid
        if kind == PLAIN:
            future._result = _wire.plain_in(body)
        else:
            future.keep_result(body)
        future.answered()
        return True

    def _be_lent_again(self, future: SafeFuture, run_s: float) -> None:
        function = future._kind.function
        assert function is not None
        _unpack.is_known(self.of.known, function.number)
        self.count += 1
        self.total_s += run_s
        self.number += 1
        self.heard.clear()
        self.written.clear()
        self.is_left_off = False
        self.takers.clear()  # (from here on another caller may take it)
