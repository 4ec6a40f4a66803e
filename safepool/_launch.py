"""Starts workers: one verb, ``launch``; nothing above it knows how a worker was started.

A launcher has ``launch(channel, tickets, setup) -> WorkerProcess`` and nothing else.  It raises
``OSError``, ``EOFError`` or ``MemoryError`` when the system refuses now, and anything else when it would refuse every
time.  It may block: it is called on a thread of its own.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import sys
import types
from collections.abc import Iterator
from multiprocessing import spawn
from typing import Any, Protocol

from . import _os, _payload, _wire, _worker
from ._worker import Setup


class WorkerProcess:
    """A started worker: its pid, how to see it die, how to end it.  Only the watchdog calls this.

    ``process`` is multiprocessing's object (what ``_processes`` shows); ``greeting`` is what its
    channel must carry first, if anything.
    """

    def __init__(self, process: Any, greeting: bytes = b"") -> None:
        self.process = process
        self.greeting = greeting
        self.pid: int = process.pid
        self._is_gone = False
        self._fd: int | None = None
        try:
            self._fd = _os.watch(self.pid)
        except ProcessLookupError:
            self._is_gone = True

    def fileno(self) -> int | None:
        """A descriptor that is readable once the process is dead; None: ask ``is_dead``."""
        return self._fd

    def is_dead(self) -> bool:
        return self._is_gone or self._is_closed() or self.exitcode() is not None

    def exitcode(self) -> int | None:
        """The exit status of a dead worker; None while it is not known (yet)."""
        return None if self._is_closed() else self.process.exitcode

    def _is_closed(self) -> bool:
        # Users find multiprocessing's object in ``_processes``, and may close() it once it is dead.
        return bool(getattr(self.process, "_closed", False))

    def kill(self, *, hard: bool) -> None:
        if not self._is_gone:
            _os.send_signal(self._fd, self.process, hard=hard)

    def release(self) -> None:
        """Give back the descriptors; the worker is dead, or given up."""
        # multiprocessing remembers its children, and with them two pipes each, until they are joined.
        if not self._is_closed():
            self.process.join(0)
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __repr__(self) -> str:
        return f"<WorkerProcess {self.pid} exitcode={self.exitcode()}>"


class Processes(dict[int, Any]):
    """pid -> multiprocessing's process; may be gone through while workers come and go."""

    def __iter__(self) -> Iterator[int]:
        return iter(tuple(super().keys()))

    def keys(self) -> Any:
        return tuple(super().keys())

    def values(self) -> Any:
        return tuple(super().values())

    def items(self) -> Any:
        return tuple(super().items())


class Launcher(Protocol):
    """What the watchdog asks for."""

    def launch(self, channel: socket.socket, tickets: socket.socket | None, setup: Setup) -> WorkerProcess: ...


class ContextLauncher:
    """Starts workers through a start context of multiprocessing or loky.

    ``zygote``: fork them from a server of safepool's own that has loaded what a worker needs.
    """

    def __init__(self, context: Any, name: str = "safepool", *, zygote: bool = False) -> None:
        self.method: str = context.get_start_method(allow_none=False)
        self._make = _process_class(context, self.method, zygote)
        self._name = name
        self._count = 0

    def launch(self, channel: socket.socket, tickets: socket.socket | None, setup: Setup) -> WorkerProcess:
        """Start one worker on its ends of these sockets.  Raises what the start context raises."""
        inherited: Setup | _ByValue | None = setup
        greeting = b""
        if self.method != "fork":
            try:
                # Not through multiprocessing's start-up pipe: writing to it blocks for ever if the
                # child dies with the pipe full.
                greeting = _wire.encode(_wire.Frame(_wire.SETUP, body=_payload.dumps((dict(os.environ), setup))))
                inherited = None
            except RuntimeError:
                # Locks, queues and shared memory pickle only while a process is being started.
                inherited = _ByValue(setup)
        self._count += 1
        name = f"{self._name}-worker-{self._count}"
        process = self._make(target=_worker.main, args=(channel, tickets, inherited), name=name)
        try:
            process.start()
        except RuntimeError:
            # Python 3.12 does not fork once the interpreter is exiting, and a worker may die while the
            # exit finishes the work.
            if self.method != "fork":
                raise
            return default_launcher(self._name).launch(channel, tickets, setup)
        return WorkerProcess(process, greeting)

    def __repr__(self) -> str:
        return f"<ContextLauncher {self.method}>"


class _ByValue:
    """A setup that pickles as our calls do, but within the start of its worker."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    def __reduce__(self) -> tuple[Any, ...]:
        return _payload.loads, (_payload.dumps(self._setup),)


def default_launcher(name: str) -> ContextLauncher:
    """The launcher of a pool without ``mp_context``: never a fork of the user's process."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        return ContextLauncher(multiprocessing.get_context("forkserver"), name, zygote=True)
    from loky.backend.context import get_context

    return ContextLauncher(get_context("loky"), name)


# --------------------------------------- multiprocessing, but without the user's __main__
#
# Under "spawn" and "forkserver" multiprocessing runs the user's script again in every child, hence
# the main guard that everybody forgets once.  What lives in __main__ travels by value here, so the
# children need no __main__.  multiprocessing has no switch for it: its _launch methods ask their
# module-level names ``spawn`` and ``forkserver``, so they are run here with stand-ins for those.


def _process_class(context: Any, method: str, zygote: bool) -> Any:
    """The class whose ``start`` makes the child: ours for the stdlib's own contexts, else the context's."""
    if sys.platform != "win32":
        forkserver = _ZygoteProcess if zygote else _ForkServerProcess
        ours = {"fork": _ForkProcess, "spawn": _SpawnProcess, "forkserver": forkserver}.get(method)
        if ours is not None and context.Process is ours.__base__:
            return ours
    return context.Process


class _StandIn:
    """A module, but for the names given."""

    def __init__(self, module: types.ModuleType, **names: Any) -> None:
        self._module = module
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _preparation_without_main(name: str) -> dict[str, Any]:
    data = spawn.get_preparation_data(name)
    data.pop("init_main_from_name", None)
    data.pop("init_main_from_path", None)
    return data


def _popen_without_main(popen: Any, **stand_ins: Any) -> Any:
    stand_ins["spawn"] = _StandIn(spawn, get_preparation_data=_preparation_without_main)
    launch = popen._launch
    launch = types.FunctionType(launch.__code__, {**launch.__globals__, **stand_ins}, launch.__name__)
    return type("Popen", (popen,), {"__init__": _launch_at_once, "_launch": launch})


if sys.platform != "win32":
    from multiprocessing.context import ForkProcess, ForkServerProcess, SpawnProcess
    from multiprocessing.forkserver import ForkServer

    def _launch_at_once(self: Any, process: Any) -> None:
        """In the place of multiprocessing's ``Popen.__init__``, which flushes the standard streams whatever it takes.

        Scenario 1.  The program's stdout is a pipe that nobody reads and a task has filled; the program has words
        of its own in its buffer.  A flush would block for ever, and no dead worker would be replaced again.
        """
        process.unflushed = [name for name in ("stdout", "stderr") if not _flush(getattr(sys, name))]
        self._fds = []
        self.returncode = None
        self.finalizer = None
        self._launch(process)

    def _flush(stream: Any) -> bool:
        """Empty a stream's buffer, as it was printed before the worker starts; False if it could block."""
        try:
            if _os.has_room(stream.fileno()):
                stream.flush()
                return True
            return False
        except (AttributeError, ValueError, OSError):
            return True  # no stream, closed, or not of the system: nothing that could block or be said twice

    def _renew(stream: Any) -> Any:
        """A stream like this one with an empty buffer, and no lock that a thread held when the process forked."""
        buffering = 1 if stream.line_buffering else -1
        return open(stream.fileno(), "w", buffering, stream.encoding, stream.errors, closefd=False)

    @functools.cache
    def _fork_popen() -> Any:
        from multiprocessing import popen_fork

        return type("Popen", (popen_fork.Popen,), {"__init__": _launch_at_once})

    @functools.cache
    def _spawn_popen() -> Any:
        from multiprocessing import popen_spawn_posix

        return _popen_without_main(popen_spawn_posix.Popen)

    @functools.cache
    def _forkserver_popen() -> Any:
        from multiprocessing import popen_forkserver

        return _popen_without_main(popen_forkserver.Popen)

    @functools.cache
    def _zygote_popen() -> Any:
        from multiprocessing import forkserver, popen_forkserver

        server = ForkServer()  # not the program's own one: what it preloads is nobody's business
        server.set_forkserver_preload([__name__])
        ours = _StandIn(forkserver, connect_to_new_process=server.connect_to_new_process)
        return _popen_without_main(popen_forkserver.Popen, forkserver=ours)

    # A forked child is not the parent of the server, and may not ask for it with waitpid.
    os.register_at_fork(after_in_child=_zygote_popen.cache_clear)

    class _ForkProcess(ForkProcess):
        unflushed: list[str]

        @staticmethod
        def _Popen(process: Any) -> Any:
            return _fork_popen()(process)

        def run(self) -> None:
            # What waits in the buffers is the parent's to say: here it would be said twice.
            for name in self.unflushed:
                setattr(sys, name, _renew(getattr(sys, name)))
            super().run()

    class _SpawnProcess(SpawnProcess):
        @staticmethod
        def _Popen(process: Any) -> Any:
            return _spawn_popen()(process)

    class _ForkServerProcess(ForkServerProcess):
        @staticmethod
        def _Popen(process: Any) -> Any:
            return _forkserver_popen()(process)

    class _ZygoteProcess(ForkServerProcess):
        @staticmethod
        def _Popen(process: Any) -> Any:
            return _zygote_popen()(process)
