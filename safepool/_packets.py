"""Messages between a program, its keeper and what the keeper starts: one packet each, with descriptors.

Whatever ``marshal`` takes; both sides are the same interpreter.
"""

from __future__ import annotations

import _socket
import marshal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from typing import Any

    Preload = tuple[list[str], dict[str, str], tuple[str, ...]] | None  # sys.path, environment, what to import
    Left = tuple[int, str, bool]  # what a task has left: pid, command line, is it gone
else:
    import _signal

#: How a zygote is asked for a spare: at once, or when the last one has become a worker; and that now it is urgent.
NOW, SOON, HURRY = b"!", b"+", b"h"
MOST_BYTES = 1 << 17
MOST_FDS = 64
#: The last of what a worker is told of its family, if it has not ended in time.
NOT_ENDED = (0, "", False)
#: What the keeper ignores: whoever stops a program means the program.
IGNORED = (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP, _signal.SIGQUIT, _signal.SIGTSTP, _signal.SIGUSR1)
#: How a new interpreter finds the package, wherever it is: its home is the first argument.
BACK = "import sys; sys.path.insert(0, sys.argv[1]); import safepool; sys.path.pop(0); "


def send(channel: _socket.socket, words: Any, fds: Any = ()) -> bool:
    """False: nobody is there, or nobody reads."""
    rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds))]
    try:
        channel.sendmsg([marshal.dumps(words)], rights if fds else [], _socket.MSG_DONTWAIT)
    except OSError:
        return False
    return True


def receive(channel: _socket.socket) -> tuple[bytes, list[int]]:
    """One message and its descriptors; an empty one: nobody is there any more.  May raise ``BlockingIOError``."""
    try:
        data, rights, _, _ = channel.recvmsg(MOST_BYTES, _socket.CMSG_SPACE(4 * MOST_FDS), _socket.MSG_CMSG_CLOEXEC)
    except ConnectionError:
        return b"", []
    fds = b"".join(content for _, _, content in rights)
    return data, [int.from_bytes(fds[at : at + 4], sys.byteorder) for at in range(0, len(fds) // 4 * 4, 4)]
