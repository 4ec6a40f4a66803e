"""The operating system in a handful of verbs; nobody else asks what platform this is.

* ``above_standard()``: no descriptor that is opened within is taken for a standard stream;
* ``socket_of(fd)``: the socket behind a descriptor, as much of it as a worker needs;
* ``open_channel() -> (ours, worker's)``: a private pair of connected sockets, kept out of forked children;
* ``open_answers() -> (ours, worker's)``, ``open_tickets() -> (ours, worker's)``: pipes for them, the same way;
* ``keep(end)``, ``close(end)``: a worker's end becomes ours too; the end of one of ours;
* ``send_some(socket, buffers)``: one write, of many buffers where that is possible;
* ``watch(pid) -> fd | None``: readable when that process is dead; None: ask ``is_dead`` again and again;
* ``open_board(size)``, ``open_token()``: memory that is shared with a worker; a number that one of us two can take;
* ``descriptor_in(message)``: that came with a message;
* ``draw(tickets, into)``, ``write(fd, data)``, ``read(fd, most)``: a read of a pipe that never waits; one call each;
* ``has_room(fd)``: a few kilobytes can be written to it without blocking;
* ``is_reaped(fd)``: the status of this dead child was taken by somebody else, and will never be known;
* ``send_signal(fd, process, number)``: to that very process, never to a pid that was reused;
* ``CAPABILITIES``: what this platform gives; what is missing is said in ``MISSING``.
"""

from __future__ import annotations

import _socket
import errno
import os
import stat
import sys
from _thread import RLock, _local

from .._shapes import NamedTuple

# Workers load this, and wait for it: modules that only their parent uses are imported where they are used.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    import socket
    from typing import Any
else:
    import _signal as signal

#: What can be had here: ``pidfd`` (death is learnt from the kernel at once), ``take_back`` (tasks
#: that a worker has not begun can be withdrawn from it), ``board`` (the items of a ``map`` travel together, and none is
#: lost with its worker), ``big_data`` (it is copied once on its way, through memory that both sides see), ``fork``,
#: ``keeper`` (nothing outlives its owner).
CAPABILITIES: frozenset[str] = frozenset(
    name
    for name, there in {
        "pidfd": hasattr(os, "pidfd_open") and hasattr(signal, "pidfd_send_signal"),
        "take_back": sys.platform != "win32",
        # (What one core writes first another one must see first: so it is there, and Python has no word for it.)
        "board": sys.platform == "linux"
        and os.uname().machine == "x86_64"
        and all(map(hasattr, (os, os, _socket.socket), ("memfd_create", "eventfd", "recvmsg_into"))),
        "big_data": sys.platform != "win32"
        and all(map(hasattr, (os, os, _socket.socket), ("memfd_create", "preadv", "recvmsg_into"))),
        "fork": hasattr(os, "fork"),
        "keeper": sys.platform == "linux" and hasattr(os, "pidfd_open") and os.path.isdir("/proc/self/task"),
    }.items()
    if there
)

#: What a platform without a capability does not guarantee.
MISSING: dict[str, str] = {
    "pidfd": "the death of a worker is noticed by asking 20 times a second, not at once",
    "take_back": "a task that was sent to a worker can no longer be cancelled, and workers get one task at a time",
    "board": "the items of a map travel one at a time",
    "big_data": "big arrays and bytes travel through the channel, as fast as with the standard library",
    "fork": "workers are started as new interpreters",
    "keeper": "what tasks start is not ended with them, and workers that are busy outlive a program that is killed",
}

_STANDARD = (0, 1, 2)
FORK_LIMIT_S = 0.5  # for a fork, and for a pair to be written down
ASK_AGAIN_S = 0.05  # how often a death is asked for where it is not reported

# Parent-side sockets, by descriptor.  A forked child (a worker under "fork", or a program's own
# fork) must not keep them open: the worker at the far end would never see its parent go.
_ours: dict[int, socket.socket | End] = {}
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


class End:
    """One end of a pipe.  Pickles while a process is being started, as sockets do."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def read_into(self, buffer: bytearray) -> int:
        """How many bytes came; 0: the far end is closed.  Raises ``OSError``."""
        return os.readv(self._fd, (buffer,))

    def write(self, data: bytes) -> None:
        """All of it.  Raises ``OSError``."""
        sent = os.write(self._fd, data)
        while sent < len(data):  # a signal came
            data = data[sent:]
            sent = os.write(self._fd, data)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> Any:
        from multiprocessing.reduction import DupFd

        return _end_again, (DupFd(self._fd),)


def _end_again(duplicate: Any) -> End:
    return End(duplicate.detach())


class _SocketEnd(End):
    """The same where a selector takes no pipes."""

    __slots__ = ("_socket",)

    def __init__(self, end: Any) -> None:
        super().__init__(end.fileno())
        self._socket = end

    def read_into(self, buffer: bytearray) -> int:
        return int(self._socket.recv_into(buffer))

    def write(self, data: bytes) -> None:
        self._socket.sendall(data)

    def close(self) -> None:
        self._fd = -1
        self._socket.close()

    def __reduce__(self) -> Any:
        return _SocketEnd, (self._socket,)


class Ends(NamedTuple):
    """A worker's: calls come on ``channel``, ``answers`` go home, ``tickets`` are drawn (None where they are not)."""

    channel: _socket.socket
    answers: End
    tickets: End | None = None

    def close(self) -> None:
        for end in self:
            if end is not None:
                end.close()


def moved_up(ends: Ends) -> Ends:
    """The same, but not where a standard stream should be."""
    if not any(end is not None and end.fileno() in _STANDARD for end in ends):
        return ends
    with above_standard():
        copies: list[Any] = [socket_of(_socket.dup(ends.channel.fileno()))]
        copies += [end if end is None or type(end) is not End else End(os.dup(end.fileno())) for end in ends[1:]]
    for end, copy in zip(ends, copies):
        if end is not None and end is not copy:
            end.close()
    return Ends(*copies)


def open_channel() -> tuple[socket.socket, socket.socket]:
    """A new pair of connected stream sockets.  Raises ``OSError`` when descriptors run out."""
    import socket

    locked: list[bool] = []
    try:
        _lock_ours(locked)
        ours, theirs = socket.socketpair()
        _ours[ours.fileno()] = ours
    finally:
        if locked == [True]:  # (not a call, after which a handler may run)
            _ours_lock.release()
    return ours, theirs


def _lock_ours(locked: list[bool]) -> None:
    # Scenario 7: (a) this has got the lock, (b) a signal handler of the user's raises, (c) every launch from then on
    # waits for it in vain.  So it is noted before a handler can run: there is no line between.
    locked.extend(map(_ours_lock.acquire, (True,), (FORK_LIMIT_S,)))


def open_answers() -> tuple[End, End]:
    """A new pipe to us.  Raises ``OSError`` when descriptors run out."""
    if sys.platform == "win32":
        import socket

        ours, theirs = map(_SocketEnd, socket.socketpair())
        ours._socket.setblocking(False)
        return ours, theirs
    theirs, ours = _open_pipe(ours=0)
    os.set_blocking(ours.fileno(), False)
    return ours, theirs


def open_tickets() -> tuple[End, End]:
    """A new pipe to a worker, of which no end ever waits.  Raises ``OSError`` when descriptors run out."""
    # For ``unread_bytes``.  Scenario 5: later, when it is called, no descriptor is left to load them by.
    import fcntl  # noqa: F401
    import termios  # noqa: F401

    theirs, ours = _open_pipe(ours=1)
    for end in (ours, theirs):
        os.set_blocking(end.fileno(), False)
    return ours, theirs


def _open_pipe(ours: int) -> tuple[End, End]:
    locked: list[bool] = []
    try:
        _lock_ours(locked)
        ends = tuple(map(End, os.pipe()))
        _ours[ends[ours].fileno()] = ends[ours]
    finally:
        if locked == [True]:  # (not a call, after which a handler may run)
            _ours_lock.release()
    return ends[1 - ours], ends[ours]


def open_board(size: int) -> End:
    """Memory for a worker and us.  Raises ``OSError``."""
    board: End = keep(End(os.memfd_create("safepool-board")))
    try:
        os.ftruncate(board.fileno(), size)
    except BaseException:
        close(board)
        raise
    return board


def open_token() -> End:
    """What one of a worker and us can take, and the other cannot then.  Raises ``OSError``."""
    token: End = keep(End(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)))
    return token


def put_token(token: End, number: int) -> None:
    """In the place of the last one, taken or not."""
    take_token(token)
    os.eventfd_write(token.fileno(), number)


def take_token(token: End) -> int:
    """0: it was taken."""
    try:
        return os.eventfd_read(token.fileno())
    except BlockingIOError:
        return 0


def keep(end: Any) -> Any:
    """Count a worker's end among ours, once the worker has its own copy."""
    _ours[end.fileno()] = end
    return end


def close(end: Any) -> None:
    disown(end).close()


def disown(end: Any) -> Any:
    """Count it among ours no more."""
    _ours.pop(end.fileno(), None)
    return end


def unread_bytes(fd: int) -> int:
    """In a pipe, of which this is either end."""
    import fcntl
    import termios

    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)


def draw(tickets: End, into: list[bytearray]) -> int:
    """Read from a pipe without ever waiting; how many bytes.  Raises ``BlockingIOError``, and ``OSError``.

    Scenario 4: a task puts another pipe in this one's place, which blocks.  (A pipe of ours does not.)
    """
    global _can_ask_not_to_wait
    if _can_ask_not_to_wait:
        try:
            return os.preadv(tickets.fileno(), into, -1, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:  # a kernel before 6.4
                raise
            _can_ask_not_to_wait = False
    return os.readv(tickets.fileno(), into)


_can_ask_not_to_wait = hasattr(os, "RWF_NOWAIT")
write = os.write
read = os.read


def read_at(fd: int, size: int, at: int) -> bytes:
    """A place in memory that is shared, without a descriptor or a mapping more.  Raises ``OSError``."""
    return os.pread(fd, size, at)


def send_some(channel: socket.socket, buffers: list[memoryview]) -> int:
    """Write as much of ``buffers`` as goes at once; how many bytes went.  Raises ``OSError``."""
    if hasattr(channel, "sendmsg"):
        return channel.sendmsg(buffers)
    return channel.send(buffers[0])


def descriptor_in(more: list[tuple[int, int, bytes]]) -> int | None:
    """What ``recvmsg`` received beside the data; never where a standard stream should be."""
    fd = next((bits[:4] for _, kind, bits in more if kind == _socket.SCM_RIGHTS and len(bits) >= 4), None)
    return None if fd is None else above(int.from_bytes(fd, sys.byteorder))


def above(fd: int) -> int:
    """The same file, but not where a standard stream should be.

    Scenario 6: a task, or the program, has closed descriptor 1, and what it prints would go into a block of memory.
    """
    if fd not in _STANDARD:
        return fd
    try:
        with above_standard():
            return os.dup(fd)
    finally:
        os.close(fd)


def has_room(fd: int) -> bool:
    """A few kilobytes can be written to ``fd`` at once, as far as that can be asked.  Raises ``OSError``."""
    if sys.platform == "win32":
        return True
    try:
        import fcntl
        import select
        import termios  # noqa: F401
    except ImportError:  # no descriptor is left to load them by
        return False
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    if not poll.poll(0):
        return False
    if hasattr(fcntl, "F_GETPIPE_SZ") and stat.S_ISFIFO(os.fstat(fd).st_mode):
        # A pipe counts as writable when one page is free, and a buffer may hold four.
        return unread_bytes(fd) * 2 <= fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
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
