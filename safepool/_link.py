"""One worker as the watchdog sees it: channel, tickets, process.  Decides nothing; only its start may block."""

from __future__ import annotations

import errno
import itertools
import socket
import struct
from collections import deque
from collections.abc import Iterable
from itertools import islice
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _bulk, _os, _unpack, _wire  # (later, no descriptor may be left to load them by)
from ._batches import SLOW_S
from ._launch import Launcher
from ._loans import Borrowed, Loan, Loans
from ._os import memory
from ._wire import BIG, BIG_PART, NEXT, PART, PLAIN, RAISED, RETURNED, Frame
from ._worker import Setup

if TYPE_CHECKING:
    from ._packets import Left
    from ._payload import Function, Payload
    from ._together import Batch
    from .future import Kind, SafeFuture

MOST_BUFFERS = 64  # in one write; the system allows 1024
SMALL_BYTES = 1 << 14  # smaller calls are written together
MOST_TICKET_BYTES = 1 << 16
TICKETS_AT_ONCE = 500  # a page of them, as much as is written to a pipe in one piece
ANSWERS = (PLAIN, RETURNED, RAISED, BIG)
PARTS = (PART, BIG_PART)
GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF)  # what a write says when nobody reads
SURE_S = 2 * SLOW_S  # one and the same task of a batch was seen for so long: see Scenario 2 of ``_batches``
REST_LIMIT_S = 0.02  # for that, if somebody wants the rest of a batch
REST_AGAIN_S = 0.0005


class Answer(NamedTuple):
    """What a worker sent for one task, to be unpickled by whoever asks; ``is_plain``: it is marshalled.

    ``body``: or, if it is big, something with ``load()``.
    """

    ok: bool
    text: bytes
    body: Any
    is_plain: bool = False


class Heard(NamedTuple):
    """What one reading brought, in order within each field.  The answers are with their futures."""

    answered: list[int]  # tasks
    raised: list[int]  # those of them that did
    begun: int | None  # the task that runs now, if its start was told
    run_s: float  # mean run time of the answered tasks, in seconds
    left: list[tuple[int, list[Left]]]  # what tasks left behind
    returned: list[int]  # tasks of a batch that the worker will not begin: it had no ticket for the rest
    lost: str | None  # why nothing can be read any more; "": it is closed
    booted: bool = False
    ready: bool = False
    unfit: str | None = None


class Seen(NamedTuple):
    """What a look at a worker brought that it has not told."""

    ended: list[int]  # tasks
    raised: list[int]  # those of them that did
    begun: int | None  # the task that runs


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
        self._sent: dict[int, Any] = {}  # futures, and batches, by number: not answered, in order
        self.known: set[int] = set()  # functions that the worker has
        # (number, bytes to go); 0: not a call, or several small ones.  A big call comes in parts.
        self._out: deque[tuple[int, memoryview]] = deque()
        self._head_is_partial = False  # some of its frame is written
        self._big: dict[int, Payload] = {}  # of the calls in ``_sent``: what their blocks are needed for
        self._to_pass: dict[int, int] = {}  # by number: the descriptor to send with the first bytes of that call
        self._loan: Loan | None = None  # the last one
        self._is_stopped = False  # it had ended one task of a batch and not begun the next when it died
        self._begun = 0  # the last number whose start was told
        self.is_deaf = False  # it is not listened to any more
        self.wanted = 0  # what the selector is asked for
        self._reader = _wire.FrameReader()
        self._open: list[socket.socket | _os.End] = []
        self._tickets: _os.End | None = None
        self._undrawn: _os.End | None = None
        self._board: _os.End | None = None  # from the first batch on
        self._token: _os.End | None = None  # whose is the rest of the batch in hand?
        self._seen: tuple[_wire.Where | None, float] = None, 0.0  # how far it was with a batch, and since when
        self._glanced = 0  # the number of that batch
        self._held = 0  # the last token that was taken
        self._wanted = 0  # of this batch the worker was told that its rest is wanted
        theirs: list[socket.socket | _os.End] = []
        try:
            self._channel, channel = _os.open_channel()
            self._open.append(self._channel)
            theirs.append(channel)
            self._channel.setblocking(False)
            self._answers, answers = _os.open_answers()
            self._open.append(self._answers)
            theirs.append(answers)
            if take_back:
                self._tickets, self._undrawn = _os.open_tickets()
                self._open += self._tickets, self._undrawn
            self.process = launcher.launch(_os.Ends(channel, answers, self._undrawn), setup)
        except BaseException:
            self._close_all()
            for end in theirs:
                end.close()
            raise
        for end in theirs:
            end.close()
        if self._undrawn is not None:
            # The worker's end of the tickets stays open here too: that is where they are taken back.
            _os.keep(self._undrawn)
        if self.process.greeting:
            self._out.append((0, memoryview(self.process.greeting)))

    def fileno(self) -> int:
        """Of what is written to."""
        return self._channel.fileno()

    def takes_batches(self, count: int, least: int) -> bool:
        """One of ``count`` tasks, or (the first) of ``least``.

        False: descriptors are short, or it is not Linux; then tasks go one at a time.
        """
        if self._tickets is None or "board" not in _os.CAPABILITIES:
            return False
        if self._token is None:
            if count < least:
                return False
            try:
                if self._board is None:  # (else it is there since an attempt at which the token was not to be had)
                    self._board = _os.open_board(_wire.Board.BYTES)
                    self._open.append(self._board)
                self._token = _os.open_token()
                self._open.append(self._token)
            except OSError:
                return False
            for number, kind, end in ((-1, _wire.BOARD, self._board), (-2, _wire.TOKEN, self._token)):
                self._to_pass[number] = end.fileno()
                self._put(_wire.encode(Frame(kind)), number)
        return True

    def answers_fileno(self) -> int:
        return self._answers.fileno()

    # ----------------------------------------------------------------- out

    def send(self, futures: Iterable[SafeFuture | Batch], *, always_told: bool) -> None:
        """Queue the calls of these, tickets first; ``flush`` writes them."""
        first = self._number + 1
        small: list[bytes | bytearray] = []
        run: list[tuple[object, ...]] = []  # plain calls of one kind, which travel together
        kind: Kind | None = None
        for future in futures:
            payload: Any = future._payload
            is_plain = type(payload) is tuple
            if run and kind is not None and (future._kind is not kind or not is_plain):
                small.append(self._encode_run(run, kind, always_told))
                run = []
            self._number += 1
            self._sent[self._number] = future
            kind = future._kind
            if is_plain:
                run.append(payload)
            elif type(payload) is list:
                function = kind.function
                assert function is not None
                data = _wire.encode_batch(self._number, function.number, always_told, payload, future.how)
                small.append(self._introduce(function) + data)
            else:
                self._send_one(payload, small, told=always_told or kind.options.timeout is not None)
        if run and kind is not None:
            small.append(self._encode_run(run, kind, always_told))
        self._put(b"".join(small))
        if self._tickets is not None:
            for start in range(first, self._number + 1, TICKETS_AT_ONCE):
                end = min(start + TICKETS_AT_ONCE - 1, self._number)
                self._tickets.write(_wire.encode_tickets(start, end))  # few and short: they always fit

    def _encode_run(self, run: list[tuple[object, ...]], kind: Kind, always_told: bool) -> bytes:
        function, told = kind.function, always_told or kind.options.timeout is not None
        assert function is not None
        return self._introduce(function) + _wire.encode_calls(self._number - len(run) + 1, function.number, told, run)

    def _introduce(self, function: Function | None) -> bytes:
        """To the worker, unless it knows that function."""
        if function is None or _unpack.is_known(self.known, function.number):
            return b""
        return _wire.encode(Frame(_wire.FUNCTION, function.number, body=function.data))

    def _send_one(self, payload: Payload, small: list[bytes | bytearray], *, told: bool) -> None:
        small.append(self._introduce(payload.function))
        lent = None
        if payload.cargo is not None:
            self._big[self._number] = payload
            lent = payload.cargo.lend()
        if lent is not None:
            self._put(b"".join(small))
            small.clear()
            message, fd = lent
            self._to_pass[self._number] = fd  # (open as long as ``_big`` knows it)
            body = b"".join(payload.parts(told=told, message=message))
            self._put(_wire.encode(Frame(_wire.BIG_CALL, self._number, body=body)), self._number)
            return
        parts = payload.parts(told=told)
        header = _wire.header(_wire.CALL, self._number, sum(map(len, parts)))
        if payload.size_bytes() < SMALL_BYTES:
            small += header, *parts
            return
        self._put(b"".join(small))
        small.clear()
        for part in (header, *parts):
            self._put(part, self._number)

    def has_to_write(self) -> bool:
        return bool(self._out)

    def _put(self, data: bytes | bytearray, number: int = 0) -> None:
        if data:
            self._out.append((number, memoryview(data)))

    def lend(self, loans: Loans) -> Loan | None:
        """To callers, while the watchdog sleeps; None: it cannot be."""
        if self._tickets is None or self._out or self._sent or not self._reader.is_empty():
            return None
        tickets, channel = self._tickets.fileno(), self._channel.fileno()
        of = Borrowed(self.worker, self.process.pid, self.known, tickets, channel, self._answers.fileno())
        self._loan = Loan(of, self._number + 1, loans)
        return self._loan

    def called_in(self, loan: Loan) -> None:
        """What callers had of it, up to the one who has it now."""
        self._number = loan.number - 1

    def sent_directly(self, loan: Loan, future: SafeFuture) -> None:
        """By a caller: as if it had been sent, and what it has heard were read, here."""
        self._number = loan.number
        self._sent[loan.number] = future
        assert future._kind.function is not None
        _unpack.is_known(self.known, future._kind.function.number)
        for data in loan.heard:
            self._reader.feed(data)

    def ask_exit(self) -> None:
        self._out.append((0, memoryview(_wire.encode(Frame(_wire.EXIT)))))

    def flush(self) -> bool:
        """Write what goes without waiting.  True: nothing is left to write."""
        while self._out:
            try:
                if self._to_pass:
                    sent = self._write_some()
                else:
                    sent = _os.send_some(self._channel, [data for _, data in islice(self._out, MOST_BUFFERS)])
            except (BlockingIOError, InterruptedError):
                return False
            except OSError:
                self._out.clear()  # nobody reads any more; the death of the worker will tell
                self._to_pass.clear()
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

    def _write_some(self) -> int:
        """As ``send_some``, where descriptors are to be passed: each with the first bytes of its own frame."""
        number, data = self._out[0]
        fd = self._to_pass.get(number)
        if fd is None:
            before = itertools.takewhile(lambda out: out[0] not in self._to_pass, islice(self._out, MOST_BUFFERS))
            return _os.send_some(self._channel, [data for _, data in before])
        sent = 0
        try:
            sent = memory.send_with(self._channel, data, fd)
        except (BlockingIOError, InterruptedError):
            raise
        except OSError as error:
            if error.errno in GONE:
                raise
            # Scenario 2: too many descriptors of this user are on their way to somebody (ETOOMANYREFS).
            self._out.popleft()
            if number < 0:
                del self._to_pass[number]
                return 0  # it is done without
            self._out.extendleft((number, memoryview(part)) for part in reversed(self._inlined(number)))
        del self._to_pass[number]
        return sent

    def _inlined(self, number: int) -> list[bytes | bytearray]:
        """A big call as bytes."""
        parts = self._big[number].parts(told=False)
        return [_wire.header(_wire.CALL, number, sum(map(len, parts))), *parts]

    # ------------------------------------------------------------------ in

    def take_back(self) -> tuple[int, ...]:
        """The tasks whose tickets nobody drew; none of them will begin at this worker."""
        if self._undrawn is None:
            return ()
        data = bytearray(MOST_TICKET_BYTES)
        try:
            del data[_os.draw(self._undrawn, [data]) :]
        except BlockingIOError:
            return ()
        numbers = set(_wire.tickets_in(data))
        # What need not be written any more is not, if it is big; small calls go out, and the worker
        # passes over them for want of a ticket.  A frame that is half written must go out whole, or
        # the next one would not be understood.
        dropped = numbers - {self._out[0][0]} if self._head_is_partial else numbers
        self._out = deque(out for out in self._out if out[0] not in dropped)
        for number in numbers if self._big else ():
            self._big.pop(number, None)
            self._to_pass.pop(number, None)  # (what is partly written has passed it)
        taken = [self._sent.pop(number).tasks() for number in sorted(numbers)]
        return tuple(itertools.chain.from_iterable(taken))

    def take_rest(self, limit_s: float = REST_LIMIT_S) -> tuple[int, ...]:
        """Of the batch in hand: what comes after the task that runs, and will not begin at this worker.

        Nothing, if the batch ends within ``limit_s``, or has not been seen at one and the same task for long enough;
        then the worker stops after that task, and returns the rest.
        """
        end = monotonic() + limit_s
        while True:
            now = monotonic()  # before the reading: until then it was seen as it is read
            where = self._where_in_batch()
            if where is None:
                return ()
            batch: Batch = self._sent[where.number]
            if not batch.has_more(where.ended - (not where.runs)):
                return ()
            rest: tuple[int, ...] = ()
            if self._holds_token(where):
                if not where.runs and now > self._seen[1]:  # read twice: a reading is not one step
                    rest = batch.cut(where.ended - 1)
                elif now - self._seen[1] >= SURE_S:
                    rest = batch.cut(where.ended)
            if rest or now >= end:
                return rest
            sleep(REST_AGAIN_S)

    def _holds_token(self, where: _wire.Where) -> bool:
        """Take it, for this batch, and have the worker ask for it after the task that runs.

        What is taken is kept: it may be that of a later task than the one that was seen (or of an earlier one, which
        the worker asks for in vain, and returns the rest).
        """
        if self._token is None or self._board is None:
            return False
        self._held = _os.take_token(self._token) or self._held
        if self._wanted != where.number:
            self._wanted = where.number
            told = memoryview(_wire.Board.WANTED.pack(where.number))
            memory.write_at(self._board.fileno(), told, _wire.Board.WANTED_AT)
        return self._held == _wire.token_of(where.number, where.asks)

    def _where_in_batch(self) -> _wire.Where | None:
        """How far it is with the batch in hand; None: it is in none.  Notes since when that is so."""
        where = self._where()
        batch = None if where is None else self._sent.get(where.number)
        if where is None or batch is None or not batch.is_batch or batch.parts != where.parts:
            self._seen = None, 0.0
            return None
        if self._seen[0] != where:
            self._seen = where, monotonic()
        return where

    def is_late(self) -> bool:
        """Is it in the midst of the same batch as when this was last asked?"""
        where, before = self._where_in_batch(), self._glanced
        self._glanced = 0 if where is None else where.number
        return where is not None and bool(where.runs) and where.number == before

    def has_batch(self) -> bool:
        """Next to be answered is one, of which more is to come than the task that runs."""
        head = next(iter(self._sent.values()), None)
        return head is not None and head.is_batch and bool(head.is_many())

    def look(self) -> Seen:
        """What is not told of a batch before its last task has ended; and which task has begun and is not answered."""
        batch, ended, runs = self._batch_in_hand()
        if batch is None:
            return Seen([], [], self._begun_by_ticket())
        raised: list[int] = []
        early = self._taken_early(batch, ended, raised)
        return Seen(early, raised, batch.running(len(ended)) if runs else None)

    def salvage(self) -> Seen:
        """What a dead worker had finished of a batch and not sent home."""
        batch, ended, runs = self._batch_in_hand()
        self._is_stopped = (batch is not None and not runs) or self._has_told_all()
        raised: list[int] = []
        return Seen([] if batch is None else self._taken_early(batch, ended, raised), raised, None)

    def _has_told_all(self) -> bool:
        """The part that it sent last was its last: it has begun nothing since."""
        where = self._where()
        number, batch = next(iter(self._sent.items()), (0, None))
        if where is None or batch is None or not batch.is_batch:
            return False
        return not where.runs and where.number == number and where.parts == batch.parts - 1

    def _taken_early(self, batch: Batch, ended: list[Any], raised: list[int]) -> list[int]:
        try:
            return list(batch.take_early(ended, self.process.pid, raised))
        except (ValueError, TypeError, _wire.ProtocolError):
            return []  # a task has written on the board

    def _batch_in_hand(self) -> tuple[Batch | None, list[Any], bool]:
        """If it is the next to be answered: what those of its tasks came to that are not told; and does one run?"""
        number, batch = next(iter(self._sent.items()), (0, None))
        if self._board is None or batch is None or not batch.is_batch:
            return None, [], False
        try:
            told = self._read_board().finished(number, batch.parts)
        except (ValueError, EOFError, TypeError, struct.error, OSError):  # a task has written there
            told = None
        return (None, [], False) if told is None else (batch, *told)

    def _where(self) -> _wire.Where | None:
        try:
            return None if self._board is None else self._read_board().where()
        except (struct.error, OSError):
            return None

    def _read_board(self) -> _wire.Board:
        assert self._board is not None
        fd = self._board.fileno()
        return _wire.Board(lambda size, at: _os.read_at(fd, size, at))

    def unbegun(self) -> tuple[int, ...]:
        """The tasks that a dead worker had not begun.  Where tickets are missing: as far as it told."""
        if self._undrawn is not None:
            taken = self.take_back()
            # Of what it had drawn the first without an answer has begun; nothing after it can have.
            rest = itertools.chain.from_iterable(future.tasks() for future in self._sent.values())
            has_begun = not self._is_stopped and not self._is_half_sent()
            return (*itertools.islice(rest, has_begun, None), *taken)
        return tuple(future._task for number, future in self._sent.items() if number > self._begun)

    def _is_half_sent(self) -> bool:
        """A caller that had this worker on loan has not sent all of its task."""
        loan = self._loan
        if loan is None or not loan.is_taken() or loan.number not in self._sent:
            return False
        return not loan.is_complete()

    def _begun_by_ticket(self) -> int | None:
        if self._undrawn is None:
            return None
        undrawn = _os.unread_bytes(self._undrawn.fileno()) // _wire.TICKET_BYTES
        drawn = islice(self._sent.values(), 0, max(0, len(self._sent) - undrawn))
        return next((tasks[0] for future in drawn if (tasks := future.tasks())), None)

    def unanswered(self) -> tuple[SafeFuture | Batch, ...]:
        """What was sent and has neither been answered nor taken back."""
        return tuple(self._sent.values())

    def hear(self, most_bytes: int = 1 << 22, *, to_the_end: bool = False) -> Heard:
        """Read what has come, without waiting, but for fairness not much more than ``most_bytes``."""
        lost = None
        try:
            while most_bytes > 0 or to_the_end:
                got = self._reader.read_from(self._answers.read_into)
                if not got:
                    lost = ""
                    break
                if got < _wire.READ_BYTES and not to_the_end:
                    break  # there was no more
                most_bytes -= got
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            lost = f"the pipe of its answers broke: {error}"
        except MemoryError:
            lost = self._give_up_reading()
        heard = self._understand(lost)
        if self._big:
            self._big = {number: payload for number, payload in self._big.items() if number in self._sent}
        return heard

    def _give_up_reading(self) -> str:
        self._reader = _wire.FrameReader()
        return "what it sent is too big for the memory of this process"

    def _understand(self, lost: str | None) -> Heard:
        life: dict[str, Any] = {}  # what it says of itself
        answered: list[int] = []
        raised: list[int] = []
        left: list[tuple[int, list[Left]]] = []
        returned: list[int] = []
        begun: int | None = 0  # its number, or: the next of those that are not answered
        total_s, early = 0.0, 0  # so many were known before
        pid, pop, plain_in = self.process.pid, self._sent.pop, _wire.plain_in
        try:
            for kind, number, run_s, body in self._reader.frames():
                what = kind & ~NEXT
                if what in ANSWERS or what in PARTS:
                    future = pop(number) if what not in PARTS else self._sent[number]
                    if future.is_batch:
                        outcomes = self._outcomes(what, body)
                        early += len(outcomes)
                        told = future.take(outcomes, pid, raised)
                        early -= len(told)
                        answered += told
                        returned.extend(future.tasks() if what not in PARTS else ())
                        total_s += run_s
                        begun = None if kind & NEXT else 0
                        continue
                    future._pid = pid
                    if what == PLAIN and not future._kind.is_judged:
                        future._result = plain_in(body)
                    else:
                        self._keep(future, what, body)
                    answered.append(future._task)
                    if what == RAISED:
                        raised.append(future._task)
                    total_s += run_s
                    begun = None if kind & NEXT else 0
                elif what == _wire.BEGAN:
                    begun = number
                else:
                    life.update(self._life_in(what, number, body, left))
            if begun is None:
                begun = next(iter(self._sent))
            if self._reader.nonsense:
                raise _wire.ProtocolError(self._reader.nonsense)
        except (_wire.ProtocolError, KeyError, ValueError, TypeError, EOFError, StopIteration) as error:
            lost = f"it does not speak our protocol: {error!r}"
        except MemoryError:
            lost = self._give_up_reading()
        self._begun = begun or self._begun
        head = self._sent.get(begun or 0)
        mean_s = total_s / (len(answered) + early) if answered else 0.0
        return Heard(answered, raised, None if head is None else head._task, mean_s, left, returned, lost, **life)

    def _keep(self, future: SafeFuture, what: int, body: bytes) -> None:
        text = b""
        if future.done():
            return  # its pool was ended: what the user was told stands
        if what == RAISED:
            text, body = _wire.text_and_body(body)
        body = body if what != BIG else self._received(body)
        future.keep(Answer(what != RAISED, text, body, what == PLAIN))

    def _outcomes(self, what: int, body: bytes) -> list[Any]:
        outcomes: list[Any] = _wire.plain_in(body)
        if what == BIG_PART:
            outcomes[-1] = True, self._received(outcomes[-1][1])
        return outcomes

    def _received(self, body: bytes) -> Any:
        """Something big that was returned.  Raises ``ProtocolError``, and ``MemoryError``."""
        try:
            return _bulk.receive(self._channel, body)
        except OSError as error:
            raise _wire.ProtocolError(f"no descriptor came with an answer: {error}") from error

    def _life_in(self, what: int, number: int, body: bytes, left: list[tuple[int, list[Left]]]) -> dict[str, Any]:
        """What it says of itself, as of ``Heard``; or what a task left; or it asks for a call again."""
        if what == _wire.LEFT:
            at, some = _wire.leftovers_in(body)
            left.append((self._sent[number].nth(at), some))
        elif what == _wire.AGAIN:
            for part in self._inlined(number):
                self._put(part, number)
        if what == _wire.UNFIT:
            return {"unfit": body.decode(errors="replace")}
        return {_wire.BOOTED: {"booted": True}, _wire.READY: {"ready": True}}.get(what, {})

    def _close_all(self) -> None:
        """But what a caller is just writing to: another thing might have its number by then."""
        loan = self._loan
        if loan is not None and loan.is_taken():
            loan.to_close = [_os.disown(end) for end in self._open]
            if not loan.is_over():
                self._open.clear()
        for end in self._open:
            _os.close(end)
        self._open.clear()

    def close(self) -> None:
        """Give back every descriptor."""
        self._close_all()
        self.process.release()
        self._out.clear()
        self._to_pass.clear()
        self._big.clear()

    def __repr__(self) -> str:
        return (
            f"<Link to worker {self.worker} pid {self.process.pid}: {len(self._sent)} sent, {len(self._out)} to write>"
        )
