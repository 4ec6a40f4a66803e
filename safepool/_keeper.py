"""The keeper: a sidecar with one duty, that no process of a pool outlives the user's process.

Guarantees:

* every worker that it has made is its child, and so is whatever of that worker's family loses its parent;
* when a worker ends, in whatever way, its family ends, and only then is its status told;
* when the user's process ends, in whatever way, everything ends;
* it signals its own children that it has not waited for: no other process can have their pids.  And what was never
  its child but wears its tag (workers that the program has forked itself, and theirs), by descriptor.

It has one thread, waits without a limit only for all that it hears at once, and imports next to nothing.

On its control channel, with descriptors, it hears ``("launch", key, preload, leave, body)`` and
``("replace", key)``, a zygote that does not answer, and ``("watch", number, family, leave)`` with a descriptor of a
worker that the program has forked itself.  On the status channel of each worker it says ``("note", why)``,
that its preload could not be used, ``("started", pid)`` with a descriptor of the process, ``("failed", why)`` and
``("exited", status, peak KiB, leftovers)``.  A worker asks it to ``"sweep"`` its family,
to ``"look"`` at it or to ``"spare"`` what is there now, and is answered with leftovers.
"""

from __future__ import annotations

import _socket
import marshal
import os
import resource
import select
from time import monotonic

from . import _families
from ._families import Families
from ._os import linux
from ._packets import IGNORED, receive, send
from ._zygotes import Zygotes

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable
    from typing import Any

    from ._packets import Left, Preload
else:
    import _signal

LOOK_AGAIN_S = 0.02
LAST_LOOK_S = 5.0  # that is given to what may not be signalled, at the end of everything


class OwnerGone(Exception):
    """The user's process has ended."""


class Ward:
    """A worker: launched, perhaps not forked yet, perhaps dead already."""

    def __init__(self, family: int | None, leave: bool, status: int, ask: _socket.socket) -> None:
        self.family = family
        self.leave = leave
        self.status = _socket.socket(fileno=status)
        self.ask = ask
        self.pid = 0

    def tell(self, *words: Any, fd: int | None = None) -> None:
        send(self.status, words, () if fd is None else (fd,))

    def close(self) -> None:
        self.status.close()
        self.ask.close()


class Keeper:
    """See the head of this file."""

    def __init__(self, control: _socket.socket, owner: int, number: int | None) -> None:
        self._control = control
        self._number = number  # its tag
        self._forks: dict[int, tuple[int, int]] = {}  # by pidfd: (number of its keeper, family)
        self.families = Families(number)
        self._zygotes = Zygotes(self)
        self._wards: dict[int, Ward] = {}  # by pid
        self._poll = select.poll()
        self._heard: dict[int, Callable[[], None]] = {}
        self._awake, waker = _socket.socketpair()
        for end in (self._awake, waker, control):
            end.setblocking(False)
        _signal.set_wakeup_fd(waker.detach(), warn_on_full_buffer=False)
        _signal.signal(_signal.SIGCHLD, _do_nothing)
        self.hear(self._awake.fileno(), self._on_awake)
        self.hear(control.fileno(), self._on_control)
        self.hear(owner, self._on_owner)

    def start(self) -> None:
        """Have something to fork the first worker from, while nobody asks for it yet."""
        self._zygotes.start()

    def run(self) -> None:
        """Until the user's process ends."""
        try:
            while True:
                for fd, _ in self._poll.poll(LOOK_AGAIN_S * 1e3 if self.families.is_at_work() else None):
                    self._heard.get(fd, self._on_nobody)()
                self._reap()
                self.families.go_on(self._reap)
        except OwnerGone:
            self._end_everything()

    def hear(self, fd: int, act: Callable[[], None]) -> None:
        self._heard[fd] = act
        self._poll.register(fd, select.POLLIN)

    def unhear(self, fd: int) -> None:
        if self._heard.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def _on_awake(self) -> None:
        try:
            self._awake.recv(4096)
        except BlockingIOError:
            pass

    def _on_nobody(self) -> None:
        """It was unregistered a moment ago."""

    def _on_owner(self) -> None:
        raise OwnerGone

    # --------------------------------------------------------------- launches

    def _on_control(self) -> None:
        try:
            data, fds = receive(self._control)
        except BlockingIOError:
            return
        if not data:
            raise OwnerGone
        word, *more = marshal.loads(data)
        try:
            if word == "launch":
                self._launch(more, fds)
            elif word == "load":
                self._zygotes.load(*more)
            elif word == "replace":
                self._zygotes.replace(more[0])
            elif word == "watch":
                self._watch(more[0], more[1], leave=more[2], pidfd=fds.pop())
        except (OSError, IndexError):
            pass  # short of descriptors or processes: the user's side sees its channel closed, and tries again
        finally:
            for fd in fds:
                os.close(fd)

    def _launch(self, words: Any, fds: list[int]) -> None:
        key, preload, leave, body = words
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        ward = Ward(self.families.new(), leave, fds.pop(0), ours)
        fds.insert(0, theirs.detach())
        self._zygotes.launch(ward, key, preload, body, [*fds])
        fds.clear()  # (not before: if it raises, they are closed here)

    def fork_zygote(self, channel: _socket.socket, preload: Preload) -> int:
        """Raises ``OSError``."""
        pid = os.fork()
        if pid == 0:
            _become_zygote(self, channel, preload)
        return pid

    def adopt(self, ward: Ward, pid: int) -> None:
        """An own child has become this worker."""
        ward.pid = pid
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            _families.kill(pid)
            ward.tell("failed", f"the keeper cannot watch it: {error}")
            ward.close()
            return
        self._wards[pid] = ward
        self.families.begin(ward.family)
        self.hear(ward.ask.fileno(), lambda: self._on_ask(ward))
        ward.tell("started", pid, fd=pidfd)
        os.close(pidfd)

    # ------------------------------------------- workers that the user's process forks

    def _watch(self, number: int, family: int, *, leave: bool, pidfd: int) -> None:
        self._forks[pidfd] = number, family
        self.hear(pidfd, lambda: self._on_forked_end(number, family, leave, pidfd))

    def _on_forked_end(self, number: int, family: int, leave: bool, pidfd: int) -> None:
        """It is not ours to wait for, and what it leaves are not our children: looking for them takes a process."""
        self.unhear(pidfd)
        del self._forks[pidfd]
        os.close(pidfd)
        if leave or (number, family) in self._forks.values():
            return  # (a later worker has been given the same number)
        try:
            child = os.fork()
        except OSError:
            return  # it ends with the program
        if child:
            self.families.not_orphans.add(child)
            return
        try:
            linux.end_with_parent()
            linux.close_but(())  # a lock, and what others take for a sign of the keeper's life
            from . import _sweeping

            _sweeping.ForkedWorker(number, family, 0).end()
        finally:
            os._exit(0)

    # --------------------------------------------------------- the dead, and tasks that end

    def _reap(self) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self.families.not_orphans.discard(pid)
            ward = self._wards.pop(pid, None)
            if ward is not None:
                self.unhear(ward.ask.fileno())
                self._bury(ward, status, usage.ru_maxrss)
                continue
            self._zygotes.buried(pid)

    def _bury(self, ward: Ward, status: int, peak_kib: int) -> None:
        """A worker is dead: end its family, then tell."""

        def tell(found: list[Left]) -> None:
            ward.tell("exited", status, peak_kib, found)
            ward.close()

        self.families.end(ward.family, leave=ward.leave, done=tell)

    def _on_ask(self, ward: Ward) -> None:
        """A task has ended that may have left something."""
        try:
            data, _ = receive(ward.ask)
        except BlockingIOError:
            return
        word = data.decode()
        if not word:
            self.unhear(ward.ask.fileno())
        elif word == "spare":
            self.families.spare(ward.family)
            send(ward.ask, [])
        else:
            self.families.sweep(ward.family, kill=word == "sweep", done=lambda found: send(ward.ask, found))

    # ----------------------------------------------------------------- the end

    def _end_everything(self) -> None:
        for pidfd in self._forks:
            try:
                _signal.pidfd_send_signal(pidfd, _signal.SIGKILL)
            except OSError:
                pass  # it is dead, or another user's
        until = monotonic() + LAST_LOOK_S
        while True:
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                pass
            there, may_not = self.families.kill_all()
            if not there or (there == may_not and monotonic() >= until):
                break
            if select.select([self._awake], [], [], LOOK_AGAIN_S)[0]:
                self._on_awake()
        if self._number is not None:
            _end_by_tag(self._number)
        for number, family in self._forks.values():
            if number != self._number:  # it was forked when another keeper was there
                from . import _sweeping

                _sweeping.ForkedWorker(number, family, 0).end()


def _end_by_tag(number: int) -> None:
    """What never was our child: workers that the user's process forked, and what somebody else has adopted."""
    from . import _sweeping

    _sweeping.end_family(number, LAST_LOOK_S)


def _do_nothing(number: int, frame: Any) -> None:
    pass


def _become_zygote(keeper: Keeper, channel: _socket.socket, preload: Preload) -> None:
    """Never returns.  ``keeper`` is held for ever: its sockets must not be closed by their garbage collection."""
    code = 1
    try:
        _signal.set_wakeup_fd(-1)
        for number, was in _inherited.items():
            _signal.signal(number, was)
        resource.setrlimit(resource.RLIMIT_NOFILE, _files)
        linux.close_but([channel.fileno()])
        linux.be_called(b"safepool-zygote")
        linux.end_with_parent()
        from . import _zygote

        _zygote.serve(channel, preload, os.getppid())
        code = 0
    finally:
        os._exit(code)


_inherited: dict[int, Any] = {}  # what signals did before the keeper ignored them
_files = (0, 0)  # how many descriptors a worker may have


def main(control: int, owner: int, number: int, isolated: int) -> None:
    """The life of a keeper.  ``owner``: the pid of the user's process; ``number``: its tag, or 0."""
    global _files
    linux.close_but([control])
    _fill_streams()
    linux.be_called(b"safepool-keeper")
    for signal in IGNORED:
        _inherited[signal] = _signal.signal(signal, _signal.SIG_IGN)
    _inherited[_signal.SIGCHLD] = _signal.SIG_DFL
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
    os.setsid()
    _files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_files[1], _files[1]))
    try:
        owner_fd = os.pidfd_open(owner)
    except ProcessLookupError:
        owner_fd = -1
    if os.getppid() != owner or owner_fd < 0:
        if number:
            _end_by_tag(number)  # it forked workers itself, perhaps, while we were on our way
        return
    if number:
        try:
            linux.wear((number, number))
        except (OSError, ValueError):
            number = 0
    channel = _socket.socket(fileno=control)
    from . import _registry

    facts = _registry.facts_of(owner)
    if isolated:
        from . import _isolation

        _isolation.enter(channel)
    else:
        linux.adopt_orphans()
    keeper = Keeper(channel, owner_fd, number or None)
    linux.let_go_of(0, 1, 2)  # what reads the program's output must see its end when the program closes it
    path = _registry.claim(number, facts) if number else None
    keeper.start()
    keeper.run()
    if path is not None:
        _registry.withdraw(path)


def _fill_streams() -> None:
    """The program may have closed its own; nothing of ours may be opened there, for they are let go soon."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
