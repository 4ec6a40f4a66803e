"""What a worker's threads are doing, written by the worker itself when it is asked by a signal, whatever it is doing.

``faulthandler`` writes from its signal handler: in C code that holds the interpreter's lock, in a sleep, in a read.
Not if the process is stopped, or blocks all signals, or has taken this signal for itself.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
else:
    import _signal

SIGNAL = getattr(_signal, "SIGRTMIN", 0) + 9  # nobody's: libraries that take one take the first or the last
ANSWER_LIMIT_S = 0.05  # it takes 2 to 12 ms
LOOK_AGAIN_S = 0.003
MOST_BYTES = 1 << 16
HIGH_FD = 200  # programs close low descriptors that they take for their own


class Stacks:
    """A file in memory that one worker writes to and its user's process reads."""

    def __init__(self) -> None:
        """Raises ``OSError``."""
        self.fd = os.memfd_create("safepool-stacks", os.MFD_CLOEXEC)
        self._size = 0

    def is_written(self) -> bool:
        """Something is there, and no more has come since this was asked last."""
        before, self._size = self._size, os.fstat(self.fd).st_size
        return 0 < self._size == before

    def take(self) -> str:
        """What was written since this was called last."""
        text = os.pread(self.fd, MOST_BYTES, 0)
        os.ftruncate(self.fd, 0)
        self._size = 0
        return text.decode(errors="replace").strip()

    def close(self) -> None:
        os.close(self.fd)


def answer_in(fd: int) -> None:
    """In a worker: from now on write there when asked.  ``fd`` is closed."""
    import faulthandler
    import fcntl

    high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH_FD)
    fcntl.fcntl(high, fcntl.F_SETFL, os.O_APPEND)  # what was read is cut off
    os.close(fd)
    faulthandler.register(SIGNAL, high, all_threads=True)
