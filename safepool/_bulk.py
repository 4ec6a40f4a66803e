"""Big data goes through memory that both processes see: copied into it once, and out of it once, straight into place.

The sender packs the parts of a pickle (see ``_parts``) into a block and sends its descriptor, and a short message that
says what lies where.  The receiver maps nothing: what it reads is its own, to be kept for ever and changed, and the
block can be used again at once.

Guarantees:

* what is sent never changes what is here, nor the other way round;
* whatever cannot be had (descriptors, memory, the system call) makes it slower, never an error: the same bytes then go
  through the channel.
"""

from __future__ import annotations

import _socket
import os
from _pickle import Unpickler
from _pickle import loads as _loads
from _struct import Struct
from weakref import WeakSet

from ._blocks import ALIGN, MOST_CACHED_BYTES, READ, Block, Store, give_up_cached, within_limits
from ._os import memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ._parts import Parts

__all__ = [
    "MOST_CACHED_BYTES",
    "Arrived",
    "Cargo",
    "Inlined",
    "Missing",
    "Store",
    "disown",
    "pack",
    "receive",
    "send",
    "taken_in",
]
MOST_ARRIVED = 64  # that hold a descriptor until somebody wants to see them

_HEAD = Struct("<QQI")  # which sending of its block this is; length of the pickle; number of buffers
_BUFFER = Struct("<Q")  # length
_FILE = Struct("<Q")  # of an answer: the inode of its block; 0: all of it follows
MOST_STRAY = 64  # bytes that are read at once where only descriptors matter


def _aligned(at: int) -> int:
    return -(-at // ALIGN) * ALIGN


# ------------------------------------------------------------------- packing


def _layout(parts: Parts) -> tuple[bytes, list[tuple[int, memoryview]], int]:
    """What the message says, what lies where in the block, and the size of the block."""
    at = ALIGN
    pieces: list[tuple[int, memoryview]] = []
    for part in parts:
        pieces.append((at, memoryview(part)))
        at += len(part)
    head = _HEAD.pack(0, at - ALIGN, len(parts.buffers))
    for buffer in parts.buffers:
        at = _aligned(at)
        pieces.append((at, buffer))
        at += buffer.nbytes
        head += _BUFFER.pack(buffer.nbytes)
    return head, pieces, at


def pack(parts: Parts, store: Store) -> Cargo:
    """Copy what was pickled; the ``parts`` are needed no more."""
    head, pieces, size = _layout(parts)
    block = store.filled(size, pieces)
    if block is not None:
        return Cargo(store, head, size, block)
    data = bytearray(size - ALIGN)
    for at, piece in pieces:
        data[at - ALIGN : at - ALIGN + piece.nbytes] = piece
    return Cargo(store, head, size, data)


class Cargo:
    """A pickle that is big, packed.  Can be sent as often as need be; when it is dropped, its block is free."""

    def __init__(self, store: Store, head: bytes, size: int, held: Block | bytearray) -> None:
        self._store = store
        self._head = head
        self._size = size
        self._held = held

    def size_bytes(self) -> int:
        return self._size

    def lend(self) -> tuple[bytes, int] | None:
        """(message, descriptor to send with it), for one receiver; None: send what ``inline`` gives.

        Those it was lent to before must be dead, or the call taken back from them.
        """
        if isinstance(self._held, bytearray):  # there were too many; by now there may be fewer
            block = self._store.filled(self._size, [(ALIGN, memoryview(self._held))])
            if block is None:
                return None
            self._held = block
        self._held.sent += 1
        return READ.pack(self._held.sent) + self._head[READ.size :], self._held.fd

    def inline(self) -> tuple[bytes, bytearray]:
        """The same as bytes, in two parts that follow each other, for a channel that passes no descriptors."""
        if isinstance(self._held, bytearray):
            return self._head, self._held
        data = bytearray(self._size - ALIGN)
        memory.read_at(self._held.fd, memoryview(data), ALIGN)
        return self._head, data

    def __del__(self) -> None:
        if isinstance(self._held, Block):
            self._store.give_back(self._held)

    def __repr__(self) -> str:
        return f"<Cargo of {self._size} B {'in a block' if isinstance(self._held, Block) else 'on the heap'}>"


# ----------------------------------------------------------------- unpacking


class Arrived:
    """A message and the block it came with: ``load`` as often as need be.  When it is dropped, the sender may know."""

    def __init__(self, message: bytes, fd: int) -> None:
        self._message = message
        self._fd = fd
        self._pid = os.getpid()
        _arrived.add(self)

    def load(self) -> Any:
        """What was pickled.  Raises whatever unpickling raises, ``MemoryError``, ``OSError``."""
        fd = self._fd
        buffers = [_read_buffer(fd, ALIGN + at, size) for at, size in _buffers(self._message)]
        value = Unpickler(_Reader(fd, ALIGN), buffers=buffers).load()
        self._be_sure()
        return value

    def inlined(self) -> Inlined:
        """For whoever has too many descriptors already."""
        size = _HEAD.unpack_from(self._message)[1]
        for at, length in _buffers(self._message):
            size = at + length
        data = _read_buffer(self._fd, ALIGN, size)
        self._be_sure()
        return Inlined(self._message, data)

    def _be_sure(self) -> None:
        """Scenario 1: in a child that was forked since it came, while the parent has let go of it."""
        if self._pid == os.getpid():
            return
        read, this = (READ.unpack_from(data)[0] for data in (os.pread(self._fd, READ.size, 0), self._message))
        if read >= this:
            raise EOFError("the process that this one was forked from has let go of it: read it there, before the fork")

    def close(self) -> None:
        """Let go of it.  Only whoever received it tells the sender: not a child that was forked since."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        _arrived.discard(self)
        if self._pid == os.getpid():
            try:  # noqa: SIM105
                os.pwrite(fd, self._message[: READ.size], 0)
            except OSError:
                pass  # then it is not used again
        os.close(fd)
        memory.take_reserve()

    __del__ = close


def _buffers(message: bytes | memoryview) -> list[tuple[int, int]]:
    """(where, counted from the pickle's start; length) of each buffer."""
    _, length, number = _HEAD.unpack_from(message)
    at, found = length, []
    for (size,) in _BUFFER.iter_unpack(message[_HEAD.size : _HEAD.size + number * _BUFFER.size]):
        at = _aligned(at)
        found.append((at, size))
        at += size
    return found


class Inlined:
    """The same for what came through the channel, or was read in advance."""

    def __init__(self, message: bytes | memoryview, data: bytearray | memoryview) -> None:
        self._message = message
        self._data = data

    @classmethod
    def of(cls, body: bytes | memoryview) -> Inlined:
        """``body``: both parts of what ``Cargo.inline`` gave."""
        return cls(body, memoryview(body)[_HEAD.size + _HEAD.unpack_from(body)[2] * _BUFFER.size :])

    def load(self) -> Any:
        data = memoryview(self._data)
        buffers = [bytearray(data[at : at + size]) for at, size in _buffers(self._message)]
        return _loads(data[: _HEAD.unpack_from(self._message)[1]], buffers=buffers)

    def close(self) -> None:
        self._message, self._data = b"", bytearray()


def taken_in(message: bytes, fd: int) -> Arrived | Inlined:
    """What came with ``fd``, which is closed in time: at once if too many are open."""
    arrived = Arrived(message, fd)
    if len(_arrived) <= within_limits(MOST_ARRIVED) and memory.take_reserve():
        return arrived
    try:
        inlined = arrived.inlined()
    except (OSError, MemoryError):
        return arrived
    arrived.close()
    return inlined


# ------------------------------------------------------------------ answers


class Missing:
    """In place of what could not be received."""

    def __init__(self, error: OSError) -> None:
        self._error = error

    def load(self) -> Any:
        raise self._error

    def close(self) -> None:
        pass


def send(channel: _socket.socket, parts: Parts, store: Store) -> bytes:
    """Send the block of an answer, and return what is to follow through another pipe.  Never waits."""
    cargo = pack(parts, store)
    parts.clear()
    parts.buffers = ()
    lent = cargo.lend()
    if lent is not None:
        message, fd = lent
        try:
            memory.send_with(channel, b"!", fd, _socket.MSG_DONTWAIT)
        except OSError:  # too many are on their way, or a task has closed the channel, or filled it
            pass
        else:
            return _FILE.pack(os.fstat(fd).st_ino) + message
    return _FILE.pack(0) + b"".join(cargo.inline())


def receive(channel: _socket.socket, body: bytes) -> Arrived | Inlined | Missing:
    """What ``send`` sent, when what it returned has come.  Never waits.  Raises ``OSError``: it was not sent.

    Whatever else a task writes to the channel is passed over.
    """
    (file,) = _FILE.unpack_from(body)
    message = body[_FILE.size :]
    if not file:
        return Inlined.of(message)
    while True:
        try:
            data, fd = _receive(channel)
        except BlockingIOError:
            raise
        except OSError as error:
            # Scenario 1: descriptors have run out, and another thread was faster than we when one was given up.
            channel.recv(MOST_STRAY, _socket.MSG_DONTWAIT)
            return Missing(error)
        if fd is not None and os.fstat(fd).st_ino == file:
            return taken_in(message, fd)
        if fd is not None:
            os.close(fd)  # of an answer that was never given
        if not data:
            raise OSError("no block came for an answer")


def _receive(channel: _socket.socket) -> tuple[bytes, int | None]:
    try:
        return memory.receive_with(channel, MOST_STRAY, _socket.MSG_DONTWAIT)
    except BlockingIOError:
        raise
    except OSError:
        give_up_cached()
        return memory.receive_with(channel, MOST_STRAY, _socket.MSG_DONTWAIT)


class _Reader:
    """The file that an unpickler reads: what is big in it is read straight into the object that is made of it."""

    def __init__(self, fd: int, at: int) -> None:
        self._fd = fd
        self._at = at

    def read(self, size: int) -> bytes:
        """Frames of small things, and the UTF-8 of a long text."""
        if size < memory.HUGE_BYTES:
            data = os.pread(self._fd, size, self._at)
        else:
            data = Unpickler(_OneBuffer(self._fd, self._at, size, BINBYTES8)).load()
        self._at += len(data)
        return data

    def readinto(self, view: memoryview) -> int:
        memory.use_huge_pages(view)
        memory.read_at(self._fd, view, self._at)
        self._at += view.nbytes
        return view.nbytes

    def readline(self) -> bytes:
        """For opcodes of old protocols, which only a reducer of the user's could bring about."""
        line = b""
        while not line.endswith(b"\n") and (byte := self.read(1)):
            line += byte
        return line


class _OneBuffer(_Reader):
    """The pickle of ``bytes``, or so, whose content lies in a block: the only way to memory not zeroed first."""

    def __init__(self, fd: int, at: int, size: int, opcode: bytes) -> None:
        super().__init__(fd, at)
        self._before = b"\x80\x05" + opcode + size.to_bytes(8, "little")
        self._left = size

    def read(self, size: int) -> bytes:
        if self._before:
            data, self._before = self._before[:size], self._before[size:]
        elif self._left:  # not in the Pythons that we have seen: they ask for it by ``readinto``
            data = os.pread(self._fd, min(size, self._left), self._at)
            self._at += len(data)
            self._left -= len(data)
        else:
            data = b"."
        return data

    def readinto(self, view: memoryview) -> int:
        self._left -= view.nbytes
        return super().readinto(view)


BINBYTES8, BYTEARRAY8 = b"\x8e", b"\x96"


def _read_buffer(fd: int, at: int, size: int) -> bytearray:
    buffer: bytearray = Unpickler(_OneBuffer(fd, at, size, BYTEARRAY8)).load()
    return buffer


_arrived: WeakSet[Arrived] = WeakSet()


def disown() -> None:
    """In a worker that was forked: what came to the process it was forked from is none of its business."""
    for arrived in tuple(_arrived):
        arrived.close()
    memory.forget_reserve()
