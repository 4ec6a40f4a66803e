"""Frames bytes to and from one worker over its private channel.

A frame is an envelope of fixed layout, which always loads, around two byte strings: ``text`` (UTF-8,
for people) and ``body`` (a pickle, for the far end only).  A body that cannot be loaded spoils
nothing but itself.
"""

from __future__ import annotations

import marshal
from _struct import Struct, pack  # not struct, and no socket: every worker would wait for those

from ._shapes import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Iterator

    from ._packets import Left

# To the worker: a call to run; the request to exit; what every worker is set up with.
CALL, EXIT, SETUP = 1, 2, 3
# From the worker: alive; ready; initializer failed; a task began; it returned; it raised; it left processes.
BOOTED, READY, UNFIT, BEGAN, RETURNED, RAISED, LEFT = 11, 12, 13, 14, 15, 16, 17
_KINDS = frozenset((CALL, EXIT, SETUP, BOOTED, READY, UNFIT, BEGAN, RETURNED, RAISED, LEFT))

# Whatever else is written to a channel by mistake, one byte is enough, is found out at the next header.
MAGIC = 0xF05AFE01
# MAGIC, kind, number of the call at this worker, number of the call that begins now (0: none), run time in
# seconds, length of text, length of body.
_HEADER = Struct("<IBQQdQQ")
_TICKET = Struct("<Q")
TICKET_BYTES = _TICKET.size
MOST_TEXT = 1 << 20
READ_BYTES = 1 << 16


class ProtocolError(Exception):
    """The far end sent something that is not a frame."""


class Frame(NamedTuple):
    kind: int
    number: int = 0
    begins: int = 0
    run_s: float = 0.0
    text: bytes = b""
    body: bytes = b""


def encode(frame: Frame) -> bytes:
    kind, number, begins, run_s, text, body = frame
    return _HEADER.pack(MAGIC, kind, number, begins, run_s, len(text), len(body)) + text + body


def encode_leftovers(left: list[Left]) -> bytes:
    """What a task left: (pid, command line, is it gone)."""
    return marshal.dumps(left)


def leftovers_in(body: bytes) -> list[Left]:
    left: list[Left] = marshal.loads(body)
    return left


def encode_call(number: int, data: bytes, function: bytes) -> list[bytes]:
    """In parts, to be sent one after another: a big call is not copied."""
    return [_HEADER.pack(MAGIC, CALL, number, 0, 0.0, 0, len(data) + len(function)), data, function]


def encode_returned(number: int, begins: int, run_s: float, body: bytes) -> bytes:
    return _HEADER.pack(MAGIC, RETURNED, number, begins, run_s, 0, len(body)) + body


class FrameReader:
    """Bytes in, frames out."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._scratch = bytearray(READ_BYTES)

    def read_from(self, channel: socket) -> int:
        """Read once; how many bytes came (0: the far end is closed).  Raises ``OSError``."""
        got = channel.recv_into(self._scratch)
        self._buffer += self._scratch if got == READ_BYTES else self._scratch[:got]
        return got

    def __iter__(self) -> Iterator[Frame]:
        """The whole frames that have come; a partial one stays.  Raises ``ProtocolError``."""
        buffer, at = self._buffer, 0
        new = tuple.__new__  # twice as fast as Frame(), on the hottest path there is
        try:
            while len(buffer) - at >= _HEADER.size:
                magic, kind, number, begins, run_s, text_len, body_len = _HEADER.unpack_from(buffer, at)
                if magic != MAGIC or kind not in _KINDS or text_len > MOST_TEXT:
                    raise ProtocolError(f"not a frame of ours: {bytes(buffer[at : at + _HEADER.size])!r}")
                text_at = at + _HEADER.size
                body_at = text_at + text_len
                end = body_at + body_len
                if len(buffer) < end:
                    return
                if end - at < READ_BYTES:
                    text, body = bytes(buffer[text_at:body_at]), bytes(buffer[body_at:end])
                else:
                    with memoryview(buffer) as view:  # one copy less
                        text, body = bytes(view[text_at:body_at]), bytes(view[body_at:end])
                at = end
                yield new(Frame, (kind, number, begins, run_s, text, body))
        finally:
            del buffer[:at]


def encode_tickets(first: int, last: int) -> bytes:
    return pack(f"<{last + 1 - first}Q", *range(first, last + 1))


def ticket_in(data: bytes) -> int:
    """The number on one ticket."""
    number: int = _TICKET.unpack(data)[0]
    return number


def tickets_in(data: bytes) -> list[int]:
    """The numbers on the tickets in ``data``; they are written and read whole."""
    return [number for (number,) in _TICKET.iter_unpack(data)]
