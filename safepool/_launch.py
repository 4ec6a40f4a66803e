"""Starts workers: one verb, ``launch``; nothing above it knows how a worker was started.

A launcher has ``launch(ends, setup) -> WorkerProcess`` and nothing else.  It raises
``OSError``, ``EOFError`` or ``MemoryError`` when the system refuses now, and anything else when it would refuse every
time.  It may block: it is called on a thread of its own.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from . import _contexts, _os, _payload, _stacks, _wire, _worker
from ._stacks import Stacks
from ._worker import Setup
from .policy import LaunchPolicy

if TYPE_CHECKING:
    from ._keep import Fork, KeptProcess
    from ._packets import Left

PLAIN = LaunchPolicy()
SMALL_BYTES = 1 << 15  # set-ups that go to the keeper with the rest of what it is told


class WorkerProcess(Protocol):
    """A started worker: its pid, how to see it die, how to end it.  Only the watchdog calls this."""

    process: Any  #: what ``_processes`` shows
    greeting: bytes  #: what its channel must carry first, if anything
    pid: int

    def fileno(self) -> int | None:
        """A descriptor that is readable once the process is dead; None: ask ``is_dead``."""

    def status_fileno(self) -> int | None:
        """A descriptor that is readable once the exit status of a dead worker is known; None: ask again and again."""

    def is_dead(self) -> bool: ...

    def exitcode(self) -> int | None:
        """The exit status of a dead worker; None while it is not known (yet)."""

    def is_status_lost(self) -> bool:
        """Will the exit status of this dead worker never be known?"""

    def last_words(self) -> LastWords:
        """What else is known of a worker whose exit status is."""

    def kill(self, *, hard: bool) -> None: ...

    stacks: Stacks | None  #: where it writes what its threads are doing, if it was asked to be able to

    def ask_stacks(self) -> None:
        """Have it write them."""

    def release(self) -> None:
        """Give back the descriptors; the worker is dead, or given up."""


class LastWords(NamedTuple):
    """What is told of a dead worker besides its exit status: its peak memory, and what was left of its family."""

    peak_bytes: int | None = None
    leftovers: Sequence[Left] = ()


class ContextWorker:
    """A worker that a start context of multiprocessing's made."""

    def __init__(
        self, process: Any, greeting: bytes = b"", fork: Fork | None = None, stacks: Stacks | None = None
    ) -> None:
        self.process = process
        self.stacks = stacks
        self.greeting = greeting
        self.pid: int = process.pid
        self._is_gone = False
        self._fd: int | None = None
        self._fork = fork
        try:
            self._fd = _os.watch(self.pid)
        except ProcessLookupError:
            self._is_gone = True
        if fork is not None and self._fd is not None:
            _keeping().watch(fork, self._fd)

    def fileno(self) -> int | None:
        return self._fd

    def status_fileno(self) -> int | None:
        return None

    def is_dead(self) -> bool:
        return self._is_gone or self._is_closed() or self.exitcode() is not None

    def exitcode(self) -> int | None:
        if self._is_closed():
            return None
        code: int | None = self.process.exitcode
        return None if getattr(self.process._popen, "status_is_lost", False) else code

    def is_status_lost(self) -> bool:
        if self._is_closed():
            return True
        is_child = getattr(self.process._popen, "method", "") in ("fork", "spawn")
        return is_child and _os.is_reaped(self._fd)

    def last_words(self) -> LastWords:
        return LastWords()

    def _is_closed(self) -> bool:
        # Users find multiprocessing's object in ``_processes``, and may close() it once it is dead.
        return bool(getattr(self.process, "_closed", False))

    def kill(self, *, hard: bool) -> None:
        if not self._is_gone:
            _os.send_signal(self._fd, self.process, hard=hard)

    def ask_stacks(self) -> None:
        if self._fd is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, _stacks.SIGNAL)

    def release(self) -> None:
        # multiprocessing remembers its children, and with them two pipes each, until they are joined.
        if not self._is_closed():
            self.process.join(0)
            if self.process.exitcode is None:
                _contexts.forget(self.process)
        if self._fork is not None:
            _keeping().forget(self._fork)
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        if self.stacks is not None:
            self.stacks.close()
            self.stacks = None

    def __repr__(self) -> str:
        return f"<ContextWorker {self.pid} exitcode={self.exitcode()}>"


class KeptWorker:
    """A worker that the keeper made."""

    def __init__(self, process: KeptProcess, greeting: bytes, stacks: Stacks | None = None) -> None:
        self.process = process
        self.stacks = stacks
        self.greeting = greeting
        self.pid = process.pid

    def fileno(self) -> int | None:
        return self.process.fileno()

    def status_fileno(self) -> int | None:
        return self.process.status_fileno()

    def is_dead(self) -> bool:
        return not self.process.is_alive()

    def exitcode(self) -> int | None:
        return self.process.exitcode

    def is_status_lost(self) -> bool:
        return False  # a keeper that has ended has ended its workers

    def last_words(self) -> LastWords:
        return LastWords(self.process.peak_bytes, self.process.leftovers)

    def kill(self, *, hard: bool) -> None:
        if hard:
            self.process.kill()
        else:
            self.process.terminate()

    def ask_stacks(self) -> None:
        self.process.send_signal(_stacks.SIGNAL)

    def release(self) -> None:
        self.process.release()
        if self.stacks is not None:
            self.stacks.close()
            self.stacks = None

    def __repr__(self) -> str:
        return f"<KeptWorker {self.process!r}>"


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

    def prepare(self) -> None:
        """A first launch will come soon: begin what takes long and can be done meanwhile.  Raises nothing."""

    def launch(self, ends: _os.Ends, setup: Setup) -> WorkerProcess: ...


class ContextLauncher:
    """Starts workers through a start context of multiprocessing or loky.

    ``zygote``: fork them from a server of safepool's own.
    """

    def __init__(
        self, context: Any, name: str = "safepool", *, zygote: bool = False, policy: LaunchPolicy | None = None
    ) -> None:
        if context.Process is multiprocessing.Process:  # the module itself: it has a context behind it
            context = context.get_context()
        self.method: str = context.get_start_method(allow_none=False)
        self._make = _contexts.process_class(context, self.method, zygote=zygote)
        self._name = name
        self._count = 0
        self._policy = policy if self.method == "fork" and "keeper" in _os.CAPABILITIES else None
        if self._policy is not None:
            _keeping()

    def prepare(self) -> None:
        """There is nothing to do."""

    def launch(self, ends: _os.Ends, setup: Setup) -> WorkerProcess:
        """Start one worker on these.  Raises what the start context raises."""
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
        fork = None if self._policy is None else _keeping().next_fork(self._policy)
        # (Where there is no keeper to be had the worker is forked all the same, and nobody ends what it leaves.)
        stacks = Stacks() if fork is not None and self._policy is not None and self._policy.stacks else None
        life = _worker.main if fork is None else functools.partial(_live_forked, fork, stacks)
        process = self._make(target=life, args=(ends, inherited), name=name)
        try:
            process.start()
        except BaseException as error:
            if stacks is not None:
                stacks.close()
            if not isinstance(error, RuntimeError):
                raise
            # Python 3.12 does not fork once the interpreter is exiting, and a worker may die while the
            # exit finishes the work.
            if self.method != "fork":
                raise
            return launcher_of(None, self._name, self._policy or PLAIN).launch(ends, setup)
        return ContextWorker(process, greeting, fork, stacks)

    def __repr__(self) -> str:
        return f"<ContextLauncher {self.method}>"


def _keeping() -> Any:
    # When a pool is made, and not on the thread that launches.  Scenario 1: (a) that thread imports, (b) the
    # program forks, (c) in the child the module is never more than half there.
    from . import _keep, _leftovers, _sweeping  # noqa: F401  (forked workers use all three)

    return _keep


def _live_forked(fork: Fork, stacks: Stacks | None, ends: _os.Ends, setup: Setup) -> None:
    """In a worker that the user's process forked: wear the tag by which the keeper knows its family, then work."""
    from . import _leftovers, _sweeping
    from ._os import linux

    linux.wear((fork.family, fork.number))
    if stacks is not None:
        _stacks.answer_in(stacks.fd)
    family = _sweeping.ForkedWorker(fork.number, fork.family, os.getpid())
    _worker.main(ends, setup, _leftovers.Leftovers(family, fork.policy))


class _ByValue:
    """A setup that pickles as our calls do, but within the start of its worker."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    def __reduce__(self) -> tuple[Any, ...]:
        return _payload.loads, (_payload.dumps_by_value(self._setup),)


class KeeperLauncher:
    """Starts workers through the keeper, which is their parent: forked from its zygote, or in new interpreters."""

    def __init__(self, method: str, name: str, policy: LaunchPolicy) -> None:
        self.method = method
        self._name = name
        self._policy = policy
        self._count = 0

    def prepare(self) -> None:
        """Start the keeper, if there is none: it takes as long as pickling the first function of a script."""
        _keeping().prepare(self._policy.isolation)

    def launch(self, ends: _os.Ends, setup: Setup) -> WorkerProcess:
        """Start one worker on these.  Raises ``OSError``, and what pickling raises."""
        _keep = _keeping()
        inherited: list[int] = []
        body = _dumps_setup((dict(os.environ), setup), inherited)
        self._count += 1
        named = {name: end.fileno() for name, end in ends._asdict().items() if end is not None}
        is_small = len(body) <= SMALL_BYTES
        stacks = Stacks() if self._policy.stacks else None
        try:
            if stacks is not None:
                named["stacks"] = stacks.fd
            process = _keep.launch(
                f"{self._name}-worker-{self._count}",
                self._policy,
                setup=body if is_small else None,
                fresh=self.method == "spawn",
                named=named,
                more=inherited,
            )
        except BaseException:
            if stacks is not None:
                stacks.close()
            raise
        return KeptWorker(process, b"" if is_small else _wire.encode(_wire.Frame(_wire.SETUP, body=body)), stacks)

    def __repr__(self) -> str:
        return f"<KeeperLauncher {self.method}>"


def _dumps_setup(value: Any, inherited: list[int]) -> bytes:
    """``inherited`` is filled as by ``_dumps_while_starting``.  Raises what pickling raises."""
    try:
        return _payload.dumps(value)
    except RuntimeError:
        # Locks, queues and shared memory pickle only while a process is being started.
        return _dumps_while_starting(value, inherited)


def _dumps_while_starting(value: Any, inherited: list[int]) -> bytes:
    """Pickle as for a child of a fork server; ``inherited`` is filled with the descriptors that it needs."""
    from multiprocessing import context, popen_forkserver

    class Starting:
        DupFd = popen_forkserver._DupFd

        def duplicate_for_child(self, fd: int) -> int:
            inherited.append(fd)
            return len(inherited) - 1

    context.set_spawning_popen(Starting())  # type: ignore[arg-type]
    try:
        return _payload.dumps_by_value(value)
    finally:
        context.set_spawning_popen(None)


def can_be_sent(setup: Setup) -> bool:
    """To a worker that is not forked from this process."""
    with suppress(Exception):
        _dumps_setup(setup, [])
        return True
    return False


def launcher_of(context: Any, name: str, policy: LaunchPolicy = PLAIN) -> ContextLauncher | KeeperLauncher:
    """The launcher of a pool with this ``mp_context``; without one, never a fork of the user's process."""
    if context is None or _contexts.is_stock(context):
        method = "forkserver" if context is None else context.get_start_method(allow_none=False)
        if method != "fork" and "keeper" in _os.CAPABILITIES:
            _keeping()
            if policy.isolation is not None:
                _keeping().require(policy.isolation)
            return KeeperLauncher(method, name, policy)
    if policy.isolation is not None:
        raise ValueError(f"isolation={policy.isolation!r} needs Linux, and a start method other than fork")
    if context is not None:
        return ContextLauncher(context, name, policy=policy)
    if "forkserver" in multiprocessing.get_all_start_methods():
        return ContextLauncher(multiprocessing.get_context("forkserver"), name, zygote=True)
    from loky.backend.context import get_context

    return ContextLauncher(get_context("loky"), name)
