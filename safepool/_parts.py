"""The file that a pickler writes to when what it pickles may be big: nothing big is copied.

A pickler hands over ``bytes`` of 64 kB and more as they are, and offers buffers (arrays) before it copies them.  So
however deep it lies, what is big in a call or a result is still in its own place when the pickling is done.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

BIG_BYTES = 1_000_000  # below, nothing is gained by another way than the channel


class Parts(list[bytes]):
    """The parts of one pickle, in order, and the ``buffers`` that are not in it.

    ``Pickler(parts, protocol, buffer_callback=parts.offer).dump(value)``
    """

    buffers: list[memoryview] | tuple[()] = ()

    def write(self, data: Any) -> None:
        # Scenario 1: a bytearray comes as it is, too, and another thread makes it longer than the pickle says.
        self.append(data if type(data) is bytes else bytes(data))

    def offer(self, buffer: Any) -> bool:
        """May the pickler copy this?"""
        try:
            raw = buffer.raw()
        except BufferError:  # not contiguous: the pickler has words for that
            return True
        if raw.nbytes < BIG_BYTES:
            return True
        if not self.buffers:
            self.buffers = []
        self.buffers.append(raw)
        return False

    def is_big(self) -> bool:
        if len(self) == 1:
            return bool(self.buffers)
        return bool(self.buffers) or sum(map(len, self)) >= BIG_BYTES

    def joined(self) -> bytes:
        """The pickle, if it is not big."""
        return self[0] if len(self) == 1 else b"".join(self)

    def settled(self) -> bytes | Parts:
        """The pickle; itself, if it is big."""
        return self if self.is_big() else self.joined()

    def names(self, word: bytes) -> bool:
        """Is ``word`` in it, but for what is big, which are no names?"""
        if len(self) == 1:
            return word in self[0]
        return any(word in part for part in self if len(part) < BIG_BYTES)
