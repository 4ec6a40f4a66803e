"""Blocks of memory that other processes see, too: kept warm within bounds, and never used again too early.

A block is a file without a name (see ``_os.memory``), so nothing is left of it, however processes end.  Memory that is
touched for the first time costs ten times what copying into it costs: so what was used once is used again, when the
last receiver it was sent to says, in the block itself, that it has read it.  No message goes back for that, and a
receiver that dies says nothing: then it is never used again.
"""

from __future__ import annotations

import os
from _struct import Struct
from _thread import allocate_lock, get_ident
from time import monotonic
from weakref import WeakSet

from ._os import memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap

MOST_CACHED_BYTES = 256 << 20  # of blocks that nobody needs
MOST_BLOCKS = 64  # of one store, in use or not; each has up to two descriptors
OPEN_FILES_SHARE = 16  # no more than a sixteenth of what the process may have open
KEEP_S = 2.0  # a block that is not used
STEP_BYTES = 8 << 20  # is copied in one go, while other threads wait

READ = Struct("<Q")  # at the start of a block: which of its sendings was read last
ALIGN = 64  # of what lies in a block; the first 64 bytes are for that


class Block:
    """One piece of shared memory, and what we know of it."""

    def __init__(self) -> None:
        """Raises ``OSError``."""
        self.fd = memory.new_block()
        self.size = 0  # of what was written, so that its pages are there
        self.sent = 0
        self.used = 0.0
        self._map: mmap.mmap | None = None
        _all.add(self)

    def write(self, pieces: list[tuple[int, memoryview]]) -> None:
        """Raises ``OSError``, and then the block is of no use."""
        end = 0
        for at, piece in pieces:
            end = at + piece.nbytes
            known = min(max(self.size - at, 0), piece.nbytes)
            if known:
                self._copy(at, piece[:known])
            memory.write_at(self.fd, piece[known:], at + known)
        self.size = max(self.size, end)

    def _copy(self, at: int, piece: memoryview) -> None:
        """Three times as fast as writing to the descriptor, once the pages are known here."""
        if self._map is None or len(self._map) < at + piece.nbytes:
            if self._map is not None:
                self._map.close()
            self._map = memory.mapped(self.fd, self.size)
        to = memoryview(self._map)
        for begin in range(0, piece.nbytes, STEP_BYTES):
            step = piece[begin : begin + STEP_BYTES]
            to[at + begin : at + begin + step.nbytes] = step

    def is_read(self) -> bool:
        """Has the last receiver read it?  Those before it are dead, or their calls were taken back."""
        try:
            return not self.sent or os.pread(self.fd, READ.size, 0) == READ.pack(self.sent)
        except OSError:  # another thread has closed the store
            return False

    def close(self) -> None:
        if self in _all:
            _all.discard(self)
            os.close(self.fd)
            self.fd = -1
            try:
                if self._map is not None:
                    self._map.close()
            except BufferError:  # in a forked child: another thread of the parent was copying
                pass


class Store:
    """The blocks of one process, for one pool or for one worker.  Any thread may use it."""

    def __init__(self, most_bytes: int = MOST_CACHED_BYTES, most_blocks: int = MOST_BLOCKS) -> None:
        self._most_bytes = most_bytes
        self._most_blocks = within_limits(most_blocks)
        self._free: list[Block] = []
        self._back: list[Block] = []  # nobody here needs them, but perhaps somebody there reads
        self._number = 0  # of all blocks that are ours
        self._is_closed = not memory.HAS_BLOCKS
        self._lock = allocate_lock()
        self._holder: int | None = None  # the thread that looks for a block
        _stores.add(self)

    def filled(self, size: int, pieces: list[tuple[int, memoryview]]) -> Block | None:
        """A block of that size, with that in it; None: there is none, or no memory."""
        block = self._take(size)
        if block is None:
            return None
        try:
            block.write(pieces)
        except BaseException as error:
            self._drop(block)
            if isinstance(error, OSError):  # no memory, or a limit on the size of files
                return None
            raise
        return block

    def _take(self, size: int) -> Block | None:
        # Scenario 1: (a) a thread has the lock, (b) a signal handler, or a finalizer, of the user's runs there, and
        # sends something big.  Then there is no block for that.
        me = get_ident()
        if self._holder == me or self._is_closed:
            return None
        with self._lock:
            self._holder = me
            try:
                block = self._cached(size)
                is_full = block is None and not self._has_room()
            finally:
                self._holder = None
        if block is not None or is_full:
            return block
        try:
            return Block()
        except OSError:  # no descriptor, or no memory, is left
            with self._lock:
                self._number -= 1
            return None

    def _cached(self, size: int) -> Block | None:
        self._look_after()
        block = self._best(size)
        if block is not None:
            self._free.remove(block)
        return block

    def _has_room(self) -> bool:
        """For one more, which is counted."""
        while self._number >= self._most_blocks and (self._free or self._back):
            self._forget((self._free or self._back)[0])
        if self._number >= self._most_blocks:
            return False
        self._number += 1
        return True

    def _best(self, size: int) -> Block | None:
        """The smallest that is big enough, or the biggest, which then grows; none that is far too big."""
        enough = [block for block in self._free if size <= block.size <= 4 * size]
        if enough:
            return min(enough, key=_size_of)
        return max((block for block in self._free if block.size < size), key=_size_of, default=None)

    def _look_after(self) -> None:
        """See what was read, and keep within the bound."""
        for block in tuple(self._back):
            if block.is_read():
                self._back.remove(block)
                self._free.append(block)
        cached = sum(block.size for block in self._free) + sum(block.size for block in self._back)
        for block in sorted(self._free + self._back, key=_used_at):
            if cached <= self._most_bytes:
                return
            cached -= block.size
            self._forget(block)

    def give_back(self, block: Block) -> None:
        """Nobody here needs it any more.  May be called wherever garbage is collected: takes no lock."""
        if block not in _all:
            return  # it was our parent's, before the fork
        block.used = monotonic()
        self._back.append(block)
        if self._is_closed:
            self.close()

    def _forget(self, block: Block) -> None:
        for blocks in (self._free, self._back):
            if block in blocks:
                blocks.remove(block)
        self._number -= 1
        block.close()

    def _drop(self, block: Block) -> None:
        with self._lock:
            self._number -= 1
        block.close()

    def trim(self, now: float) -> float | None:
        """Give back what was not used for ``KEEP_S``; when to call again (None: there is nothing)."""
        if not self._back and not self._free:
            return None
        if not self._lock.acquire(blocking=False):
            return now + KEEP_S  # see Scenario 1: who runs there may wait for this thread
        try:
            self._look_after()
            for block in self._free + self._back:
                if block.used + KEEP_S <= now:
                    self._forget(block)
            return min((block.used + KEEP_S for block in self._free + self._back), default=None)
        finally:
            self._lock.release()

    def close(self) -> None:
        """Give back all that is cached, and keep nothing from now on."""
        self._is_closed = True
        for blocks in (self._free, self._back):
            for block in tuple(blocks):
                block.close()
            blocks.clear()

    def cached_bytes(self) -> int:
        return sum(block.size for block in self._free + self._back)

    def __repr__(self) -> str:
        return (
            f"<Store of {self._number} blocks: {len(self._free)} free, {len(self._back)} back, {self.cached_bytes()} B>"
        )


def within_limits(most: int) -> int:
    try:
        return min(most, os.sysconf("SC_OPEN_MAX") // OPEN_FILES_SHARE)
    except (AttributeError, ValueError, OSError):  # nobody can say, and there are no blocks either
        return most


def _size_of(block: Block) -> int:
    return block.size


def _used_at(block: Block) -> float:
    return block.used


def give_up_cached() -> None:
    """Descriptors have run out: close whatever nobody needs."""
    for store in tuple(_stores):
        store.trim(float("inf"))


_all: set[Block] = set()
_stores: WeakSet[Store] = WeakSet()


def _let_go_in_child() -> None:
    """A forked child neither uses nor keeps blocks in its parent's place."""
    for block in tuple(_all):
        block.close()
    for store in _stores:
        store._lock, store._holder = allocate_lock(), None
        store._free, store._back, store._number = [], [], 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
