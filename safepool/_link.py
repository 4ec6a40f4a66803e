"""One worker as the watchdog sees it: channel, tickets, process.  Decides nothing; only its start may block."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from . import _os, _wire
from ._launch import Launcher
from ._payload import Payload
from ._wire import Frame
from ._worker import Setup

if TYPE_CHECKING:
    from ._packets import Left

MOST_BUFFERS = 64  # in one write; the system allows 1024
SMALL_BYTES = 1 << 14  # smaller calls are written together
MOST_TICKET_BYTES = 1 << 16


class Answer(NamedTuple):
    """What a worker sent for one task."""

    task: int
    pid: int
    ok: bool
    text: bytes
    body: bytes


class Heard(NamedTuple):
    """What one reading of a channel brought, in order within each field."""

    booted: bool
    ready: bool
    unfit: str | None
    answers: list[Answer]
    begun: int | None  # the task that runs now, if its start was told
    run_s: float  # mean run time of the answered tasks, in seconds
    left: list[tuple[int, list[Left]]]  # what tasks left behind
    lost: str | None  # why the channel cannot be read any more; "": it is closed


class Link:
    """The parent's side of one worker.

    Tasks are numbered per worker in the order they are sent; a ticket with that number is written
    before the call.  Tickets that nobody has drawn can be read back here: the kernel gives each to
    one reader only, so what is taken back never runs and what is not has begun.
    """

    def __init__(self, worker: int, launcher: Launcher, setup: Setup, *, take_back: bool) -> None:
        """Start the worker.  Raises what the launcher raises, and then leaves nothing behind."""
        self.worker = worker
        self._number = 0
        self._sent: dict[int, int] = {}  # number -> task, not answered, in order
        # (number, bytes to go); 0: not a call, or several small ones.  A big call comes in parts.
        self._out: deque[tuple[int, memoryview]] = deque()
        self._head_is_partial = False  # some of its frame is written
        self._begun = 0  # the last number whose start was told
        self.is_deaf = False  # its channel is not read any more
        self.wanted = 0  # what the selector is asked for
        self._reader = _wire.FrameReader()
        self._open: list[socket.socket] = []
        theirs: list[socket.socket] = []
        try:
            self._channel, channel = _os.open_channel()
            self._open.append(self._channel)
            theirs.append(channel)
            self._channel.setblocking(False)
            if take_back:
                self._tickets, tickets = _os.open_channel()
                self._open.append(self._tickets)
                theirs.append(tickets)
                self._tickets.setblocking(False)
            self.process = launcher.launch(channel, tickets if take_back else None, setup)
        except BaseException:
            self._close_sockets()
            for end in theirs:
                end.close()
            raise
        channel.close()
        # The worker's end of the tickets stays open here too: that is where they are taken back.
        self._undrawn = _os.keep(tickets) if take_back else None
        if self._undrawn is not None:
            self._open.append(self._undrawn)
        if self.process.greeting:
            self._out.append((0, memoryview(self.process.greeting)))

    def fileno(self) -> int:
        return self._channel.fileno()

    # ----------------------------------------------------------------- out

    def send(self, calls: Iterable[tuple[int, Payload]]) -> None:
        """Queue these (task, payload) pairs, tickets first; ``flush`` writes them."""
        number = first = self._number + 1
        small: list[bytes] = []
        for task, payload in calls:
            self._sent[number] = task
            parts = _wire.encode_call(number, payload.data, payload.function)
            if payload.size_bytes() < SMALL_BYTES:
                small += parts
            else:
                self._put(b"".join(small))
                small.clear()
                for part in parts:
                    self._put(part, number)
            number += 1
        self._put(b"".join(small))
        self._number = number - 1
        if self._undrawn is not None:
            self._tickets.sendall(_wire.encode_tickets(first, self._number))  # few and short: they always fit

    def _put(self, data: bytes, number: int = 0) -> None:
        if data:
            self._out.append((number, memoryview(data)))

    def ask_exit(self) -> None:
        self._out.append((0, memoryview(_wire.encode(Frame(_wire.EXIT)))))

    def flush(self) -> bool:
        """Write what goes without waiting.  True: nothing is left to write."""
        while self._out:
            try:
                sent = _os.send_some(self._channel, [data for _, data in islice(self._out, MOST_BUFFERS)])
            except (BlockingIOError, InterruptedError):
                return False
            except OSError:
                self._out.clear()  # nobody reads any more; the death of the worker will tell
                self._head_is_partial = False
                return True
            while sent:
                number, data = self._out[0]
                if sent < len(data):
                    self._out[0] = (number, data[sent:])
                    self._head_is_partial = True
                    break
                sent -= len(data)
                self._out.popleft()
                self._head_is_partial = number > 0 and bool(self._out) and self._out[0][0] == number
        return True

    # ------------------------------------------------------------------ in

    def take_back(self) -> tuple[int, ...]:
        """The tasks whose tickets nobody drew; none of them will begin at this worker."""
        if self._undrawn is None:
            return ()
        try:
            data = self._undrawn.recv(MOST_TICKET_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return ()
        numbers = set(_wire.tickets_in(data))
        # What need not be written any more is not, if it is big; small calls go out, and the worker
        # passes over them for want of a ticket.  A frame that is half written must go out whole, or
        # the next one would not be understood.
        dropped = numbers - {self._out[0][0]} if self._head_is_partial else numbers
        self._out = deque(out for out in self._out if out[0] not in dropped)
        return tuple(self._sent.pop(number) for number in sorted(numbers))

    def unbegun(self) -> tuple[int, ...]:
        """The tasks that a dead worker had not begun.  Where tickets are missing: as far as it told."""
        if self._undrawn is not None:
            return self.take_back()
        return tuple(task for number, task in self._sent.items() if number > self._begun)

    def unanswered(self) -> tuple[int, ...]:
        """The tasks that were sent and have neither been answered nor taken back."""
        return tuple(self._sent.values())

    def hear(self, most_bytes: int = 1 << 22) -> Heard:
        """Read what has come, without waiting, but for fairness not much more than ``most_bytes``."""
        lost = None
        try:
            while most_bytes > 0:
                got = self._reader.read_from(self._channel)
                if not got:
                    lost = ""
                    break
                most_bytes -= got
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            lost = f"its channel broke: {error}"
        except MemoryError:
            lost = self._give_up_reading()
        return self._understand(lost)

    def _give_up_reading(self) -> str:
        self._reader = _wire.FrameReader()
        return "what it sent is too big for the memory of this process"

    def _understand(self, lost: str | None) -> Heard:
        booted = ready = False
        unfit = None
        answers: list[Answer] = []
        left: list[tuple[int, list[Left]]] = []
        begun = 0
        run_s = 0.0
        pid, pop, new = self.process.pid, self._sent.pop, tuple.__new__
        try:
            for kind, number, begins, seconds, text, body in self._reader:
                if kind in (_wire.RETURNED, _wire.RAISED):
                    answers.append(new(Answer, (pop(number), pid, kind == _wire.RETURNED, text, body)))
                    run_s += seconds
                    begun = begins
                elif kind == _wire.BEGAN:
                    begun = number
                elif kind == _wire.LEFT:
                    left.append((self._sent[number], _wire.leftovers_in(body)))
                elif kind == _wire.BOOTED:
                    booted = True
                elif kind == _wire.READY:
                    ready = True
                elif kind == _wire.UNFIT:
                    unfit = text.decode(errors="replace")
        except (_wire.ProtocolError, KeyError, ValueError, EOFError) as error:
            lost = f"it does not speak our protocol: {error!r}"
        except MemoryError:
            lost = self._give_up_reading()
        self._begun = begun or self._begun
        mean_s = run_s / len(answers) if answers else 0.0
        return Heard(booted, ready, unfit, answers, self._sent.get(begun), mean_s, left, lost)

    def _close_sockets(self) -> None:
        for end in self._open:
            _os.close(end)
        self._open.clear()

    def close(self) -> None:
        """Give back every descriptor."""
        self._close_sockets()
        self.process.release()
        self._out.clear()

    def __repr__(self) -> str:
        return (
            f"<Link to worker {self.worker} pid {self.process.pid}: {len(self._sent)} sent, {len(self._out)} to write>"
        )
