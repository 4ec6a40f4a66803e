"""The user's side of the keeper: started on first use, asked for workers, replaced when it dies.

One keeper serves all pools of a process.  What it has to say of a worker comes on a channel of that worker's own, so
nobody reads for others.
"""

from __future__ import annotations

import atexit
import itertools
import marshal
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
from contextlib import suppress
from multiprocessing import process as mp_process
from multiprocessing import util
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from . import _os, _registry, _sweeping, _tags
from ._log import WARNING, tell
from ._os import linux
from ._packets import BACK, IGNORED, MOST_BYTES, MOST_FDS, receive
from ._shapes import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ._packets import Left
    from .policy import Isolation, LaunchPolicy

ANSWER_LIMIT_S = 10.0  # for a worker to be forked
PRELOAD_LIMIT_S = 45.0  # the same, when modules are to be imported first
END_LIMIT_S = 0.2  # from the closing of its channels to its end
LOCK_LIMIT_S = 30.0
SWEEP_LIMIT_S = 3.0  # for what a dead keeper has left
JOIN_SLICE_S = 0.5
ABANDONED_AFTER_S = 0.2  # from the start of the keeper: first there are to be workers
KILLED = -signal.SIGKILL


class KeptProcess:
    """A worker, with the face of a ``multiprocessing.Process``: this is what ``_processes`` shows."""

    daemon = False

    def __init__(self, name: str, pid: int, pidfd: int | None, status: socket.socket, keeper: Keeper) -> None:
        self.name = name
        self.pid = self.ident = pid
        self.peak_bytes: int | None = None
        self.leftovers: list[Left] = []
        self._pidfd = pidfd
        self._status: socket.socket | None = status
        self._keeper = keeper
        self._exitcode: int | None = None
        self._lock = threading.Lock()  # held for a few lines only

    @property
    def exitcode(self) -> int | None:
        """None: it lives, or its family is being ended."""
        with self._lock:
            if self._exitcode is None and self._status is not None:
                self._read_status(self._status)
            return self._exitcode

    def _read_status(self, status: socket.socket) -> None:
        if not _is_readable(status, 0):
            return
        data, _ = receive(status)
        if data:
            _, code, peak_kib, self.leftovers = marshal.loads(data)
            self._exitcode = os.waitstatus_to_exitcode(code)
            self.peak_bytes = peak_kib * 1024
        else:
            # The keeper has ended, and the worker with it.
            self._exitcode = KILLED
            self._keeper.has_ended()

    @property
    def sentinel(self) -> int:
        """A descriptor that is readable when it is dead."""
        if self._pidfd is None:
            raise ValueError("process not started, or gone")
        return self._pidfd

    def fileno(self) -> int | None:
        return self._pidfd

    def status_fileno(self) -> int | None:
        """A descriptor that is readable when ``exitcode`` is known."""
        return None if self._status is None else self._status.fileno()

    @property
    def authkey(self) -> bytes:
        return mp_process.current_process().authkey

    def is_alive(self) -> bool:
        with self._lock:
            return self._pidfd is not None and not _is_readable(self._pidfd, 0)

    def join(self, timeout: float | None = None) -> None:
        """Wait until it is dead, for at most ``timeout`` seconds."""
        end = None if timeout is None else monotonic() + timeout
        while self.is_alive() and (end is None or monotonic() < end):
            with self._lock:
                fd = None if self._pidfd is None else os.dup(self._pidfd)
            if fd is not None:
                try:
                    _is_readable(fd, JOIN_SLICE_S if end is None else max(0.0, min(JOIN_SLICE_S, end - monotonic())))
                finally:
                    os.close(fd)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def send_signal(self, number: int) -> None:
        with self._lock, suppress(ProcessLookupError):
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        """Nothing to do: its descriptors are given back when it is dead."""

    def release(self) -> None:
        with self._lock:
            if self._pidfd is not None:
                os.close(self._pidfd)
                self._pidfd = None
            if self._status is not None:
                _os.close(self._status)
                self._status = None

    def __repr__(self) -> str:
        return f"<KeptProcess {self.name!r} pid {self.pid} exitcode={self._exitcode}>"


def _is_readable(fd: int | socket.socket, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1e3))


class Keeper:
    """One sidecar, from its start to its end."""

    def __init__(self, isolation: Isolation) -> None:
        """Start it.  Raises ``OSError``, and ``RuntimeError`` if it cannot be isolated as asked."""
        self._isolation = isolation
        self.has_company = False  # what else there must be, once there are workers
        self._user = os.geteuid(), os.getegid()
        self._silent = 0  # launches in a row that were not answered
        self._number = _tags.fresh(os.urandom(8), os.getpid(), linux.own_tag()) or 0
        self._swept = threading.Event()
        self._lock = threading.Lock()
        self._is_swept_by_somebody = False
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control = _os.keep(control)
        self._control.settimeout(ANSWER_LIMIT_S)
        try:
            self.pid = self._spawn(theirs)
            self._pidfd = os.pidfd_open(self.pid)
        except BaseException:
            _os.close(self._control)
            raise
        finally:
            theirs.close()
        if isolation is not None:
            self._await_isolation()

    def _await_isolation(self) -> None:
        if _is_readable(self._control, ANSWER_LIMIT_S):
            data, _ = receive(self._control)
            word, *why = marshal.loads(data) if data else ("refused", "its keeper ended at once")
            if word == "isolated":
                return
        else:
            why = [f"its keeper did not answer within {ANSWER_LIMIT_S:g} s"]
        _os.close(self._control)  # if it has not ended by itself, it does now
        _is_readable(self._pidfd, END_LIMIT_S)
        self._reap()
        os.close(self._pidfd)
        raise RuntimeError(
            f"isolation={self._isolation!r} cannot be had here: {why[0]}. It needs the right to make a Linux process "
            "namespace: root, or user namespaces for everybody; without isolation= the keeper needs no rights"
        )

    def _spawn(self, theirs: socket.socket) -> int:
        number = 3 if theirs.fileno() != 3 else 4  # (onto itself, it would still be closed at exec)
        command = [*_interpreter(), "-c", f"{BACK}from safepool._keeper import main; main(*map(int, sys.argv[2:6]))"]
        words = [_home(), str(number), str(os.getpid()), str(self._number), str(int(self._isolation is not None))]
        actions = [(os.POSIX_SPAWN_DUP2, theirs.fileno(), number)]
        # What it will ignore is held back until it does: Ctrl-C reaches it too.
        return os.posix_spawn(command[0], [*command, *words], os.environ, file_actions=actions, setsigmask=IGNORED)

    def is_usable(self) -> bool:
        """It lives, and is the user's whom this process is now."""
        return not _is_readable(self._pidfd, 0) and self._user == (os.geteuid(), os.getegid())

    def launch(
        self, told: dict[str, Any], key: str, preload: Any, *, leave: bool, named: dict[str, int], more: list[int]
    ) -> KeptProcess:
        """Have a worker forked; ``named`` and ``more`` are descriptors for it.  Raises ``OSError`` if there is none."""
        status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        _os.keep(status)
        try:
            body = marshal.dumps({**told, "fds": tuple(named)})
            self._send(("launch", key, preload, leave, body), [theirs.fileno(), *named.values(), *more])
            theirs.close()
            return self._started(told["name"], status, key)
        except BaseException:
            theirs.close()
            _os.close(status)
            raise

    def _send(self, words: tuple[Any, ...], fds: list[int]) -> None:
        data = marshal.dumps(words)
        if len(data) > MOST_BYTES or len(fds) > MOST_FDS:
            raise ValueError(f"a worker cannot be started with {len(data)} bytes and {len(fds)} descriptors to tell it")
        socket.send_fds(self._control, [data], fds)

    def _started(self, name: str, status: socket.socket, key: str) -> KeptProcess:
        limit_s = PRELOAD_LIMIT_S if key else ANSWER_LIMIT_S
        word = "note"
        while word == "note":
            if not _is_readable(status, limit_s):
                self._wake_up(key)
                raise TimeoutError(f"keeper {self.pid} has forked no worker within {limit_s:g} s; it is asked again")
            data, fds = receive(status)
            if not data:
                self.has_ended()
                raise ConnectionError(f"keeper {self.pid} has ended, or is short of something; it is asked again")
            word, what = marshal.loads(data)
            if word == "note":
                args = WARNING, "safepool: modules are not preloaded, workers import them themselves: %s", what
                threading.Thread(target=tell, args=args, daemon=True).start()
        self._silent = 0
        if word != "started":
            raise OSError(what)
        pid = _pid_here(fds[0]) if self._isolation is not None and fds else what
        return KeptProcess(name, pid, fds[0] if fds else None, status, self)

    def load(self, key: str, preload: Any) -> None:
        """Before anybody asks for a worker that has it."""
        with suppress(OSError):  # it has ended: the first launch meets the same, and tells
            self._send(("load", key, preload), [])

    def watch(self, fork: Fork, pidfd: int) -> None:
        with suppress(OSError):  # it has ended: the next one is told
            self._send(("watch", fork.number, fork.family, fork.policy == "leave"), [pidfd])

    def _wake_up(self, key: str) -> None:
        """Somebody has stopped it, or its zygote."""
        self._silent += 1
        with suppress(OSError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGCONT if self._silent == 1 else signal.SIGKILL)
            self._send(("replace", key), [])

    def has_ended(self) -> None:
        """End what it has left, on a thread of its own: only once, whoever notices first."""
        with self._lock:
            if self._is_swept_by_somebody or not _is_readable(self._pidfd, END_LIMIT_S):
                return
            self._is_swept_by_somebody = True
        try:
            threading.Thread(target=self._sweep, name="safepool-sweep", daemon=True).start()
        except RuntimeError:  # the interpreter is exiting
            self._sweep()

    def _sweep(self) -> None:
        try:
            if self._number:
                # Workers that this process has forked are its own children, and go on: another keeper watches them.
                forked = {fork.family for fork, _ in tuple(_forked.values()) if fork.number == self._number}
                _sweeping.end_family(self._number, SWEEP_LIMIT_S, forked)
                _registry.forget(self._number)
            self._reap()
        finally:
            self._swept.set()

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)

    def close(self) -> None:
        """It has ended: wait for what it left to be ended, and give back the descriptors."""
        self.has_ended()
        self._swept.wait(SWEEP_LIMIT_S)
        self.let_go()

    def let_go(self) -> None:
        _os.close(self._control)
        os.close(self._pidfd)


def _pid_here(pidfd: int) -> int:
    """Of a process in another namespace."""
    with open(f"/proc/self/fdinfo/{pidfd}") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pid:"))


def _interpreter() -> list[str]:
    spawn = sys.modules.get("multiprocessing.spawn")
    executable = sys.executable if spawn is None else spawn.get_executable()
    return [os.fsdecode(executable), *util._args_from_interpreter_flags()]  # type: ignore[attr-defined]


def _home() -> str:
    """The directory that the package is in."""
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# ------------------------------------------------------------- for this process

_keepers: dict[Isolation, Keeper] = {}
_lock = threading.Lock()
_launches = itertools.count(1)
_forks = itertools.count(1)
_forked: dict[tuple[int, int], tuple[Fork, int]] = {}  # workers that this process has forked, and their pidfds
_has_looked_for_abandoned = False


def keeper_pids() -> set[int]:
    return {keeper.pid for keeper in tuple(_keepers.values())}


def keeper_pid() -> int | None:
    """That of pools without isolation; None if there is none yet."""
    keeper = _keepers.get(None)
    return None if keeper is None else keeper.pid


def _keeper(isolation: Isolation, *, in_advance: bool = False) -> Keeper:
    if not _lock.acquire(timeout=LOCK_LIMIT_S):
        raise TimeoutError("another thread has been starting a keeper for too long")
    try:
        keeper = _keepers.get(isolation)
        if keeper is not None and not keeper.is_usable():
            del _keepers[isolation]
            if _is_readable(keeper._pidfd, 0):
                keeper.close()
            # (Else its workers go on; it ends with this process.)
            keeper = None
        if keeper is None:
            # Scenario 1: (a) a program has closed its stdout, (b) a channel is opened at its number, (c) it prints.
            with _os.above_standard():
                keeper = _keepers[isolation] = Keeper(isolation)
            if isolation is None:
                for fork, pidfd in tuple(_forked.values()):
                    keeper.watch(fork, pidfd)
        if not in_advance and not keeper.has_company:
            keeper.has_company = True
            with _os.above_standard():
                _start_tracker()
            _look_for_abandoned()
        return keeper
    finally:
        _lock.release()


def _start_tracker() -> None:
    """multiprocessing's, while the keeper starts: shared memory must have one for the user and all workers.

    A worker with one of its own would take the segments of others with it when it ends.
    """
    from multiprocessing import resource_tracker

    with suppress(OSError, RuntimeError):
        resource_tracker.ensure_running()


def launch(
    name: str, policy: LaunchPolicy, *, setup: bytes | None, fresh: bool, named: dict[str, int], more: list[int]
) -> KeptProcess:
    """Start a worker called ``name``.  ``fresh``: in a new interpreter.  Raises ``OSError``.

    ``setup``: its environment and ``Setup``, pickled; None: they come on its channel.
    """
    keeper = _keeper(policy.isolation)
    for stream, fd in (("out", 1), ("err", 2)):
        with suppress(OSError):
            os.fstat(fd)
            named[stream] = fd
    tracker = sys.modules.get("multiprocessing.resource_tracker")
    if tracker is not None and tracker._resource_tracker._fd is not None:
        named["tracker"] = tracker._resource_tracker._fd
    me = mp_process.current_process()
    path = _strings(sys.path)
    told = {
        "number": next(_launches),
        "name": name,
        "setup": setup,
        "fresh": fresh,
        "interpreter": _interpreter(),
        "home": _home(),
        "path": path,
        "argv": list(map(str, getattr(sys, "argv", ()))),
        "cwd": _cwd(),
        "method": multiprocessing.get_start_method(allow_none=True),
        "parent": os.getpid(),
        "parent_name": me.name,
        "authkey": bytes(me.authkey),
        "leftovers": policy.leftovers,
        "isolated": policy.isolation is not None,
    }
    key, preload = _preload(policy.preload, path)
    return keeper.launch(told, key, preload, leave=policy.leftovers == "leave", named=named, more=more)


def _preload(names: tuple[str, ...] | None, path: list[str]) -> tuple[str, Any]:
    """(what tells it from another one, what the keeper needs to load it)."""
    if not names:
        return "", None
    environ = dict(os.environ)
    return f"{','.join(names)} {hash((tuple(environ.items()), *path))}", (path, environ, names)


def _strings(path: Iterable[object]) -> list[str]:
    return [entry for entry in path if isinstance(entry, str)]


def _look_for_abandoned() -> None:
    """Once in a process."""
    global _has_looked_for_abandoned
    if not _has_looked_for_abandoned:
        _has_looked_for_abandoned = True
        with suppress(RuntimeError):
            threading.Thread(target=_end_abandoned, name="safepool-sweep", daemon=True).start()


def _end_abandoned() -> None:
    """What an earlier program of this user has left that was killed together with its keeper."""
    sleep(ABANDONED_AFTER_S)
    with suppress(OSError):  # the program has no descriptor left for it: then its next one does it
        for entry, found in _sweeping.end_abandoned(SWEEP_LIMIT_S):
            words = (
                f"{pid} ({command}), {'ended' if allowed else 'which belongs to another user and goes on'}"
                for pid, (command, allowed) in found.items()
            )
            whose = f"{entry.facts.get('user')} ({entry.facts.get('command')})"
            message = "safepool: process %s was killed together with its keeper and left: %s"
            tell(WARNING, message, whose, "; ".join(words))


class Fork(NamedTuple):
    """What a worker must wear that this process forks itself, so that the keeper can end what it leaves."""

    number: int  # of the keeper
    family: int
    policy: str  # for what tasks leave


def next_fork(policy: LaunchPolicy) -> Fork | None:
    """None: there is no keeper to be had, or there are no tags left."""
    try:
        number = _keeper(None)._number
    except Exception:  # a program that an interpreter is embedded in has no ``sys.executable``, say
        return None
    for _ in range(_tags.most_workers(number) if number else 0):
        family = _tags.of_worker(number, next(_forks), forked=True)
        if (number, family) not in _forked:
            return Fork(number, family, policy.leftovers)
    return None


def watch(fork: Fork, pidfd: int) -> None:
    """Have the family ended when this process is dead."""
    _forked[fork.number, fork.family] = fork, pidfd
    keeper = _keepers.get(None)
    if keeper is not None:
        keeper.watch(fork, pidfd)


def forget(fork: Fork) -> None:
    """Its worker is dead."""
    keeper = _keepers.get(None)
    if _forked.pop((fork.number, fork.family), None) and fork.policy != "leave" and keeper and not keeper.is_usable():
        with suppress(RuntimeError):
            threading.Thread(target=_end_forked, args=(fork,), name="safepool-sweep", daemon=True).start()


def _end_forked(fork: Fork) -> None:
    """The keeper was killed, and nobody has needed another one since."""
    _sweeping.ForkedWorker(fork.number, fork.family, 0).end()


def _cwd() -> str:
    try:
        return os.getcwd()
    except OSError:
        return "/"


def _let_go_in_child() -> None:
    """A forked child has no keeper yet; ours ends with us, not with it."""
    global _lock
    for keeper in _keepers.values():
        os.close(keeper._pidfd)
    _keepers.clear()
    _forked.clear()
    _lock = threading.Lock()


def _at_exit() -> None:
    """All pools have ended; the keeper follows when its channel is closed."""
    for keeper in tuple(_keepers.values()):
        keeper.let_go()
    _keepers.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
atexit.register(_at_exit)


def require(isolation: Isolation) -> None:
    """Have a keeper started.  Raises ``RuntimeError`` or ``OSError`` if it cannot be had."""
    _keeper(isolation)


def prepare(isolation: Isolation, preload: tuple[str, ...] = (), path: Iterable[object] = ()) -> None:
    """Have one started if there has been none yet, and nobody is just doing it; and these modules loaded.

    Raises nothing.
    """
    if isolation not in _keepers and not _lock.locked():
        with suppress(Exception):  # the first launch meets the same, and tells
            keeper = _keeper(isolation, in_advance=bool(preload))
            if preload:
                keeper.load(*_preload(preload, _strings(path)))
