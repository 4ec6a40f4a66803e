"""multiprocessing's own start methods with the traps taken out: the process classes that ``_launch`` starts.

* The children need no ``__main__`` of the user's: under "spawn" and "forkserver" multiprocessing runs the user's
  script again in every child, hence the main guard that everybody forgets once.
* No start flushes a stream where that could block.
* A start that fails leaves no descriptor behind, and a fork server that cannot be reached is replaced.

multiprocessing has no switches for this: its methods ask module-level names, so they are run here with stand-ins for
those names.
"""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import sys
import threading
import types
import weakref
from contextlib import ExitStack, suppress
from multiprocessing import process, spawn, util
from typing import Any

from . import _os

MOST_OPENED = 4  # pairs of descriptors, while a fork server is asked for a process
LONGEST_ADDRESS = 100  # of a socket in the file system, in bytes; the system allows 107, on macOS 103

_started: weakref.WeakSet[Any] = weakref.WeakSet()


def process_class(context: Any, method: str, *, zygote: bool) -> Any:
    """The class whose ``start`` makes the child: ours for the stdlib's own contexts, else the context's.

    ``zygote``: fork the children from a server of safepool's own that has loaded what a worker needs.
    """
    if "fork" in _os.CAPABILITIES:
        forkserver = _ZygoteProcess if zygote else _ForkServerProcess
        ours = {"fork": _ForkProcess, "spawn": _SpawnProcess, "forkserver": forkserver}.get(method)
        if ours is not None and context.Process is ours.__base__:
            return ours
    return context.Process


def is_stock(context: Any) -> bool:
    """Is it one of the stdlib's own contexts?  Those of others may mean something by theirs."""
    return type(context).__module__ == "multiprocessing.context" or context is multiprocessing


def forget(child: Any) -> None:
    """Have multiprocessing forget a dead child whose status somebody else has taken: it would wait for it for ever."""
    process._children.discard(child)  # type: ignore[attr-defined]
    popen = getattr(child, "_popen", None)
    if popen is not None:
        with suppress(OSError):
            popen.close()


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


class _StandIn:
    """A module, but for the names given."""

    def __init__(self, module: types.ModuleType, **names: Any) -> None:
        self._module = module
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _with_stand_ins(function: Any, **names: Any) -> Any:
    return types.FunctionType(function.__code__, {**function.__globals__, **names}, function.__name__)


def _preparation_without_main(name: str) -> dict[str, Any]:
    data = spawn.get_preparation_data(name)
    data.pop("init_main_from_name", None)
    data.pop("init_main_from_path", None)
    return data


# ------------------------------------------------------ the streams of the program


def _launch_at_once(self: Any, child: Any) -> None:
    """In the place of multiprocessing's ``Popen.__init__``, which flushes the standard streams whatever it takes.

    Scenario 1.  The program's stdout is a pipe that nobody reads and a task has filled; the program has words
    of its own in its buffer.  A flush would block for ever, and no dead worker would be replaced again.
    """
    child.unflushed = [name for name in ("stdout", "stderr") if not _flush(getattr(sys, name))]
    _started.add(child)
    self._fds = []
    self.returncode = None
    self.finalizer = None
    self._launch(child)


def _flush(stream: Any) -> bool:
    """Empty a stream's buffer, as it was printed before the worker starts; False if it could block."""
    if type(stream) is not io.TextIOWrapper:
        return True  # none, or of the user's making: it may wait for a lock that the caller of submit holds
    try:
        if _os.has_room(stream.fileno()):
            stream.flush()
            return True
        return False
    except (ValueError, OSError):
        return True  # closed: nothing that could block or be said twice


def _renew(stream: Any) -> Any:
    """A stream like this one with an empty buffer, and no lock that a thread held when the process forked."""
    buffering = 1 if stream.line_buffering else -1
    return open(stream.fileno(), "w", buffering, stream.encoding, stream.errors, closefd=False)


# ------------------------------------------------------------- the start methods


if "fork" in _os.CAPABILITIES:
    from multiprocessing import connection
    from multiprocessing.context import ForkProcess, ForkServerProcess, SpawnProcess
    from multiprocessing.forkserver import ForkServer

    @functools.cache
    def _fork_popen() -> Any:
        from multiprocessing import popen_fork

        base: Any = popen_fork.Popen

        class Popen(base):  # type: ignore[misc]
            __init__ = _launch_at_once

            def _launch(self, child: Any) -> None:
                """As multiprocessing's, but a fork that is refused leaves no descriptor behind."""
                ends: list[int] = []

                def pipe() -> tuple[int, int]:
                    made = os.pipe()
                    ends.extend(made)
                    return made

                try:
                    _with_stand_ins(base._launch, os=_StandIn(os, pipe=pipe))(self, child)
                except BaseException:
                    _close(*ends)
                    raise

        return Popen

    @functools.cache
    def _spawn_popen() -> Any:
        from multiprocessing import popen_spawn_posix

        base: Any = popen_spawn_posix.Popen
        stand_in = _StandIn(spawn, get_preparation_data=_preparation_without_main)
        names = {"__init__": _launch_at_once, "_launch": _with_stand_ins(base._launch, spawn=stand_in)}
        return type("Popen", (base,), names)

    def _popen_of(connect: Any) -> Any:
        """The Popen of a fork server; ``connect`` asks the server for a process, as its ``connect_to_new_process``."""
        from multiprocessing import forkserver, popen_forkserver

        base: Any = popen_forkserver.Popen
        reading = threading.Lock()  # held for one read of what is there

        def connect_with_room(fds: list[int]) -> Any:
            # multiprocessing forgets what it has opened when it cannot open the next: look first.
            with ExitStack() as probe:
                for _ in range(MOST_OPENED):
                    probe.callback(_close, *os.pipe())
            return connect(fds)

        def poll(self: Any, flag: int = os.WNOHANG) -> int | None:
            """As multiprocessing's, but a status that was never sent is not taken for 255: the server was killed.

            Scenario 3.  The watchdog asks for a status, and a launch, which polls all children, asks too: (a) both
            see that there is something to read, (b) one reads it, (c) the other finds the end, and thinks it lost.
            """
            if self.returncode is not None:
                return self.returncode  # type: ignore[no-any-return]
            if not connection.wait([self.sentinel], 0 if flag == os.WNOHANG else None):
                return None
            with reading:
                if self.returncode is None:
                    try:
                        self.returncode = forkserver.read_signed(self.sentinel)
                    except (OSError, EOFError):
                        self.status_is_lost = True
                        self.returncode = 255
            return self.returncode  # type: ignore[no-any-return]

        launch = _with_stand_ins(
            base._launch,
            spawn=_StandIn(spawn, get_preparation_data=_preparation_without_main),
            forkserver=_StandIn(forkserver, connect_to_new_process=connect_with_room),
        )
        return type("Popen", (base,), {"__init__": _launch_at_once, "_launch": launch, "poll": poll})

    class _Zygote:
        """A fork server of safepool's own, for all pools; the program's one is not touched."""

        def __init__(self) -> None:
            self._lock = threading.Lock()  # held for a few lines only
            self._left: list[int] = []  # servers that were let go, to be reaped
            self._server = self._fresh()

        def _fresh(self) -> Any:
            server = ForkServer()
            server.set_forkserver_preload([_PRELOADED])
            return server

        def connect(self, fds: list[int]) -> Any:
            server = self._server
            try:
                return self._connect(server, fds)
            except (ConnectionError, FileNotFoundError, ChildProcessError):
                # Scenario 2: the directory of its socket was cleaned away, or somebody else reaped the server.
                self._replace(server)
                return self._connect(self._server, fds)

        def _connect(self, server: Any, fds: list[int]) -> Any:
            stand_in = _StandIn(connection, arbitrary_address=_address)
            _with_stand_ins(ForkServer.ensure_running, connection=stand_in)(server)
            return server.connect_to_new_process(fds)

        def _replace(self, server: Any) -> None:
            with self._lock:
                if self._server is server:
                    self._server = self._fresh()
                    self._left.append(server._forkserver_pid)
                    _close_alive(server)
                with suppress(ChildProcessError):
                    self._left = [pid for pid in self._left if pid and os.waitpid(pid, os.WNOHANG) == (0, 0)]

        def let_go_in_child(self) -> None:
            """A forked child is not the parent of the server, may not wait for it, and must not keep it alive."""
            _close_alive(self._server)
            self.__init__()  # type: ignore[misc]

    def _close_alive(server: Any) -> None:
        """A server ends when everybody who holds its "alive" pipe has closed it."""
        if server._forkserver_alive_fd is not None:
            with suppress(OSError):
                os.close(server._forkserver_alive_fd)

    def _address(family: str) -> str:
        """Where a fork server listens: in multiprocessing's directory, if that is there and its name is short."""
        import shutil
        import tempfile

        address: str = connection.arbitrary_address(family)  # type: ignore[attr-defined]
        if len(os.fsencode(address)) <= LONGEST_ADDRESS and os.path.isdir(os.path.dirname(address)):
            return address
        base = tempfile.gettempdir()
        if len(os.fsencode(base)) + 40 > LONGEST_ADDRESS or not os.path.isdir(base):
            base = "/tmp"
        folder = tempfile.mkdtemp(prefix="safepool-", dir=base)
        util.Finalize(None, shutil.rmtree, (folder, True), exitpriority=0)
        return os.path.join(folder, "listener")

    def _connect_to_theirs(fds: list[int]) -> Any:
        """Ask multiprocessing's own server; ours, where that one cannot be reached."""
        from multiprocessing import forkserver

        try:
            return forkserver.connect_to_new_process(fds)
        except OSError as error:
            if isinstance(error, (ConnectionError, FileNotFoundError, ChildProcessError)) or _is_too_long(error):
                return _zygote.connect(fds)
            raise

    def _is_too_long(error: OSError) -> bool:
        return error.errno is None and "too long" in str(error)

    _PRELOADED = f"{__package__}._launch"
    _zygote = _Zygote()

    @functools.cache
    def _forkserver_popen() -> Any:
        return _popen_of(_connect_to_theirs)

    @functools.cache
    def _zygote_popen() -> Any:
        return _popen_of(_zygote.connect)

    def _let_go_in_child() -> None:
        _zygote.let_go_in_child()
        # multiprocessing would join them at the exit of the child, which is not their parent.
        process._children.difference_update(_started)  # type: ignore[attr-defined]

    os.register_at_fork(after_in_child=_let_go_in_child)

    class _ForkProcess(ForkProcess):
        unflushed: list[str]

        @staticmethod
        def _Popen(child: Any) -> Any:
            return _fork_popen()(child)

        def run(self) -> None:
            # What waits in the buffers is the parent's to say: here it would be said twice.
            for name in self.unflushed:
                setattr(sys, name, _renew(getattr(sys, name)))
            super().run()

    class _SpawnProcess(SpawnProcess):
        @staticmethod
        def _Popen(child: Any) -> Any:
            return _spawn_popen()(child)

    class _ForkServerProcess(ForkServerProcess):
        @staticmethod
        def _Popen(child: Any) -> Any:
            return _forkserver_popen()(child)

    class _ZygoteProcess(ForkServerProcess):
        @staticmethod
        def _Popen(child: Any) -> Any:
            return _zygote_popen()(child)
