"""Idle workers that callers may send to, and hear, without asking anybody: while the watchdog sleeps, and no longer.

What became of a loan the watchdog finds out when it wakes and calls it in; until then nothing is decided about it.
"""

from __future__ import annotations

import select
import socket
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _os, _unpack, _wire  # (later, no descriptor may be left to load them by)
from ._os import selecting
from ._wire import PLAIN, Frame

if TYPE_CHECKING:
    from collections.abc import Callable

    from .future import SafeFuture

AWAKE_S = 80e-6  # that a caller looks for an answer before it sleeps: what waking it would take
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
    """What all loans of one pool have in common: how a caller is called away from hearing a worker.

    No locks, for a signal handler of the user's may run, and wait for this pool, while its thread holds one.  Instead:
    CPython looks for signals, and for other threads, after a call and at the end of a round of a loop only, so plain
    assignments, and tests of attributes before them, are one step.
    """

    def __init__(self, listen: Callable[[int, int], None] | None, bell: _os.End | None) -> None:
        """``bell``: None if callers cannot hear workers here."""
        self.listen = listen
        self.bell = bell
        self.rung_for: tuple[Loan, ...] = ()  # callers that may not have come back yet

    def may_hear(self) -> bool:
        return self.bell is not None and not self.rung_for

    def have_come_back(self) -> bool:
        """All for whom it was rung have, just now: whatever they had the watchdog not listen to, it should again."""
        if not self.rung_for or not all(loan.is_left for loan in self.rung_for):
            return False
        self.rung_for = ()
        assert self.bell is not None
        _os.take_token(self.bell)
        return True

    def call_in(self, loans: tuple[Loan, ...]) -> None:
        """From here on no caller touches the worker of one of these, but for what he is writing to it."""
        for loan in loans:
            loan.is_called_in = True
            loan.may_read.clear()
            loan.takers.append(None)
        heard = tuple(loan for loan in loans if not loan.is_left)
        if heard:
            assert self.bell is not None
            self.rung_for += heard
            _os.put_token(self.bell, 1)
        for loan in loans:
            if loan.is_heard:
                self.listen_to(loan.of.answers)

    def listen_to(self, fd: int) -> None:
        assert self.listen is not None
        try:  # noqa: SIM105  (this is the hottest path of who waits for one task at a time)
            self.listen(fd, selecting.READING)
        except (OSError, ValueError):
            pass  # its worker, or the pool, is gone


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
    it likes, or takes long.  While there are loans the watchdog sleeps for a second at most, and then it calls them in.

    Scenario 4: (a) a caller is about to have the watchdog not listen, (b) the loan is called in, (c) the system does
    what (a) says, perhaps to another worker's descriptor that has the same number by now.  So the watchdog listens to
    all of them again once every caller is back.
    """

    __slots__ = (
        "_loans", "_poll", "count", "heard", "is_called_in", "is_heard", "is_left", "is_left_off", "is_reading",
        "may_read", "number", "of", "takers", "to_close", "total_s", "written",
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
        self.is_reading = False  # unless there is something in ``heard``
        self.is_left = True  # nobody waits for the worker's answer
        self.is_called_in = False
        self.may_read = [of.answers]  # taken away when it is called in
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
            told = (_wire.encode_tickets(number, number), data)
            self.written.extend(map(_os.write, (self.of.tickets, self.of.channel), told))
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
        except IndexError:  # it was lent again, just now
            return False

    def is_taken(self) -> bool:
        return bool(self.takers) and self.takers[0] is not None

    def is_complete(self) -> bool:
        return len(self.written) == 2

    def is_over(self) -> bool:
        """All is written, or never will be; and nothing is being read."""
        return (self.is_left_off or self.is_complete()) and (not self.is_reading or bool(self.heard))

    def forget(self) -> None:
        """Who had it, once all was sent: a busy worker is not to keep a future alive that its user has dropped."""
        self.takers[:] = [None]  # (whoever comes now finds that he is not the first)

    # ------------------------------------------------- who hears the answer

    def hear(self, future: SafeFuture, limit_s: float) -> bool:
        """On the thread of who has it: wait for the answer; False: it is to be waited for as always.

        The future is done then, and the worker may be lent to the next caller.  Raises nothing of its own.
        """
        listen, function, done = self._loans.listen, future._kind.function, None
        assert listen is not None
        assert function is not None
        if not self.is_of(future) or not self.is_complete():
            return False
        if self.is_called_in or self.is_heard:
            return False
        self.is_heard, self.is_left = True, False
        try:
            listen(self.of.answers, selecting.NOTHING)
            self._wait(limit_s)
            reading = map(_os.read, self.may_read, (_wire.READ_BYTES,))
            self.is_reading = True
            self.heard.extend(reading)
            told = _wire.result_in(b"".join(self.heard), self.number)
            if told is not None:
                self._settle(future, *told)
                done = told
        except (OSError, ValueError, TypeError, EOFError, KeyError):
            pass  # it was rung for, or is late, or a task has written there: the watchdog finds out
        finally:
            self.is_left, self.is_reading = True, False
            if not self.is_called_in:
                self._loans.listen_to(self.of.answers)
            if done is not None:
                _unpack.is_known(self.of.known, function.number)
                if not self.is_called_in:  # from here on it is one step
                    self.count += 1
                    self.total_s += done[1]
                    self.number += 1
                    self.is_heard = self.is_left_off = False
                    self.heard, self.written = [], []
                    self.takers = []
        return done is not None

    def _wait(self, limit_s: float) -> None:
        poll = self._poll
        if poll is None:
            assert self._loans.bell is not None
            poll = select.poll()
            for fd in (self.of.answers, self._loans.bell.fileno()):
                poll.register(fd, select.POLLIN)
            self._poll = poll
        # Who sleeps must be woken, and so must the core it sleeps on: the answer of a short task is there before that.
        are_short = self.total_s <= self.count * AWAKE_S
        end = monotonic() + (AWAKE_S if are_short else 0.0)
        while not poll.poll(0):
            if monotonic() >= end:
                poll.poll(limit_s * 1000)
                return

    def _settle(self, future: SafeFuture, kind: int, run_s: float, body: bytes) -> None:
        future._pid = self.of.pid
        if kind == PLAIN:
            future._result = _wire.plain_in(body)
        else:
            future.keep_result(body)
        future.answered()
