"""Starts workers: one verb, ``launch``; nothing above it knows how a worker was started.

A launcher has ``launch(channel, tickets, setup) -> WorkerProcess`` and nothing else.  It raises
``OSError``, ``EOFError`` or ``MemoryError`` when the system refuses now, and anything else when it would refuse every
time.  It may block: it is called on a thread of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Iterator
from typing import Any, Protocol

from . import _contexts, _os, _payload, _wire, _worker
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
        if self._is_closed():
            return None
        code: int | None = self.process.exitcode
        return None if getattr(self.process._popen, "status_is_lost", False) else code

    def is_status_lost(self) -> bool:
        """Will the exit status of this dead worker never be known?"""
        if self._is_closed():
            return True
        is_child = getattr(self.process._popen, "method", "") in ("fork", "spawn")
        return is_child and _os.is_reaped(self._fd)

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
            if self.process.exitcode is None:
                _contexts.forget(self.process)
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

    ``zygote``: fork them from a server of safepool's own.
    """

    def __init__(self, context: Any, name: str = "safepool", *, zygote: bool = False) -> None:
        if context.Process is multiprocessing.Process:  # the module itself: it has a context behind it
            context = context.get_context()
        self.method: str = context.get_start_method(allow_none=False)
        self._make = _contexts.process_class(context, self.method, zygote=zygote)
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
        return _payload.loads, (_payload.dumps_by_value(self._setup),)


def default_launcher(name: str) -> ContextLauncher:
    """The launcher of a pool without ``mp_context``: never a fork of the user's process."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        return ContextLauncher(multiprocessing.get_context("forkserver"), name, zygote=True)
    from loky.backend.context import get_context

    return ContextLauncher(get_context("loky"), name)
