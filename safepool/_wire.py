"""Frames bytes to and from one worker: calls over its channel, answers over a pipe of its own.

A frame is a header of fixed layout, which always loads, and a body.  A body that cannot be loaded spoils nothing but
itself.  What consists of plain values (see ``_unpack.PLAIN``) is marshalled: many small calls travel as one frame, and
their answers cost the least there is.
"""

from __future__ import annotations

import marshal
from _struct import Struct, pack  # not struct, and no socket: every worker would wait for those
from io import BytesIO

from ._shapes import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ._packets import Left

# To the worker: a function, for the calls that name it; calls of plain values, each with a ticket or all with one; any
# one call; the request to exit; what every worker is set up with; a call whose arguments lie in the memory behind the
# descriptor that comes with the frame (the n-th descriptor, with the n-th such frame).
FUNCTION, CALLS, BATCH, CALL, EXIT, SETUP, BIG_CALL = 1, 2, 3, 4, 5, 6, 7
# With a descriptor, too: what is needed for batches.
BOARD, TOKEN = 8, 9
# From the worker: alive; ready; initializer failed; a task began; it left processes; what the first tasks of a batch
# came to; a task returned something plain (or it is what the rest of a batch came to), something pickled; it raised.
# Of the last three, with ``NEXT`` added: and the next task began in the same breath.
BOOTED, READY, UNFIT, BEGAN, LEFT, PART, PLAIN, RETURNED, RAISED = 11, 12, 13, 14, 15, 16, 17, 18, 19
# It returned something big, whose descriptor came back through the channel (``NEXT`` goes with this, too); so did the
# last of a part of a batch; of a call that was begun the descriptor was lost: it must come as bytes.
BIG, BIG_PART, AGAIN = 20, 21, 22
NEXT = 64
_ANSWERS = {kind + also for kind in (PLAIN, RETURNED, RAISED, BIG) for also in (0, NEXT)}
_KINDS = frozenset(
    _ANSWERS
    | {FUNCTION, CALLS, BATCH, CALL, EXIT, SETUP, BIG_CALL, BOARD, TOKEN}
    | {BOOTED, READY, UNFIT, BEGAN, LEFT, PART, BIG_PART, AGAIN}
)

# Whatever else is written there by mistake, one byte is enough, is found out at the next header.
MAGIC = 0xF05AFE00
# MAGIC + kind; number (of a call at this worker, of a function); run time in seconds; length of the body.
_HEADER = Struct("<IIfQ")
HEADER_BYTES = _HEADER.size
_pack, _unpack_from = _HEADER.pack, _HEADER.unpack_from
VERSION = 2  # of marshal: nothing refers to what came before, so lists can be joined
_TEXT = Struct("<I")
_TICKET = Struct("<Q")
TICKET_BYTES = _TICKET.size
MOST_TEXT = 1 << 20
READ_BYTES = 1 << 16


class ProtocolError(Exception):
    """The far end sent something that is not a frame."""


class Frame(NamedTuple):
    kind: int
    number: int = 0
    run_s: float = 0.0
    body: bytes = b""


def encode(frame: Frame) -> bytes:
    kind, number, run_s, body = frame
    return _pack(MAGIC + kind, number, run_s, len(body)) + body


def header(kind: int, number: int, length: int) -> bytes:
    """For a body that is sent in parts, so that it is not copied."""
    return _pack(MAGIC + kind, number, 0.0, length)


def encode_calls(first: int, function: int, told: bool, calls: list[tuple[Any, ...]]) -> bytes:
    """Calls of one function, of plain arguments, numbered from ``first`` on; ``told``: their begins are to be told."""
    body = marshal.dumps((function, told, calls))
    return _pack(MAGIC + CALLS, first, 0.0, len(body)) + body


def encode_batch(number: int, function: int, told: bool, calls: list[Any], how: int) -> bytes:
    """The same, all under one number.  ``how``: flags of ``_unpack``, what each of ``calls`` is."""
    body = marshal.dumps((function, told, calls, how))
    return _pack(MAGIC + BATCH, number, 0.0, len(body)) + body


def calls_in(body: bytes) -> tuple[int, bool, list[tuple[Any, ...]]]:
    calls: tuple[int, bool, list[tuple[Any, ...]]] = marshal.loads(body)
    return calls


def encode_answer(kind: int, number: int, run_s: float, body: bytes) -> bytes:
    return _pack(MAGIC + kind, number, run_s, len(body)) + body


def result_in(data: bytes, number: int) -> tuple[int, float, bytes] | None:
    """Kind, run time and body, if ``data`` is exactly that this call returned; None: it is more, or less, or else."""
    if len(data) < HEADER_BYTES:
        return None
    kind, found, run_s, length = _unpack_from(data, 0)
    kind -= MAGIC
    if kind not in (PLAIN, RETURNED) or found != number or length != len(data) - HEADER_BYTES:
        return None
    return kind, run_s, data[HEADER_BYTES:]


def batch_in(body: bytes) -> tuple[int, bool, list[Any], int]:
    batch: tuple[int, bool, list[Any], int] = marshal.loads(body)
    return batch


def plain(value: Any) -> bytes:
    """A plain value, or several."""
    return marshal.dumps(value, VERSION)


def plain_list(told: list[bytes]) -> bytes:
    """What ``plain`` makes of a list, from what it has made of each of them."""
    return b"[" + len(told).to_bytes(4, "little") + b"".join(told)


def plain_in(body: bytes) -> Any:
    return marshal.loads(body)


def with_text(text: bytes, body: bytes) -> bytes:
    """A body with words for people before it."""
    return _TEXT.pack(len(text)) + text + body


def text_and_body(data: bytes) -> tuple[bytes, bytes]:
    """Raises ``ProtocolError``."""
    length = _TEXT.unpack_from(data)[0] if len(data) >= _TEXT.size else MOST_TEXT + 1
    if length > MOST_TEXT:
        raise ProtocolError("its text is too long")
    return data[_TEXT.size : _TEXT.size + length], data[_TEXT.size + length :]


def encode_leftovers(left: list[Left], at: int) -> bytes:
    """What a task left: (pid, command line, is it gone); ``at``: which of a batch."""
    return marshal.dumps((at, left))


def leftovers_in(body: bytes) -> tuple[int, list[Left]]:
    left: tuple[int, list[Left]] = marshal.loads(body)
    return left


class Where(NamedTuple):
    """The head of a board: of which batch, how many of its parts were sent, does a task run, and so on."""

    number: int
    parts: int
    runs: int
    ended: int
    asks: int


class Board:
    """Memory that a worker shares with its parent, where it writes what each task of a batch came to, at no cost.

    So what is finished is not lost, and is not run again, if the worker dies before it has sent it.  A head: the
    number of the batch, how many parts of it were sent, whether a task of it runs, how many have ended since, and how
    often it has asked for the token; of which batch the parent wants the rest, which it writes itself; then what they
    came to, marshalled, one after another.  That is written first, the number last.
    """

    HEAD = Struct("<QQQQQQ")
    WANTED, WANTED_AT = Struct("<Q"), 40
    BYTES = 1 << 20
    MOST_AT_ONCE = 1 << 14  # nearly always that is all

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        """``read(size, at)``."""
        self._read = read

    def finished(self, number: int, parts: int) -> tuple[list[Any], bool] | None:
        """For the parent: what more tasks came to, and does another one run?  None: that is not told (any more)."""
        before = self.where()
        most = self.BYTES - self.HEAD.size
        for size in (self.MOST_AT_ONCE, most) if before[:2] == (number, parts) else ():
            file = BytesIO(self._read(size, self.HEAD.size))
            after = self.where()
            if after[:2] != (number, parts):
                break  # it has begun another one meanwhile, and its answer is on the way
            try:
                return [marshal.load(file) for _ in range(before.ended)], bool(after.runs)
            except (EOFError, ValueError, TypeError):
                if size == most:
                    raise
        return None

    def where(self) -> Where:
        """For the parent: how far is it?"""
        return Where(*self.HEAD.unpack(self._read(self.HEAD.size, 0))[:-1])


class FrameReader:
    """Bytes in, frames out."""

    def __init__(self) -> None:
        self.nonsense = ""  # what came that is no frame: nothing after it is understood
        self._buffer = bytearray()
        self._scratch = bytearray(READ_BYTES)

    def read_from(self, read_into: Callable[[bytearray], int]) -> int:
        """Read once; how many bytes came (0: the far end is closed).  Raises ``OSError``."""
        got = read_into(self._scratch)
        self._buffer += self._scratch if got == READ_BYTES else self._scratch[:got]
        return got

    def feed(self, data: bytes) -> None:
        """What somebody else has read."""
        self._buffer += data

    def is_empty(self) -> bool:
        return not self._buffer and not self.nonsense

    def frames(self) -> list[tuple[int, int, float, bytes]]:
        """The whole frames that have come, as ``Frame`` has them; a partial one stays.

        (Plain tuples, and a list: this is the hottest loop there is.)
        """
        buffer, at = self._buffer, 0
        found: list[tuple[int, int, float, bytes]] = []
        ends = len(buffer) - HEADER_BYTES
        whole = bytes(buffer) if ends < READ_BYTES else None  # slices of bytes are made in one step
        while at <= ends:
            kind, number, run_s, length = _unpack_from(buffer, at)
            kind -= MAGIC
            if kind not in _KINDS:
                self.nonsense = f"not a frame of ours: {bytes(buffer[at : at + HEADER_BYTES])!r}"
                break
            body_at = at + HEADER_BYTES
            end = body_at + length
            if end > ends + HEADER_BYTES:
                break
            if whole is not None:
                body = whole[body_at:end]
            else:
                with memoryview(buffer) as view:
                    body = bytes(view[body_at:end])
            found.append((kind, number, run_s, body))
            at = end
        del buffer[:at]
        return found


def token_of(number: int, asks: int) -> int:
    """The number on the token for the rest of a batch, when its worker has asked for it so often."""
    return (number << 20) + asks


def encode_tickets(first: int, last: int) -> bytes:
    return pack(f"<{last + 1 - first}Q", *range(first, last + 1))


def ticket_in(data: bytes | bytearray) -> int:
    """The number on one ticket."""
    number: int = _TICKET.unpack(data)[0]
    return number


def tickets_in(data: bytes | bytearray) -> list[int]:
    """The numbers on the tickets in ``data``; they are written and read whole."""
    return [number for (number,) in _TICKET.iter_unpack(data)]
