"""Runs one command, and lets nothing outlive it, however it ends, and whoever of the two who watch it is killed.

    safepool run  --->  the guard  --->  the command  --->  whatever it starts
    signals, time       its parent, adopts what loses its parent, ends it

The guard ends everything when the command has ended, or when ``safepool run`` is gone.  If the guard is gone,
``safepool run`` adopts what it had, and ends it.  Both signal only their own children that were not waited for.
"""

from __future__ import annotations

import errno
import marshal
import os
import select
import shutil
import signal
import socket
import sys
from contextlib import contextmanager, suppress
from time import monotonic, sleep

from . import _os, _registry, _summary, _tags
from ._families import MOST_TOLD
from ._os import linux
from ._packets import receive, send
from ._shapes import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping
    from typing import Any, NoReturn

    from ._packets import Left

#: What the program is to decide upon: it is passed on, unless the terminal has sent it to the program, too.
PASSED_ON = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM,
    signal.SIGCONT, signal.SIGWINCH,
)  # fmt: skip
PROGRAM = "SAFEPOOL_PROGRAM"  # the pid of the command: what it starts finds that it is another process
LIMIT = 0  # what the guard is told at the time limit, in the place of a signal
NOT_FOUND, NOT_EXECUTABLE = 127, 126  # as a shell has it
UNKNOWN = 1  # an exit status that somebody else has taken
LOOK_AGAIN_S = 0.01
SETTLE_S = 0.5  # for what ends by itself when the program has ended
HELPERS = ("from multiprocessing.", "from joblib.externals.loky", "from loky.backend")
HOPELESS_S = 10.0  # for what is killed to be gone; in uninterruptible sleep it never is
GUARD_S = 3.0  # for the guard to do what it is told, at the end; then somebody has stopped it
LONGEST_S = 3600.0


class Ended(NamedTuple):
    """How a command ended.

    ``status``: as ``os.waitstatus_to_exitcode`` gives it; ``left``: what it left, as far as there is room; ``why``: why
    it was stopped, if it was.
    """

    status: int
    left: list[Left]
    why: str = ""


@contextmanager
def held_back() -> Iterator[set[int]]:
    """Within, signals wait to be asked for: a folder, say, is not left over.  Gives what was held back before."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, children would vanish before they are waited for
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _listened_to())
    try:
        yield mask
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _listened_to() -> set[int]:
    """What the caller has this process ignore (nohup) it goes on to ignore, and so does the program."""
    return {signal.SIGCHLD, *(number for number in PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN)}


def run(
    command: list[str],
    environ: Mapping[str, str],
    folder: str,
    *,
    mask: set[int],
    time_limit_s: float | None,
    grace_s: float,
) -> Ended:
    """Run ``command`` in the place of this process, as far as can be: terminal, streams, directory, signals.

    Within ``held_back``, which gives ``mask``.  ``folder``: is removed if this process is killed; ``grace_s``: from
    SIGTERM to SIGKILL, for the command at its time limit and for what it leaves.
    """
    others = frozenset(linux.children())  # of whoever was this process before it became safepool
    linux.adopt_orphans()
    with _os.above_standard():  # the program may have been started without some of its streams
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        guard = _Guard(theirs, grace_s)
    facts = _registry.facts_of(os.getpid())
    pid = os.fork()
    if pid == 0:
        ours.close()
        _live_as_guard(guard, folder, facts, lambda: guard.start(command, environ, mask))
    guard.let_go()
    linux.let_go_of(0, 1)  # they are the program's: whoever is at the other end must see it close them
    with ours:
        return _Supervisor(pid, ours, others, time_limit_s, grace_s).run(_listened_to())


class _Supervisor:
    """Hears signals, looks at the clock, and says what is to be done."""

    def __init__(
        self, guard: int, channel: socket.socket, others: Container[int], limit_s: float | None, grace_s: float
    ) -> None:
        self._guard = guard
        self._channel = channel
        self._others = others
        self._grace_s = grace_s
        self._limit_s = limit_s
        self._stop_at = None if limit_s is None else monotonic() + limit_s
        self._kill_at: float | None = None
        self._take_over_at: float | None = None

    def run(self, signals: Iterable[int]) -> Ended:
        while True:
            moments = (self._stop_at, self._kill_at, self._take_over_at)
            due = min((moment for moment in moments if moment is not None), default=None)
            wait_s = LONGEST_S if due is None else min(max(0.0, due - monotonic()), LONGEST_S)
            heard = signal.sigtimedwait(signals, wait_s)
            if heard is not None and heard.si_signo != signal.SIGCHLD and not _program_has_it(heard):
                send(self._channel, heard.si_signo)
            ended = self._reap()
            if ended is not None:
                return ended
            self._look_at_the_clock(monotonic())

    def _look_at_the_clock(self, now: float) -> None:
        if self._stop_at is not None and now >= self._stop_at:
            self._stop_at = None
            self._kill_at = now + self._grace_s
            send(self._channel, LIMIT)
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            self._take_over_at = now + GUARD_S
            send(self._channel, int(signal.SIGKILL))
        if self._take_over_at is not None and now >= self._take_over_at:
            self._take_over_at = None
            os.kill(self._guard, signal.SIGKILL)  # its child, and not waited for

    def _reap(self) -> Ended | None:
        """None: the guard lives."""
        if os.waitpid(self._guard, os.WNOHANG) == (0, 0):
            return None
        # Scenario 1: (a) the guard has said its last, (b) we pass on a signal that it does not read any more, (c) it
        # ends: the first thing that is read then is that the connection was reset.
        data = receive(self._channel)[0] or receive(self._channel)[0]
        if data:
            status, left, is_stopped = marshal.loads(data)
            return Ended(status, left, f"it was stopped at its time limit of {self._limit_s:g} s" if is_stopped else "")
        family = _Family(self._others)  # it was the guard's, and is ours now
        while family.end(signal.SIGKILL):
            sleep(LOOK_AGAIN_S)
        return Ended(-signal.SIGKILL, family.told, "it was ended because the process that guards it was killed")


def _program_has_it(heard: signal.struct_siginfo) -> bool:
    """The terminal sends to all that is in its foreground; but that it hangs up, to the leader of the session only."""
    is_hangup = heard.si_signo == signal.SIGHUP and os.getsid(0) == os.getpid()
    return heard.si_code > 0 and not is_hangup


class _Family:
    """All children of this process, and what they leave to it, but for what is left running on purpose."""

    def __init__(self, others: Container[int] = ()) -> None:
        self.is_gone = False
        self._others = others
        self._told: dict[int, Left] = {}
        self._signalled: set[tuple[int, int]] = set()
        self._refused: set[int] = set()
        self._is_marked = _tags.is_left_on_purpose(linux.own_tag())  # then all are, and it means nothing
        self._settle_at = monotonic() + SETTLE_S
        self._give_up_at = float("inf")

    @property
    def told(self) -> list[Left]:
        """Those that were there: pid, command line, was it ended."""
        return list(self._told.values())

    def end(self, number: int) -> bool:
        """Reap the dead, send this signal to the others, once; False: there is nobody to wait for."""
        with suppress(ChildProcessError):
            while pid := os.waitpid(-1, os.WNOHANG)[0]:
                self._signalled -= {(pid, signal.SIGTERM), (pid, signal.SIGKILL)}  # it may be another's soon
        if number == signal.SIGKILL:
            self._give_up_at = min(self._give_up_at, monotonic() + HOPELESS_S)
        mine = [pid for pid in linux.children() if pid not in self._others and pid not in self._refused]
        there = [pid for pid in mine if self._is_marked or not _tags.is_left_on_purpose(linux.tag_of(pid))]
        for pid in there:
            if (pid, number) not in self._signalled:
                self._signal(pid, number)
        self.is_gone = not there
        return bool(there) and monotonic() < self._give_up_at

    def _signal(self, pid: int, number: int) -> None:
        """A child that was not waited for, so its pid is nobody else's."""
        words = linux.words_of(pid)
        is_about_to_end = words.startswith("[") or any(helper in words for helper in HELPERS)
        if number != signal.SIGKILL and monotonic() < self._settle_at and is_about_to_end:
            return
        self._signalled.add((pid, number))
        try:
            os.kill(pid, number)
        except PermissionError:
            self._refused.add(pid)
        if words and len(self._told) < MOST_TOLD:
            self._told.setdefault(pid, (pid, words, pid not in self._refused))


class _Guard:
    """The parent of the command: does what it is told, and ends what is left."""

    def __init__(self, channel: socket.socket, grace_s: float) -> None:
        self.channel = channel
        self.is_alone = False
        self.number = _tags.of_run(os.urandom(8), linux.own_tag())
        self._grace_s = grace_s
        self._command = 0  # its pid, until it was waited for
        self._status = 0
        self._is_stopped = False  # at the time limit
        self._kill_at = float("inf")  # whatever is there
        self._awake, self._waker = socket.socketpair()
        for end in (self._awake, self._waker):
            end.setblocking(False)
        self._poll = select.poll()
        self._poll.register(channel, select.POLLIN)
        self._poll.register(self._awake, select.POLLIN)
        self._pipe = os.pipe()

    def let_go(self) -> None:
        """In the process that it was made in, where it does not live."""
        for end in (self.channel, self._awake, self._waker):
            end.close()
        for fd in self._pipe:
            os.close(fd)

    def start(self, command: list[str], environ: Mapping[str, str], mask: set[int]) -> None:
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _do_nothing)
        read, write = self._pipe
        self._command = os.fork()
        if self._command == 0:
            self._become(command, environ, mask, write)
        os.close(write)
        trouble = os.read(read, 16)  # nothing, when it is closed by the start of the program
        os.close(read)
        if trouble:
            code = int(trouble)
            status = NOT_FOUND if code in (errno.ENOENT, errno.ENOTDIR) else NOT_EXECUTABLE
            _summary.say(f"safepool: cannot run {command[0]!r}: {os.strerror(code)}")
            os.waitpid(self._command, 0)  # it is at its end
            self._command, self._status = 0, status
        # Only now, for the command belongs to the terminal.  Whoever kills that whole group does not hit the guard.
        os.setsid()
        linux.let_go_of(0, 1)
        linux.close_but([self.channel.fileno(), self._awake.fileno(), self._waker.fileno()])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})

    def _become(self, command: list[str], environ: Mapping[str, str], mask: set[int], write: int) -> NoReturn:
        environ = {**environ, PROGRAM: str(os.getpid())}
        try:
            linux.end_with_parent()
            if self.number is not None:
                linux.wear((self.number, self.number))
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):  # what the interpreter has changed
                signal.signal(number, signal.SIG_DFL)
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # one that waits must not come to Python code here
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            path = shutil.which(command[0], path=environ.get("PATH", os.defpath)) or command[0]
            try:
                os.execve(path, command, environ)
            except OSError as error:
                if error.errno != errno.ENOEXEC:
                    raise
                os.execve("/bin/sh", ["sh", path, *command[1:]], environ)
        except OSError as error:
            os.write(write, b"%d" % (error.errno or errno.EINVAL))
        finally:
            os._exit(NOT_EXECUTABLE)

    def run(self) -> tuple[int, list[Left], bool]:
        """Until nobody is left: the status of the command, who was, and whether it was stopped at the limit."""
        while self._command:
            self._wait(None)
            self._reap()
        family = _Family()
        self._kill_at = min(self._kill_at, monotonic() + self._grace_s)
        while family.end(signal.SIGTERM if monotonic() < self._kill_at else signal.SIGKILL):
            self._wait(LOOK_AGAIN_S)
        if not family.is_gone:
            self.number = None  # they are left to ``safepool clean``
        return self._status, family.told, self._is_stopped

    def _wait(self, seconds: float | None) -> None:
        for fd, _ in self._poll.poll(None if seconds is None else seconds * 1e3):
            if fd == self._awake.fileno():
                with suppress(BlockingIOError):
                    self._awake.recv(4096)
            else:
                self._hear()

    def _reap(self) -> None:
        try:
            while self._command:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self._command:
                    self._command, self._status = 0, os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            self._command, self._status = 0, UNKNOWN

    def _hear(self) -> None:
        try:
            data, _ = receive(self.channel)
        except BlockingIOError:
            return
        if not data:  # whom all this is for is gone
            self._poll.unregister(self.channel)
            self.is_alone = True
        number = marshal.loads(data) if data else int(signal.SIGKILL)
        if number == signal.SIGKILL or (number == LIMIT and not self._command):
            self._kill_at = 0.0
        self._is_stopped |= number == LIMIT and bool(self._command)
        if self._command:
            with suppress(PermissionError):
                os.kill(self._command, signal.SIGTERM if number == LIMIT else number)


def _live_as_guard(guard: _Guard, folder: str, facts: dict[str, object], start: Callable[[], None]) -> NoReturn:
    """Signals stay blocked: whoever stops the program means the program.

    If both who watch it are killed at once, the next program that starts a pool finds by ``facts`` what is left.
    """
    try:
        linux.be_called(b"safepool-guard")
        linux.adopt_orphans()
        guard.channel.setblocking(False)
        start()
        path = None if guard.number is None else _registry.claim(guard.number, facts)
        ended = guard.run()
        if path is not None and guard.number is not None:
            _registry.withdraw(path)
        if guard.is_alone:
            shutil.rmtree(folder, ignore_errors=True)
        send(guard.channel, ended)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(0)


def _do_nothing(number: int, frame: Any) -> None:
    pass
