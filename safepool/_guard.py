"""Runs one command, and lets nothing outlive it, however it ends, and whoever of the two who watch it is killed.

    safepool run  --->  the guard  --->  the command  --->  whatever it starts
    signals, time       its parent, adopts what loses its parent, ends it

The guard ends everything when the command has ended, or when ``safepool run`` is gone.  If the guard is gone,
``safepool run`` adopts what it had, and ends it.  Both signal only their own children that were not waited for.
"""

from __future__ import annotations

import marshal
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from time import monotonic, sleep
from typing import Any, NamedTuple, NoReturn

from . import _registry, _tags
from ._families import MOST_TOLD
from ._os import linux
from ._packets import receive, send

#: What the program is to decide upon: it is passed on, unless the terminal has sent it to the program, too.
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
LAST_WORDS = (signal.SIGTERM, signal.SIGHUP)  # whoever sends these wants an end
NOT_FOUND, NOT_EXECUTABLE = 127, 126  # as a shell has it
LOOK_AGAIN_S = 0.01
SETTLE_S = 0.5  # for what ends by itself when the program has ended
HELPERS = ("from multiprocessing.", "from joblib.externals.loky", "from loky.backend")
HOPELESS_S = 10.0  # for what is killed to be gone; in uninterruptible sleep it never is
LONGEST_S = 3600.0
IMPATIENT = 3  # Ctrl-C so often: it is killed


class Ended(NamedTuple):
    """How a command ended.

    ``status``: as ``os.waitstatus_to_exitcode`` gives it; ``left``: what it left, and was ended, as pids and command
    lines, the first of them; ``why``: why it was stopped, if it was.
    """

    status: int
    left: list[tuple[int, str]]
    why: str = ""


def run(
    command: list[str], environ: Mapping[str, str], folder: str, *, time_limit_s: float | None, grace_s: float
) -> Ended:
    """Run ``command`` in the place of this process, as far as can be: terminal, streams, directory, signals.

    ``folder``: is removed if this process is killed; ``grace_s``: from SIGTERM to SIGKILL, for the command when it is
    stopped and for what it leaves.
    """
    signals = {*PASSED_ON, signal.SIGCHLD}
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, children would vanish before they are waited for
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    linux.adopt_orphans()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    facts = _registry.facts_of(os.getpid())
    guard = os.fork()
    if guard == 0:
        ours.close()
        _live_as_guard(_Guard(theirs, grace_s), folder, facts, lambda guard: guard.start(command, environ, mask))
    theirs.close()
    try:
        return _Supervisor(guard, ours, time_limit_s, grace_s).run(signals)
    finally:
        ours.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Supervisor:
    """Hears signals, looks at the clock, and says what is to be done."""

    def __init__(self, guard: int, channel: socket.socket, time_limit_s: float | None, grace_s: float) -> None:
        self._guard = guard
        self._channel = channel
        self._grace_s = grace_s
        self._limit_s = time_limit_s
        self._stop_at = None if time_limit_s is None else monotonic() + time_limit_s
        self._kill_at: float | None = None
        self._interrupts = 0
        self._why = ""

    def run(self, signals: Iterable[int]) -> Ended:
        while True:
            due = min((moment for moment in (self._stop_at, self._kill_at) if moment is not None), default=None)
            wait_s = LONGEST_S if due is None else min(max(0.0, due - monotonic()), LONGEST_S)
            heard = signal.sigtimedwait(signals, wait_s)
            if heard is not None and heard.si_signo != signal.SIGCHLD:
                self._pass_on(heard)
            ended = self._reap()
            if ended is not None:
                return ended
            self._look_at_the_clock()

    def _pass_on(self, heard: signal.struct_siginfo) -> None:
        number = heard.si_signo
        if heard.si_code <= 0:  # from a process; else from the terminal, and the program has it too
            send(self._channel, number)
        self._interrupts += number == signal.SIGINT
        if number in LAST_WORDS and self._kill_at is None:
            self._kill_at = monotonic() + self._grace_s
        elif self._interrupts >= IMPATIENT:
            self._kill_at = monotonic()

    def _look_at_the_clock(self) -> None:
        now = monotonic()
        if self._stop_at is not None and now >= self._stop_at:
            self._why = f"it was stopped at its time limit of {self._limit_s:g} s"
            self._stop_at = None
            self._kill_at = now + self._grace_s
            send(self._channel, int(signal.SIGTERM))
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            send(self._channel, int(signal.SIGKILL))

    def _reap(self) -> Ended | None:
        """None: the guard lives."""
        if os.waitpid(self._guard, os.WNOHANG) == (0, 0):
            return None
        data, _ = receive(self._channel)
        if data:
            status, left = marshal.loads(data)
            return Ended(status, left, self._why)
        family = _Family()  # it was the guard's, and is ours now
        while family.end(signal.SIGKILL):
            sleep(LOOK_AGAIN_S)
        return Ended(-signal.SIGKILL, family.told, "it was ended because the process that guards it was killed")


class _Family:
    """All children of this process, and what they leave to it, but for what is left running on purpose."""

    def __init__(self) -> None:
        self.told: list[tuple[int, str]] = []
        self._signalled: set[tuple[int, int]] = set()
        self._is_marked = _tags.is_left_on_purpose(linux.own_tag())  # then all are, and it means nothing
        self._settle_at = monotonic() + SETTLE_S
        self._give_up_at = monotonic() + HOPELESS_S

    def end(self, number: int) -> bool:
        """Reap the dead, send this signal to the others, once; False: there is nobody to wait for."""
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        there = False
        for pid in linux.children():
            if self._is_marked or not _tags.is_left_on_purpose(linux.tag_of(pid)):
                there |= self._signal(pid, number)
        return there and monotonic() < self._give_up_at

    def _signal(self, pid: int, number: int) -> bool:
        """A child that was not waited for, so its pid is nobody else's.  False: it is another user's, and goes on."""
        if (pid, number) in self._signalled:
            return True
        words = linux.words_of(pid)
        is_about_to_end = words.startswith("[") or any(helper in words for helper in HELPERS)
        if number != signal.SIGKILL and monotonic() < self._settle_at and is_about_to_end:
            return True
        self._signalled.add((pid, number))
        is_news = words and all(pid != known for known, _ in self.told) and len(self.told) < MOST_TOLD
        try:
            os.kill(pid, number)
        except PermissionError:
            words += ", which is another user's and goes on"
            return False
        finally:
            if is_news:
                self.told.append((pid, words))
        return True


class _Guard:
    """The parent of the command: does what it is told, and ends what is left."""

    def __init__(self, channel: socket.socket, grace_s: float) -> None:
        self.channel = channel
        self.is_alone = False
        self._grace_s = grace_s
        self._command = 0  # its pid, until it was waited for
        self._status = 0
        self._kill_at: float | None = None  # what the command has left
        self.number = _tags.of_run(os.urandom(8), linux.own_tag())
        awake, waker = socket.socketpair()
        for end in (awake, waker):
            end.setblocking(False)
        signal.set_wakeup_fd(waker.detach(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _do_nothing)
        self._awake = awake

    def start(self, command: list[str], environ: Mapping[str, str], mask: Any) -> None:
        def be_the_program() -> None:
            linux.end_with_parent()
            if self.number is not None:
                linux.wear((self.number, self.number))
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

        try:  # (There are no threads here.)
            self._command = subprocess.Popen(command, env=dict(environ), preexec_fn=be_the_program).pid  # noqa: PLW1509
        except OSError as error:
            self._status = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
            print(f"safepool: cannot run {command[0]!r}: {error.strerror}", file=sys.stderr, flush=True)
        # Only now, for the command belongs to the terminal.  Whoever kills that whole group does not hit the guard.
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})

    def run(self) -> tuple[int, list[tuple[int, str]]]:
        """Until nobody is left: the status of the command, and who was."""
        poll = select.poll()
        poll.register(self.channel, select.POLLIN)
        poll.register(self._awake, select.POLLIN)
        while self._command:
            for fd, _ in poll.poll():
                if fd == self.channel.fileno():
                    self._hear()
            with suppress(BlockingIOError):
                self._awake.recv(4096)
            self._reap()
        family = _Family()
        kill_at = monotonic() + self._grace_s if self._kill_at is None else self._kill_at
        while family.end(signal.SIGTERM if monotonic() < kill_at else signal.SIGKILL):
            if poll.poll(LOOK_AGAIN_S * 1e3):
                self._hear()
                kill_at = kill_at if self._kill_at is None else self._kill_at
                with suppress(BlockingIOError):
                    self._awake.recv(4096)
        return self._status, family.told

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while self._command:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self._command:
                    self._command, self._status = 0, os.waitstatus_to_exitcode(status)

    def _hear(self) -> None:
        try:
            data, _ = receive(self.channel)
        except BlockingIOError:
            return
        self.is_alone = not data
        number = marshal.loads(data) if data else signal.SIGKILL
        if number == signal.SIGKILL:
            self._kill_at = 0.0
        if self._command:
            with suppress(PermissionError):
                os.kill(self._command, number)


def _live_as_guard(guard: _Guard, folder: str, facts: dict[str, object], start: Callable[[_Guard], None]) -> NoReturn:
    """Signals stay blocked: whoever stops the program means the program.

    If both who watch it are killed at once, the next program that starts a pool finds by ``facts`` what is left.
    """
    try:
        linux.be_called(b"safepool-guard")
        linux.adopt_orphans()
        guard.channel.setblocking(False)
        path = None if guard.number is None else _registry.claim(guard.number, facts)
        start(guard)
        ended = guard.run()
        if path is not None:
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
