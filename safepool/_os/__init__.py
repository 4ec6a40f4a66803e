"""The operating system in a handful of verbs; nobody else asks what platform this is.

* ``above_standard()``: no descriptor that is opened within is taken for a standard stream;
* ``socket_of(fd)``: the socket behind a descriptor, as much of it as a worker needs;
* ``open_channel() -> (ours, worker's)``: a private pair of connected sockets, kept out of forked children;
* ``keep(socket)``, ``close(socket)``: a worker's end becomes ours too; the end of a socket of ours;
* ``send_some(socket, buffers)``: one write, of many buffers where that is possible;
* ``watch(pid) -> fd | None``: readable when that process is dead; None: ask ``is_dead`` again and again;
* ``has_room(fd)``: a few kilobytes can be written to it without blocking;
* ``is_reaped(fd)``: the status of this dead child was taken by somebody else, and will never be known;
* ``send_signal(fd, process, number)``: to that very process, never to a pid that was reused;
* ``CAPABILITIES``: what this platform gives; what is missing is said in ``MISSING``.
"""

from __future__ import annotations

import _socket
import os
import stat
import sys
from _thread import RLock, _local

# Workers load this, and wait for it: modules that only their parent uses are imported where they are used.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    import socket
    from typing import Any
else:
    import _signal as signal

#: What can be had here: ``pidfd`` (death is learnt from the kernel at once), ``take_back`` (tasks
#: that a worker has not begun can be withdrawn from it), ``fork``, ``keeper`` (nothing outlives its owner).
CAPABILITIES: frozenset[str] = frozenset(
    name
    for name, there in {
        "pidfd": hasattr(os, "pidfd_open") and hasattr(signal, "pidfd_send_signal"),
        "take_back": hasattr(_socket, "MSG_DONTWAIT"),
        "fork": hasattr(os, "fork"),
        "keeper": sys.platform == "linux" and hasattr(os, "pidfd_open") and os.path.isdir("/proc/self/task"),
    }.items()
    if there
)

#: What a platform without a capability does not guarantee.
MISSING: dict[str, str] = {
    "pidfd": "the death of a worker is noticed by asking 20 times a second, not at once",
    "take_back": "a task that was sent to a worker can no longer be cancelled, and workers get one task at a time",
    "fork": "workers are started as new interpreters",
    "keeper": "what tasks start is not ended with them, and workers that are busy outlive a program that is killed",
}

_STANDARD = (0, 1, 2)
FORK_LIMIT_S = 0.5  # for a fork, and for a pair to be written down
ASK_AGAIN_S = 0.05  # how often a death is asked for where it is not reported

# Parent-side sockets, by descriptor.  A forked child (a worker under "fork", or a program's own
# fork) must not keep them open: the worker at the far end would never see its parent go.
_ours: dict[int, socket.socket] = {}
_ours_lock = RLock()


class above_standard:  # noqa: N801  (it is used as a verb)
    """Within, the descriptors 0, 1 and 2 are taken, so that nothing of ours is opened there.

    Scenario 1.  The program has closed its standard streams, and a worker's channel becomes descriptor 1: what
    any task prints, or a C library complains of, goes into the channel.
    """

    def __enter__(self) -> None:
        self._fillers: list[int] = []
        try:
            _fill_standard(self._fillers)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        for fd in self._fillers:
            os.close(fd)


def _fill_standard(fillers: list[int]) -> None:
    while not all(map(_is_open, _STANDARD)):
        fillers.append(os.open(os.devnull, os.O_RDWR))


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def fill_standard() -> None:
    """In a worker: what is closed of 0, 1 and 2 leads nowhere from now on."""
    _fill_standard([])


def socket_of(fd: int) -> _socket.socket:
    """The socket behind a descriptor, which is its own from now on; as much of a socket as a worker needs."""
    return _socket.socket(fileno=fd)


def moved_up(channel: _socket.socket) -> _socket.socket:
    """``channel``, but not where a standard stream should be."""
    if channel.fileno() not in _STANDARD:
        return channel
    with above_standard():
        copy = socket_of(_socket.dup(channel.fileno()))
    channel.close()
    return copy


def open_channel() -> tuple[socket.socket, socket.socket]:
    """A new pair of connected stream sockets.  Raises ``OSError`` when descriptors run out."""
    import socket

    locked = _ours_lock.acquire(timeout=FORK_LIMIT_S)
    try:
        ours, theirs = socket.socketpair()
        _ours[ours.fileno()] = ours
    finally:
        if locked:
            _ours_lock.release()
    return ours, theirs


def keep(channel: socket.socket) -> socket.socket:
    """Count a worker's end among ours, once the worker has its own copy."""
    _ours[channel.fileno()] = channel
    return channel


def close(channel: socket.socket) -> None:
    _ours.pop(channel.fileno(), None)
    channel.close()


def send_some(channel: socket.socket, buffers: list[memoryview]) -> int:
    """Write as much of ``buffers`` as goes at once; how many bytes went.  Raises ``OSError``."""
    if hasattr(channel, "sendmsg"):
        return channel.sendmsg(buffers)
    return channel.send(buffers[0])


def has_room(fd: int) -> bool:
    """A few kilobytes can be written to ``fd`` at once, as far as that can be asked.  Raises ``OSError``."""
    if sys.platform == "win32":
        return True
    try:
        import fcntl
        import select
        import termios
    except ImportError:  # no descriptor is left to load them by
        return False
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    if not poll.poll(0):
        return False
    if hasattr(fcntl, "F_GETPIPE_SZ") and stat.S_ISFIFO(os.fstat(fd).st_mode):
        # A pipe counts as writable when one page is free, and a buffer may hold four.
        unread = int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)
        return unread * 2 <= fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
    return True


def _let_go_in_child() -> None:
    global _ours_lock
    for channel in _ours.values():
        channel.close()
    _ours.clear()
    _ours_lock = RLock()


_forking = _local()  # ``locked``: this thread forks, and has the lock


def _lock_for_fork() -> None:
    _forking.locked = _ours_lock.acquire(timeout=FORK_LIMIT_S)  # held by others for a few lines only


def _unlock_after_fork() -> None:
    if _forking.locked:
        _forking.locked = False
        _ours_lock.release()


if "fork" in CAPABILITIES:
    # Scenario 2: one thread has made a pair and not yet written it down, another one forks.
    # Scenario 3: the fork waits, in the hook of another module (logging's, say), for a lock that is held for
    # hours, and holds ours: so nobody waits for that for long, and no watchdog at all.
    os.register_at_fork(
        before=_lock_for_fork,
        after_in_parent=_unlock_after_fork,
        after_in_child=_let_go_in_child,
    )


def watch(pid: int) -> int | None:
    """A descriptor that is readable once process ``pid`` is dead, or None where there is no such thing.

    Raises ``ProcessLookupError`` if it is dead and reaped already.
    """
    if "pidfd" not in CAPABILITIES:
        return None
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except OSError:  # an old kernel, or no descriptor is left: then it is asked for
        return None


def is_reaped(fd: int | None) -> bool:
    """Was the dead child behind ``fd`` waited for already?  False where that cannot be asked."""
    if fd is None:
        return False
    try:
        os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True
    return False


def send_signal(fd: int | None, process: Any, *, hard: bool) -> None:
    """SIGKILL (``hard``) or SIGTERM to the process behind ``fd``, else behind multiprocessing's ``process``."""
    try:
        if fd is not None:
            signal.pidfd_send_signal(fd, signal.SIGKILL if hard else signal.SIGTERM)
        elif hard:
            process.kill()
        else:
            process.terminate()
    except (ProcessLookupError, ValueError):
        pass  # dead already, or closed
