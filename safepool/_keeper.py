"""The keeper: a sidecar with one duty, that no process of a pool outlives the user's process.

Guarantees:

* every worker is its child, and so is whatever of a worker's family loses its parent;
* when a worker ends, in whatever way, its family ends, and only then is its status told;
* when the user's process ends, in whatever way, everything ends;
* it signals nothing but its own children that it has not waited for: no other process can have their pids.

It has one thread, waits without a limit only for all of its descriptors at once, and imports next to nothing.

What it hears on its control channel, with descriptors: ``(number, key, preload, leave, body)``, launch a worker;
``(0, key)``, replace a zygote.  What it says on the status channel of each worker: ``("started", pid)`` with a
descriptor of the process, ``("failed", why)``, ``("exited", status, peak KiB, leftovers)``.  What it hears from a
worker: ``"sweep"``, ``"look"`` and ``"spare"``, and answers with leftovers: ``[(pid, command line, is it gone)]``.
"""

from __future__ import annotations

import marshal
import os
import select
import sys
from time import monotonic

import _signal
import _socket

from . import _tags
from ._os import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    Preload = tuple[list[str], tuple[str, ...]] | tuple[()]  # sys.path, and what to import
    Leftover = tuple[int, str, bool]

FAMILY_LIMIT_S = 1.0  # for a family to end, before its worker's status is told all the same
LOOK_AGAIN_S = 0.02
LAST_LOOK_S = 5.0  # that is given to what may not be signalled, at the end of everything
MOST_TOLD = 32  # leftovers of one sweep
MOST_BYTES = 1 << 17
MOST_FDS = 64
IGNORED = (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP, _signal.SIGQUIT, _signal.SIGTSTP, _signal.SIGUSR1)


class OwnerGone(Exception):
    """The user's process has ended."""


class Ward:
    """A worker: launched, perhaps not forked yet, perhaps dead already."""

    def __init__(self, number: int, key: str, soft: int | None, leave: bool, status: int, ask: _socket.socket) -> None:
        self.number = number
        self.key = key
        self.soft = soft
        self.leave = leave
        self.status = _socket.socket(fileno=status)
        self.ask = ask
        self.pid = 0
        self.spared: set[int] = set()  # orphans that its initializer made

    def tell(self, *words: Any, fd: int | None = None) -> None:
        _send(self.status, marshal.dumps(words), () if fd is None else (fd,))

    def close(self) -> None:
        self.status.close()
        self.ask.close()


class Zygote:
    """A process that forks workers, one at a time."""

    def __init__(self, pid: int, channel: _socket.socket) -> None:
        self.pid = pid
        self.channel = channel
        self.waiting: list[tuple[Ward, bytes, list[int]]] = []
        self.at_work: Ward | None = None


class Sweep:
    """The ending of what is left in one family."""

    def __init__(self, kill: bool, until: float, done: Callable[[list[Leftover]], None]) -> None:
        self.kill = kill
        self.until = until
        self.done = done
        self.found: dict[int, Leftover] = {}


class Keeper:
    """See the head of this file."""

    def __init__(self, control: _socket.socket, owner: int, number: int | None) -> None:
        self._control = control
        self._owner = owner  # a descriptor of the user's process
        self._number = number  # its tag
        self._launches = 0
        self._zygotes: dict[str, Zygote] = {}
        self._wards: dict[int, Ward] = {}  # by pid
        self._by_soft: dict[int | None, Ward] = {}
        self._left: set[int] = set()  # families of dead workers that are to be left alone
        self._sweeps: dict[int | None, Sweep] = {}  # by the soft limit of the family
        self._strangers: dict[int, tuple[int, int]] = {}  # (status, KiB) of the dead, while a launch is under way
        self._poll = select.poll()
        self._heard: dict[int, Callable[[], None]] = {}
        self._awake, waker = _socket.socketpair()
        for end in (self._awake, waker):
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
                for fd, _ in self._poll.poll(LOOK_AGAIN_S * 1e3 if self._sweeps else None):
                    act = self._heard.get(fd)
                    if act is not None:
                        act()
                self._reap()
                self._sweep()
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

    def _on_owner(self) -> None:
        raise OwnerGone

    # --------------------------------------------------------------- launches

    def _on_control(self) -> None:
        data, fds = receive(self._control)
        if not data:
            raise OwnerGone
        number, key, *more = marshal.loads(data)
        if number == 0:
            self._replace(key)
            return
        preload, leave, body = more
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        soft = self._family_of_next()
        ward = Ward(number, key, soft, leave, fds[0], ours)
        zygote = self._zygotes.get(key) or self.add_zygote(key, preload)
        zygote.waiting.append((ward, marshal.dumps((number, soft, body)), [theirs.detach(), *fds[1:]]))
        self._next_launch(zygote)

    def _family_of_next(self) -> int | None:
        if self._number is None:
            return None
        self._launches += 1
        while (soft := _tags.of_worker(self._number, self._launches)) in self._by_soft:
            self._launches += 1  # numbers are used again after thousands of launches
        return soft

    def add_zygote(self, key: str, preload: Preload) -> Zygote:
        """Fork the process that forks the workers with this ``preload``."""
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            _become_zygote(self, theirs, preload)
        theirs.close()
        zygote = self._zygotes[key] = Zygote(pid, ours)
        self._hear(ours.fileno(), lambda: self._on_zygote(key, zygote))
        return zygote

    def _next_launch(self, zygote: Zygote) -> None:
        while zygote.at_work is None and zygote.waiting:
            ward, body, fds = zygote.waiting.pop(0)
            zygote.at_work = ward
            if not _send(zygote.channel, body, fds):
                zygote.at_work = None
                ward.tell("failed", "the process that forks workers has ended")
                ward.close()
            for fd in fds:
                os.close(fd)

    def _on_zygote(self, key: str, zygote: Zygote) -> None:
        data, _ = receive(zygote.channel)
        ward, zygote.at_work = zygote.at_work, None
        if not data:
            self._forget_zygote(key, zygote, ward)
            return
        word, *more = marshal.loads(data)
        if word == "forked" and ward is not None:
            self._adopt(ward, *more)
        elif ward is not None:
            ward.tell(word, *more)
            ward.close()
        if not any(zygote.at_work for zygote in self._zygotes.values()):
            self._strangers.clear()
        self._next_launch(zygote)

    def _forget_zygote(self, key: str, zygote: Zygote, at_work: Ward | None) -> None:
        self._unhear(zygote.channel.fileno())
        zygote.channel.close()
        if self._zygotes.get(key) is zygote:
            del self._zygotes[key]
        for ward in (at_work, *(ward for ward, _, _ in zygote.waiting)):
            if ward is not None:
                ward.tell("failed", "the process that forks workers has ended")
                ward.close()
        for _, _, fds in zygote.waiting:
            for fd in fds:
                os.close(fd)

    def _replace(self, key: str) -> None:
        """This zygote does not answer.  Another one is made when it is needed."""
        zygote = self._zygotes.pop(key, None)
        if zygote is not None:
            os.kill(zygote.pid, _signal.SIGKILL)  # our child: who is not there any more was waited for in ``_reap``

    def _adopt(self, ward: Ward, pid: int) -> None:
        ward.pid = pid
        try:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            pidfd = os.pidfd_open(pid)
        except (ChildProcessError, ProcessLookupError):
            # Scenario 1: (a) a worker is forked, (b) it dies, (c) we wait for all our dead, (d) we hear of (a).
            ward.tell("started", pid)
            self._bury(ward, *self._strangers.pop(pid, (0, 0)))
            return
        self._wards[pid] = self._by_soft[ward.soft] = ward
        self._left.discard(ward.soft or 0)
        self._hear(ward.ask.fileno(), lambda: self._on_ask(ward))
        ward.tell("started", pid, fd=pidfd)
        os.close(pidfd)

    # ----------------------------------------------------- the dead, and families

    def _reap(self) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            ward = self._wards.pop(pid, None)
            if ward is not None:
                self._unhear(ward.ask.fileno())
                self._bury(ward, status, usage.ru_maxrss)
            else:
                for key, zygote in tuple(self._zygotes.items()):
                    if zygote.pid == pid:
                        del self._zygotes[key]  # its channel will be closed
                if any(zygote.at_work for zygote in self._zygotes.values()):
                    self._strangers[pid] = status, usage.ru_maxrss

    def _bury(self, ward: Ward, status: int, peak_kib: int) -> None:
        """A worker is dead: end its family, then tell."""

        def tell(found: list[Leftover]) -> None:
            ward.tell("exited", status, peak_kib, found)
            ward.close()

        if self._by_soft.get(ward.soft) is ward:
            del self._by_soft[ward.soft]
        if ward.leave:
            if ward.soft is not None:
                self._left.add(ward.soft)
            tell([])
        else:
            self._begin(ward.soft, kill=True, done=tell)

    def _on_ask(self, ward: Ward) -> None:
        """A task has ended that may have left something."""
        data, _ = receive(ward.ask)
        word = data.decode()

        def answer(found: list[Leftover]) -> None:
            _send(ward.ask, marshal.dumps(found))

        if not word:
            self._unhear(ward.ask.fileno())
        elif word == "spare":
            ward.spared = {pid for pid, family in self._orphans() if family == ward.soft}
            answer([])
        else:
            self._begin(ward.soft, kill=word == "sweep", done=answer)

    def _begin(self, family: int | None, *, kill: bool, done: Callable[[list[Leftover]], None]) -> None:
        earlier = self._sweeps.pop(family, None)
        if earlier is not None:  # its worker asked, and died over it
            earlier.done(list(earlier.found.values()))
        self._sweeps[family] = Sweep(kill, monotonic() + FAMILY_LIMIT_S, done)

    def _orphans(self) -> Iterator[tuple[int, int | None]]:
        """(pid, family) of the children that nobody asked for; what is left on purpose does not count."""
        zygotes = {zygote.pid for zygote in self._zygotes.values()}
        for pid in linux.children():
            if pid in self._wards or pid in zygotes:
                continue
            tag = linux.tag_of(pid)
            if tag is None or tag[0] != _tags.LEFT_ON_PURPOSE:
                yield pid, None if tag is None or self._number is None else _tags.owner(self._number, tag)

    def _sweep(self) -> None:
        """Look at the orphans; a family is at its end when two looks find nobody."""
        while self._sweeps:
            left = self._look()
            self._reap()
            left |= self._look()
            now = monotonic()
            finished = [
                family
                for family, sweep in self._sweeps.items()
                if family not in left or not sweep.kill or now >= sweep.until
            ]
            if not finished:
                return
            for family in finished:
                sweep = self._sweeps.pop(family)
                sweep.done(list(sweep.found.values()))

    def _look(self) -> set[int | None]:
        """Kill what is to be killed; the families that still have somebody."""
        left: set[int | None] = set()
        # Scenario 2: (a) a worker is forked, (b) its parent has ended, so it is an orphan, (c) we hear of (a).
        unborn = {zygote.at_work.soft for zygote in self._zygotes.values() if zygote.at_work is not None}
        for pid, family in self._orphans():
            sweep = self._sweeps.get(family)
            ward = self._by_soft.get(family)
            if unborn and (family is None or family in unborn):
                left.add(family)
            elif sweep is None:
                if ward is None and family not in self._left:
                    _kill(pid)  # of a worker long dead, or nobody's
            elif ward is None or pid not in ward.spared:
                gone = _kill(pid) if sweep.kill else False
                if gone:
                    left.add(family)
                if pid not in sweep.found and len(sweep.found) < MOST_TOLD and not linux.is_zombie(pid):
                    sweep.found[pid] = pid, linux.words_of(pid), gone
        return left

    # ----------------------------------------------------------------- the end

    def _end_everything(self) -> None:
        until = monotonic() + LAST_LOOK_S
        while True:
            self._reap_all()
            may_not = wanted = 0
            for pid in linux.children():
                tag = linux.tag_of(pid)
                if tag is None or tag[0] != _tags.LEFT_ON_PURPOSE:
                    wanted += 1
                    may_not += not _kill(pid)
            if not wanted or (may_not == wanted and monotonic() >= until):
                return
            self._poll_for_death()

    def _reap_all(self) -> None:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass

    def _poll_for_death(self) -> None:
        select.select([self._awake], [], [], LOOK_AGAIN_S)
        self._on_awake()


def _let_go_of_streams() -> None:
    """What reads the program's output must see its end when the program closes it."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    if nowhere > 2:
        os.close(nowhere)


def _kill(pid: int) -> bool:
    """A child that was not waited for.  False: it is another user's by now."""
    try:
        os.kill(pid, _signal.SIGKILL)
    except PermissionError:
        return False
    return True


def _do_nothing(number: int, frame: Any) -> None:
    pass


def _send(channel: _socket.socket, data: bytes, fds: Any = ()) -> bool:
    """False: nobody is there, or nobody reads."""
    rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds))]
    try:
        channel.sendmsg([data], rights if fds else [], _socket.MSG_DONTWAIT)
    except OSError:
        return False
    return True


def receive(channel: _socket.socket) -> tuple[bytes, list[int]]:
    """One message and its descriptors; an empty one: nobody is there any more."""
    try:
        data, rights, _, _ = channel.recvmsg(MOST_BYTES, _socket.CMSG_SPACE(4 * MOST_FDS), _socket.MSG_CMSG_CLOEXEC)
    except (ConnectionError, InterruptedError):
        return b"", []
    fds = b"".join(content for _, _, content in rights)
    return data, [int.from_bytes(fds[at : at + 4], sys.byteorder) for at in range(0, len(fds) // 4 * 4, 4)]


def _become_zygote(keeper: Keeper, channel: _socket.socket, preload: Preload) -> None:
    """Never returns.  ``keeper`` is held for ever: its sockets must not be closed by their garbage collection."""
    code = 1
    try:
        _signal.set_wakeup_fd(-1)
        for number, was in _inherited.items():
            _signal.signal(number, was)
        linux.close_but([channel.fileno()])
        linux.be_called(b"safepool-zygote")
        linux.end_with_parent()
        from . import _zygote

        _zygote.serve(channel, preload, os.getppid())
        code = 0
    finally:
        os._exit(code)


_inherited: dict[int, Any] = {}  # what signals did before the keeper ignored them


def main(control: int, owner: int, number: int) -> None:
    """The life of a keeper.  ``owner``: the pid of the user's process; ``number``: its tag, or 0."""
    linux.close_but([control])
    linux.be_called(b"safepool-keeper")
    for signal in IGNORED:
        _inherited[signal] = _signal.signal(signal, _signal.SIG_IGN)
    _inherited[_signal.SIGCHLD] = _signal.SIG_DFL
    os.setsid()
    linux.adopt_orphans()
    try:
        owner_fd = os.pidfd_open(owner)
    except ProcessLookupError:
        return
    if os.getppid() != owner:
        return
    try:
        linux.wear((number, number))
    except (OSError, ValueError):
        number = 0
    keeper = Keeper(_socket.socket(fileno=control), owner_fd, number or None)
    _let_go_of_streams()
    keeper.add_zygote("", ())
    keeper.run()
