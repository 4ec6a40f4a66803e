"""The keeper's zygotes: who has loaded what, who has a process ready to become a worker, and what waits for one.

Each zygote forks one process in advance, the spare, which says so with a channel of its own.  A launch is sent there:
from then on it is the worker's, whatever becomes of the two, and the zygote is asked for the next one.
"""

from __future__ import annotations

import _socket
import marshal
import os

from . import _families
from ._packets import HURRY, NOW, SOON, receive, send

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from ._families import Families
    from ._packets import Preload

    class Ward(Protocol):
        """A worker that is to be."""

        family: int | None

        def tell(self, *words: Any) -> None: ...
        def close(self) -> None: ...

    class Owner(Protocol):
        """What is asked of the keeper."""

        families: Families

        def hear(self, fd: int, act: Callable[[], None]) -> None: ...
        def unhear(self, fd: int) -> None: ...
        def fork_zygote(self, channel: _socket.socket, preload: Preload) -> int: ...
        def adopt(self, ward: Any, pid: int) -> None: ...


MOST_ZYGOTES = 4
PLAIN = ""  # the key of the zygote that has loaded nothing of the user's


class Zygote:
    """A process that forks spares, one at a time."""

    def __init__(self, pid: int, channel: _socket.socket, is_loaded: bool) -> None:
        self.pid = pid
        self.channel = channel
        self.is_loaded = is_loaded
        self.asked = NOW  # how the spare was asked for that is on its way; b"": there is none
        self.spare: tuple[int, _socket.socket] | None = None
        self.waiting: list[tuple[Ward, bytes, list[int]]] = []


class Zygotes:
    """See the head of this file."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._there: dict[str, Zygote] = {}
        self._unfit: dict[str, str] = {}  # preloads that cannot be forked, and why; "" when that was told

    def launch(self, ward: Ward, key: str, preload: Preload, body: bytes, fds: list[int]) -> None:
        """From a zygote that has loaded ``preload``, or from the plain one if that cannot be.  Raises ``OSError``."""
        why = self._unfit.get(key)
        if why:
            ward.tell("note", why)
            self._unfit[key] = ""  # once is enough
        if why is not None or (key not in self._there and not self._has_room()):
            key, preload = PLAIN, None
        zygote = self._there.get(key) or self._add(key, preload)
        zygote.waiting.append((ward, body, fds))
        self._serve(zygote)

    def load(self, key: str, preload: Preload) -> None:
        """Have one that loads it, while nobody asks for it yet.  Raises ``OSError``."""
        if key not in self._there and self._has_room():
            self._add(key, preload)

    def start(self) -> None:
        """Have a spare, while nobody asks for it yet."""
        self._add(PLAIN, None)

    def replace(self, key: str) -> None:
        """It does not answer: somebody has stopped it, perhaps."""
        zygote = self._there.get(key) or self._there.get(PLAIN)
        if zygote is not None:
            _families.kill(zygote.pid)

    def buried(self, pid: int) -> None:
        """A child of the keeper's was waited for that is not a worker."""
        for key, zygote in tuple(self._there.items()):
            if pid == zygote.pid:
                self._lost(key, zygote)
            elif zygote.spare is not None and pid == zygote.spare[0]:
                zygote.spare[1].close()
                zygote.spare = None
                self._serve(zygote)

    # ------------------------------------------------------------------ spares

    def _serve(self, zygote: Zygote) -> None:
        """Give what waits to the spare; see that there will be one for what still waits."""
        while zygote.waiting and zygote.spare is not None:
            self._give(zygote, zygote.spare)
        if zygote.waiting and zygote.is_loaded and zygote.asked != NOW:
            self._ask(zygote, HURRY if zygote.asked else NOW)
        self._note_unborn()

    def _give(self, zygote: Zygote, spare: tuple[int, _socket.socket]) -> None:
        ward, body, fds = zygote.waiting.pop(0)
        pid, channel = spare
        zygote.spare = None
        if send(channel, (ward.family, body), fds):
            self._owner.adopt(ward, pid)
        else:
            _families.kill(pid)
            _fail(ward, "the process that was to become it has ended")
        channel.close()
        for fd in fds:
            os.close(fd)
        self._ask(zygote, SOON)

    def _ask(self, zygote: Zygote, how: bytes) -> None:
        try:
            zygote.channel.send(how)
        except OSError:
            return  # it has ended: ``buried`` will be told
        zygote.asked = SOON if how == SOON else NOW

    def _note_unborn(self) -> None:
        # A spare that has not been announced is an orphan of nobody's family.
        self._owner.families.unborn = {None} if any(zygote.asked for zygote in self._there.values()) else set()

    # ----------------------------------------------------------------- zygotes

    def _has_room(self) -> bool:
        """For one more, if need be in the place of one that nobody waits for."""
        if len(self._there) < MOST_ZYGOTES:
            return True
        for key, zygote in self._there.items():
            if key != PLAIN and zygote.is_loaded and not zygote.waiting:
                self._let_go(key, zygote)
                return True
        return False

    def _add(self, key: str, preload: Preload) -> Zygote:
        """Raises ``OSError``."""
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        pid = self._owner.fork_zygote(theirs, preload)
        theirs.close()
        ours.setblocking(False)
        zygote = self._there[key] = Zygote(pid, ours, is_loaded=preload is None)
        self._owner.families.not_orphans.add(pid)
        self._owner.hear(ours.fileno(), lambda: self._on_news(key, zygote))
        return zygote

    def _on_news(self, key: str, zygote: Zygote) -> None:
        try:
            data, fds = receive(zygote.channel)
        except BlockingIOError:
            return
        if not data:
            self._lost(key, zygote)
            return
        word, what = marshal.loads(data)
        if word == "loaded":
            zygote.is_loaded = True
        elif word == "unfit":
            self._unfit[key] = what
            self._lost(key, zygote)
            return
        elif word == "spare":
            zygote.asked = b""
            channel = _socket.socket(fileno=fds[0])
            # Scenario 1: (a) it says that it is there, (b) it is killed, and waited for, (c) we hear of (a).
            if is_own_child(what):
                zygote.spare = what, channel
                self._owner.families.not_orphans.add(what)
            else:
                channel.close()
        else:
            zygote.asked = b""
            if zygote.waiting:
                self._fail_first(zygote, what)
        self._serve(zygote)

    def _fail_first(self, zygote: Zygote, why: str) -> None:
        ward, _, fds = zygote.waiting.pop(0)
        for fd in fds:
            os.close(fd)
        _fail(ward, why)

    def _lost(self, key: str, zygote: Zygote) -> None:
        """It has ended, or will; what waits for it is forked from the plain one, which is made anew when needed."""
        if not zygote.is_loaded:
            self._unfit.setdefault(key, "the process that was importing it has ended")
        self._let_go(key, zygote)
        self._note_unborn()
        if not zygote.waiting:
            return
        try:
            plain = self._there.get(PLAIN) or self._add(PLAIN, None)
        except OSError as error:
            while zygote.waiting:
                self._fail_first(zygote, f"the system refused to fork: {error}")
            return
        why = self._unfit.get(key)
        if why:
            zygote.waiting[0][0].tell("note", why)
            self._unfit[key] = ""
        plain.waiting += zygote.waiting
        zygote.waiting = []
        self._serve(plain)

    def _let_go(self, key: str, zygote: Zygote) -> None:
        """It ends when its channel is closed, and so does its spare."""
        if zygote.channel.fileno() >= 0:
            self._owner.unhear(zygote.channel.fileno())
            zygote.channel.close()
        if zygote.spare is not None:
            zygote.spare[1].close()
        if self._there.get(key) is zygote:
            del self._there[key]


def _fail(ward: Ward, why: str) -> None:
    ward.tell("failed", why)
    ward.close()


def is_own_child(pid: int) -> bool:
    """Not waited for yet, dead or alive."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True
