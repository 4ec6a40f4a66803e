"""Memory that two processes share and that nobody has to remove: a file without a name, passed as a descriptor.

* ``HAS_BLOCKS``: there is such a thing here;
* ``new_block() -> fd``: an empty one; ``write_at``, ``read_at``: all of it, at an offset;
* ``mapped(fd, size)``: the block as memory of this process;
* ``send_with(socket, data, fd)``, ``receive_with(socket, size) -> data, fd``: a message, and a descriptor with it;
* ``use_huge_pages(view)``: memory that is about to be touched for the first time.

What it imports it imports at once, and it is little: later, a task may have left no descriptor to load it by.
"""

from __future__ import annotations

import _socket
import os
import sys
from _struct import Struct
from time import sleep

from . import CAPABILITIES, above, descriptor_in

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HAS_BLOCKS = "big_data" in CAPABILITIES
if HAS_BLOCKS:
    import fcntl
    import mmap

_FD = Struct("i")
MOST_AT_ONCE = 1 << 30  # the system moves less than 2 GB at a time
HUGE_BYTES = 1 << 22  # numpy's own threshold: for less, asking costs more than is gained
PAGE = 4096
RESERVED = 3  # descriptors
TRIES, TRY_AGAIN_S = 25, 0.002  # to receive one
MADV_HUGEPAGE = 14
F_ADD_SEALS, F_SEAL_SHRINK = 1033, 2


def new_block() -> int:
    """Raises ``OSError``.

    It can grow but never shrink: its maker has it mapped, and a task that truncates whatever descriptors it finds
    (all that it inherits, say) must not be able to end the program by a SIGBUS.  The reader maps nothing, so what is
    written needs no seal: who has the descriptor is one of the two.
    """
    fd = above(os.memfd_create("safepool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    try:
        fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)
    except OSError:
        os.close(fd)
        raise
    return fd


def write_at(fd: int, data: memoryview, at: int) -> None:
    """Raises ``OSError``: no memory, say.  (A page that is missing in a mapping would be a SIGBUS instead.)"""
    while data.nbytes:
        done = os.pwrite(fd, data[:MOST_AT_ONCE], at)
        data, at = data[done:], at + done


def read_at(fd: int, view: memoryview, at: int) -> None:
    """Fill ``view``.  Raises ``OSError``, ``EOFError`` if there is not that much."""
    while view.nbytes:
        done = os.preadv(fd, [view[:MOST_AT_ONCE]], at)
        if not done:
            raise EOFError("a block of memory is shorter than was said")
        view, at = view[done:], at + done


def mapped(fd: int, size: int) -> mmap.mmap:
    """``size`` bytes that were written before, so that no page is missing.  Raises ``OSError``."""
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)  # one by one, its pages would cost four times as much
    if sys.version_info >= (3, 13):
        return mmap.mmap(fd, size, flags, trackfd=False)
    return mmap.mmap(fd, size, flags)


def send_with(channel: _socket.socket, data: bytes | memoryview, fd: int, flags: int = 0) -> int:
    """Send ``data`` and with its first byte a copy of ``fd``; how much of it went.  Raises ``OSError``."""
    return channel.sendmsg([data], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, _FD.pack(fd))], flags)


def receive_with(channel: _socket.socket, size: int, flags: int = 0) -> tuple[bytes, int | None]:
    """What ``send_with`` sent.  Raises ``OSError``; if no descriptor is left here, then the message is still there.

    Scenario 1: this process has used up its descriptors.  The system would drop what it cannot deliver, and a result
    with it: so we only look first.  We keep descriptors that can be given up for such a moment.

    Scenario 2: another thread opens a file just then.  Most are closed again soon.
    """
    tries = TRIES
    while True:
        data, fd, is_cut = _receive(channel, size, flags | _socket.MSG_PEEK)
        if not is_cut:
            channel.recv(len(data), flags)  # its copy of the descriptor is closed by the system
            return data, fd
        if not _reserve.give_up():
            tries -= 1
            if not tries:
                raise OSError(24, "no descriptor is left for what was sent")  # EMFILE
            sleep(TRY_AGAIN_S)


def _receive(channel: _socket.socket, size: int, flags: int) -> tuple[bytes, int | None, bool]:
    """The last: is the descriptor missing?"""
    data, more, got, _ = channel.recvmsg(size, _socket.CMSG_SPACE(_FD.size), flags | _socket.MSG_CMSG_CLOEXEC)
    return data, descriptor_in(more), bool(got & _socket.MSG_CTRUNC)


class _Reserve:
    """Some descriptors that lead nowhere."""

    def __init__(self) -> None:
        self.fds: list[int] = []
        self.take()

    def take(self) -> bool:
        """Have them again, if they can be had; False: not all."""
        while HAS_BLOCKS and len(self.fds) < RESERVED:
            try:
                self.fds.append(above(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)))
            except OSError:
                return False
        return True

    def forget(self) -> None:
        """In a child that closes what it inherits: other files may have their numbers by now."""
        self.fds.clear()

    def give_up(self) -> bool:
        """One of them; False: there is none."""
        try:
            os.close(self.fds.pop())
        except IndexError:
            return False
        return True


_reserve = _Reserve()
take_reserve = _reserve.take
forget_reserve = _reserve.forget


def use_huge_pages(view: memoryview) -> None:
    """Touching a page for the first time costs four times what copying into it costs, unless it is a huge one."""
    if view.nbytes < HUGE_BYTES:
        return
    try:
        import ctypes

        at = ctypes.addressof(ctypes.c_char.from_buffer(view))
        first = -(-at // PAGE) * PAGE
        _madvise()(ctypes.c_void_p(first), ctypes.c_size_t((at + view.nbytes - first) // PAGE * PAGE), MADV_HUGEPAGE)
    except (ImportError, OSError, AttributeError, TypeError, ValueError):
        pass  # it is only slower


def _madvise() -> Any:
    import ctypes

    global _found
    if _found is None:
        _found = ctypes.CDLL(None).madvise
    return _found


_found: Any = None
