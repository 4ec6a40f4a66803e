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

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable, Iterator
    from typing import Any

    from ._packets import Left, Preload
else:
    import _signal

LOOK_AGAIN_S = 0.02
LAST_LOOK_S = 5.0  # that is given to what may not be signalled, at the end of everything
MOST_ZYGOTES = 4
PLAIN = ""  # the key of the zygote that has loaded nothing of the user's


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


class Zygote:
    """A process that forks workers, one at a time."""

    def __init__(self, pid: int, channel: _socket.socket, is_loaded: bool) -> None:
        self.pid = pid
        self.channel = channel
        self.is_loaded = is_loaded
        self.waiting: list[tuple[Ward, tuple[Any, ...], list[int]]] = []
        self.at_work: Ward | None = None
        self.spare = 0  # the pid of the one that was forked in advance


class Keeper:
    """See the head of this file."""

    def __init__(self, control: _socket.socket, owner: int, number: int | None) -> None:
        self._control = control
        self._number = number  # its tag
        self._forks: dict[int, tuple[int, int]] = {}  # by pidfd: (number of its keeper, family)
        self._families = Families(number)
        self._zygotes: dict[str, Zygote] = {}
        self._unfit: dict[str, str] = {}  # preloads that cannot be forked, and why
        self._wards: dict[int, Ward] = {}  # by pid
        self._strangers: dict[int, tuple[int, int]] = {}  # (status, KiB) of the dead, while a launch is under way
        self._poll = select.poll()
        self._heard: dict[int, Callable[[], None]] = {}
        self._awake, waker = _socket.socketpair()
        for end in (self._awake, waker, control):
            end.setblocking(False)
        _signal.set_wakeup_fd(waker.detach(), warn_on_full_buffer=False)
        _signal.signal(_signal.SIGCHLD, _do_nothing)
        self._hear(self._awake.fileno(), self._on_awake)
        self._hear(control.fileno(), self._on_control)
        self._hear(owner, self._on_owner)

    def run(self) -> None:
        """Until the user's process ends."""
        try:
            while True:
                for fd, _ in self._poll.poll(LOOK_AGAIN_S * 1e3 if self._families.is_at_work() else None):
                    self._heard.get(fd, self._on_nobody)()
                self._reap()
                self._families.go_on(self._reap)
        except OwnerGone:
            self._end_everything()

    def _hear(self, fd: int, act: Callable[[], None]) -> None:
        self._heard[fd] = act
        self._poll.register(fd, select.POLLIN)

    def _unhear(self, fd: int) -> None:
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
            elif word == "replace":
                zygote = self._zygotes.get(more[0]) or self._zygotes.get(PLAIN)
                if zygote is not None:
                    _families.kill(zygote.pid)
            elif word == "watch":
                self._watch(more[0], more[1], leave=more[2], pidfd=fds.pop())
        except (OSError, IndexError):
            pass  # short of descriptors or processes: the user's side sees its channel closed, and tries again
        finally:
            for fd in fds:
                os.close(fd)

    def _launch(self, words: Any, fds: list[int]) -> None:
        """From a zygote that has loaded ``preload``, or from the plain one if that cannot be."""
        key, preload, leave, body = words
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        ward = Ward(self._families.new(), leave, fds.pop(0), ours)
        why = self._unfit.get(key)
        if why:
            ward.tell("note", why)
            self._unfit[key] = ""  # once is enough
        if why is not None:
            key, preload = PLAIN, None
        if key not in self._zygotes and not self._has_room():
            key, preload = PLAIN, None
        zygote = self._zygotes.get(key) or self._add_zygote(key, preload)
        zygote.waiting.append((ward, (ward.family, body), [theirs.detach(), *fds]))
        fds.clear()
        self._next_launch(zygote)

    def start(self) -> None:
        """Have something to fork the first worker from, while nobody asks for it yet."""
        self._add_zygote(PLAIN, None)

    def _has_room(self) -> bool:
        """For one more zygote, if need be in the place of one that nobody waits for."""
        if len(self._zygotes) < MOST_ZYGOTES:
            return True
        for key, zygote in self._zygotes.items():
            if key != PLAIN and zygote.is_loaded and zygote.at_work is None and not zygote.waiting:
                self._let_go(key, zygote)
                return True
        return False

    def _add_zygote(self, key: str, preload: Preload) -> Zygote:
        """Raises ``OSError``."""
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            _become_zygote(self, theirs, preload)
        theirs.close()
        ours.setblocking(False)
        zygote = self._zygotes[key] = Zygote(pid, ours, is_loaded=preload is None)
        self._families.not_orphans.add(pid)
        self._hear(ours.fileno(), lambda: self._on_zygote(key, zygote))
        return zygote

    def _next_launch(self, zygote: Zygote) -> None:
        while zygote.is_loaded and zygote.at_work is None and zygote.waiting:
            ward, words, fds = zygote.waiting.pop(0)
            if send(zygote.channel, words, fds):
                zygote.at_work = ward
            else:
                self._fail(ward)
            for fd in fds:
                os.close(fd)
        self._note_unborn()

    def _note_unborn(self) -> None:
        at_work = [zygote.at_work for zygote in self._zygotes.values() if zygote.at_work is not None]
        self._families.unborn = {ward.family for ward in at_work}
        if not at_work:
            self._strangers.clear()
        if at_work or not all(zygote.spare for zygote in self._zygotes.values()):
            self._families.unborn.add(None)  # a spare may be there that has not been announced

    def _on_zygote(self, key: str, zygote: Zygote) -> None:
        try:
            data, _ = receive(zygote.channel)
        except BlockingIOError:
            return
        if not data:
            self._lost(key, zygote)
            return
        word, what = marshal.loads(data)
        ward = zygote.at_work
        if word == "loaded":
            zygote.is_loaded = True
        elif word == "unfit":
            self._unfit[key] = what
            self._lost(key, zygote)
        elif word == "spare":
            zygote.spare = what
            self._families.not_orphans.add(what)
            if not _is_own_child(what):
                self._lost_spare(key, zygote)
        elif ward is not None:
            zygote.at_work = None
            zygote.spare = 0
            if word == "forked":
                self._adopt(ward, what)
            else:
                self._fail(ward, what)
        self._next_launch(zygote)

    def _lost_spare(self, key: str, zygote: Zygote) -> None:
        """It is dead, or is a dead worker by now."""
        pid = zygote.spare
        self._families.not_orphans.discard(pid)
        # Scenario 2: (a) it becomes a worker and says so, (b) it dies, (c) we wait for it, (d) we hear of (a).
        self._on_zygote(key, zygote)
        if zygote.spare == pid:
            zygote.spare = 0
            if zygote.at_work is not None:
                self._lost(key, zygote)  # nobody can tell whether it took the launch with it
        self._note_unborn()

    def _fail(self, ward: Ward, why: str = "the process that forks workers has ended") -> None:
        ward.tell("failed", why)
        ward.close()

    def _lost(self, key: str, zygote: Zygote) -> None:
        """It has ended, or will; what waits for it is forked from the plain one, which is made anew when needed."""
        if not zygote.is_loaded:
            self._unfit.setdefault(key, "the process that was importing it has ended")
        waiting, zygote.waiting = zygote.waiting, []
        if zygote.at_work is not None:
            for pid in (zygote.spare, *self._announced(zygote)):
                if pid and _is_own_child(pid):
                    _families.kill(pid)  # it may be the worker that is given up here
            self._fail(zygote.at_work)
            zygote.at_work = None
        self._let_go(key, zygote)
        self._note_unborn()
        if not waiting:
            return
        try:
            plain = self._zygotes.get(PLAIN) or self._add_zygote(PLAIN, None)
        except OSError as error:
            for ward, _, fds in waiting:
                self._fail(ward, f"the system refused to fork: {error}")
                for fd in fds:
                    os.close(fd)
            return
        why = self._unfit.get(key)
        if why:
            waiting[0][0].tell("note", why)
            self._unfit[key] = ""
        plain.waiting += waiting
        self._next_launch(plain)

    def _announced(self, zygote: Zygote) -> Iterator[int]:
        """The pids in what was said, and not heard yet."""
        while zygote.channel.fileno() >= 0:
            try:
                data, _ = receive(zygote.channel)
            except BlockingIOError:
                return
            if not data:
                return
            word, what = marshal.loads(data)
            if word in ("spare", "forked"):
                yield what

    def _let_go(self, key: str, zygote: Zygote) -> None:
        """It ends when its channel is closed."""
        if zygote.channel.fileno() >= 0:
            self._unhear(zygote.channel.fileno())
            zygote.channel.close()
        if self._zygotes.get(key) is zygote:
            del self._zygotes[key]

    def _adopt(self, ward: Ward, pid: int) -> None:
        ward.pid = pid
        if not _is_own_child(pid):
            ward.tell("started", pid)
            self._bury(ward, *self._strangers.pop(pid, (0, 0)))
            return
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            _families.kill(pid)
            self._fail(ward, f"the keeper cannot watch it: {error}")
            return
        self._wards[pid] = ward
        self._families.begin(ward.family)
        self._hear(ward.ask.fileno(), lambda: self._on_ask(ward))
        ward.tell("started", pid, fd=pidfd)
        os.close(pidfd)

    # ------------------------------------------- workers that the user's process forks

    def _watch(self, number: int, family: int, *, leave: bool, pidfd: int) -> None:
        self._forks[pidfd] = number, family
        self._hear(pidfd, lambda: self._on_forked_end(number, family, leave, pidfd))

    def _on_forked_end(self, number: int, family: int, leave: bool, pidfd: int) -> None:
        """It is not ours to wait for, and what it leaves are not our children: looking for them takes a process."""
        self._unhear(pidfd)
        del self._forks[pidfd]
        os.close(pidfd)
        if leave or (number, family) in self._forks.values():
            return  # (a later worker has been given the same number)
        try:
            child = os.fork()
        except OSError:
            return  # it ends with the program
        if child:
            self._families.not_orphans.add(child)
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
            self._families.not_orphans.discard(pid)
            ward = self._wards.pop(pid, None)
            if ward is not None:
                self._unhear(ward.ask.fileno())
                self._bury(ward, status, usage.ru_maxrss)
                continue
            if any(zygote.at_work for zygote in self._zygotes.values()):
                self._strangers[pid] = status, usage.ru_maxrss
            for key, zygote in tuple(self._zygotes.items()):
                if pid == zygote.pid:
                    self._lost(key, zygote)
                elif pid == zygote.spare:
                    self._lost_spare(key, zygote)

    def _bury(self, ward: Ward, status: int, peak_kib: int) -> None:
        """A worker is dead: end its family, then tell."""

        def tell(found: list[Left]) -> None:
            ward.tell("exited", status, peak_kib, found)
            ward.close()

        self._families.end(ward.family, leave=ward.leave, done=tell)

    def _on_ask(self, ward: Ward) -> None:
        """A task has ended that may have left something."""
        try:
            data, _ = receive(ward.ask)
        except BlockingIOError:
            return
        word = data.decode()
        if not word:
            self._unhear(ward.ask.fileno())
        elif word == "spare":
            self._families.spare(ward.family)
            send(ward.ask, [])
        else:
            self._families.sweep(ward.family, kill=word == "sweep", done=lambda found: send(ward.ask, found))

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
            there, may_not = self._families.kill_all()
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


def _is_own_child(pid: int) -> bool:
    """Not waited for yet, dead or alive."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


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
    _let_go_of_streams()
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


def _let_go_of_streams() -> None:
    """What reads the program's output must see its end when the program closes it."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    if nowhere > 2:
        os.close(nowhere)
