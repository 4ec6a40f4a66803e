"""Doors to other people's programs: our pool where they look for the standard library's, and for Pebble's.

The patches that are active form a stack, and whatever holds one of the stand-ins holds that of the uppermost: so they
may be undone in any order, and after the last one every module has what it had.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import process
from contextlib import suppress
from typing import Any, Literal, Self

from . import _loading, _summary, waiting
from ._launch import can_be_sent
from ._tally import Tally
from ._worker import Setup
from .executor import SafePoolExecutor

OURS = __package__
PEBBLE = "pebble"
LOCK_LIMIT_S = 30.0

Where = tuple[dict[str, Any], str]  # the namespace of a module, and a name in it


def patch(*, start_method: str | None = None, summary: bool | str | os.PathLike[str] = True, **policy: Any) -> Patch:
    """From now on programs that use ``concurrent.futures.ProcessPoolExecutor``, ``as_completed`` and ``wait`` use ours.

    In ``concurrent.futures``, in every module that has taken these names from there under whatever name, and in those
    that are imported later; and Pebble's ``ProcessPool``, where Pebble is installed.  Undone by ``undo()``, or at the
    end of a ``with`` block.  May be nested, and undone in any order.

    * ``start_method``: that of every pool, whatever the program asks for (but "fork", for one that has its workers
      replaced after so many tasks, which cannot be);
    * ``summary``: tell on stderr, when the process exits, what became of the tasks; a path: in that file too, as JSON;
      False: do not.  ``Patch.summary()`` gives it at any time;
    * ``policy``: what ``SafePoolExecutor`` takes besides what the standard library's class does: ``timeout``,
      ``deadline``, ``stall_timeout``, ``retry``, ``grace`` ...  It applies to every pool that is made meanwhile.

    The stand-ins of ``as_completed`` and ``wait`` raise only what the program itself asks for by ``timeout``: what goes
    over a limit of the policy fails as a future of its own.  Raises ``TypeError`` or ``ValueError`` for a policy that
    no pool can have, and ``FileNotFoundError`` if there is no directory for the summary.
    """
    made = Patch({**policy, "start_method": start_method}, summary=summary)
    made._activate()
    return made


class Patch:
    """What ``patch`` returns: ``undo()`` it, ask it for its ``summary()``, or use it as a context manager."""

    def __init__(self, policy: dict[str, Any], *, summary: bool | str | os.PathLike[str]) -> None:
        _check(policy, summary)
        method = policy.pop("start_method", None)
        context = None if method is None else multiprocessing.get_context(method)
        self._tally = Tally()
        self.executor = _class_with(policy, context, self._tally)
        self.executor(1)  # starts nothing; a policy that is wrong is told here
        self._tally.add(pools=-1)
        self._stand_ins: dict[str, object] = {
            "ProcessPoolExecutor": self.executor,
            "as_completed": _stand_in_as_completed,
            "wait": _stand_in_wait,
        }
        self._summary = summary
        self._pid = os.getpid()

    def _activate(self) -> None:
        with _Locked():
            if not _active:
                _loading.once_loaded(PEBBLE, stand_in_for_pebble)
            _show([*_active, self])
        if self._summary is not False:
            _to_tell.append(self)

    def undo(self) -> None:
        """Put back what was there.  Pools that were made under it go on.  Nothing happens the second time."""
        with _Locked():
            if self in _active:
                _show([patch for patch in _active if patch is not self])
            if not _active:
                _loading.forget(PEBBLE)
        if not self._has_news() and self in _to_tell:
            _to_tell.remove(self)

    def summary(self) -> dict[str, Any]:
        """What became of the tasks of the pools that were made under it.

        ``pools``; tasks ``done``, ``failed`` and ``cancelled``; attempts ``retried`` and ``killed``; ``workers_lost``;
        ``seconds_lost``, the run time of attempts that came to nothing; ``failures``, the first hundred, each with
        ``task`` and ``why``.
        """
        return self._tally.as_dict()

    def write_at_exit(self, path: str) -> None:
        """The summary, as JSON, for whoever reads it after this process; nothing is written if no pool was made."""
        atexit.register(self._write, path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> Literal[False]:
        self.undo()
        return False

    def __repr__(self) -> str:
        return f"<Patch {'active' if self in _active else 'undone'} {self._tally.counts}>"

    def _tell(self) -> None:
        """At the exit of the process, when its pools have ended."""
        if self._has_news():
            _summary.tell(self.summary(), None if isinstance(self._summary, bool) else self._summary)

    def _write(self, path: str) -> None:
        if self._has_news():
            with suppress(OSError):  # whoever was to read it is gone
                _summary.write(self.summary(), path)

    def _has_news(self) -> bool:
        return os.getpid() == self._pid and bool(self._tally.counts["pools"])


def _check(policy: dict[str, Any], summary: object) -> None:
    for name in ("max_workers", "mp_context", "initializer", "initargs"):
        if name in policy:
            raise TypeError(f"{name} is for the program to say; patch(start_method=) sets how workers are started")
    if isinstance(summary, bool):
        return
    if not isinstance(summary, (str, os.PathLike)):
        raise TypeError(f"summary must be True, False or a path; got {summary!r}")
    folder = os.path.dirname(os.path.abspath(summary))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"there is no directory {folder!r} for the summary")


class _StandsIn(type):
    """Whoever asks for the type of a pool means the standard library's, or Pebble's, and has made some of theirs."""

    def __instancecheck__(cls, instance: object) -> bool:
        return super().__instancecheck__(instance) or _is_meant(cls, type(instance))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return super().__subclasscheck__(subclass) or _is_meant(cls, subclass)


def _is_meant(cls: type, kind: type) -> bool:
    """Subclasses that a program makes of a stand-in are only what they are."""
    return "stands_in_for" in vars(cls) and issubclass(kind, vars(cls)["stands_in_for"])


def _class_with(policy: dict[str, Any], context: Any, tally: Tally) -> type[SafePoolExecutor]:
    """The pool under a policy.  It says that it is the standard library's class: by that name it can be pickled."""

    class ProcessPoolExecutor(SafePoolExecutor, metaclass=_StandsIn):
        __doc__ = process.ProcessPoolExecutor.__doc__
        stands_in_for = _originals["ProcessPoolExecutor"]

        def __init__(
            self,
            max_workers: int | None = None,
            mp_context: Any = None,
            initializer: Callable[..., object] | None = None,
            initargs: tuple[Any, ...] = (),
            **more: Any,
        ) -> None:
            replaces = bool(more.get("max_tasks_per_child"))
            if isinstance(initargs, Iterable):
                initargs = tuple(initargs)
            if context is not None and not (replaces and context.get_start_method() == "fork"):
                mp_context = context
            elif mp_context is None and not replaces:
                mp_context = _fork_if_need_be(Setup(initializer, initargs))
            super().__init__(max_workers, mp_context, initializer, initargs, **{**more, **policy})

        def _observers(self, on_event: Any) -> list[Any]:
            return [*super()._observers(on_event), tally.pool()]

    ProcessPoolExecutor.__module__ = process.__name__
    ProcessPoolExecutor.__qualname__ = "ProcessPoolExecutor"
    return ProcessPoolExecutor


def _fork_if_need_be(setup: Setup) -> Any:
    """None: the safe start.  A lock, say, that was made for workers that inherit it cannot be sent to others."""
    if setup.initializer is None or can_be_sent(setup):
        return None
    default = multiprocessing.get_context()
    return default if default.get_start_method() == "fork" else None


def _stand_in_as_completed(fs: Any, timeout: float | None = None) -> Iterator[Any]:
    """``concurrent.futures.as_completed``, which begins with its first ``next``, too."""
    yield from waiting.as_completed(fs, _as_seconds(timeout))


def _stand_in_wait(fs: Any, timeout: float | None = None, return_when: str = concurrent.futures.ALL_COMPLETED) -> Any:
    """``concurrent.futures.wait``, which looks at ``return_when`` only if it has to wait, too."""
    fs = set(fs)
    if all(future.done() for future in fs):
        return_when = concurrent.futures.ALL_COMPLETED
    return waiting.wait(fs, _as_seconds(timeout), return_when)


def _as_seconds(timeout: Any) -> float | None:
    """Whatever the standard library can count with."""
    return None if timeout is None else max(0.0, float(timeout))


# ------------------------------------------------------- who holds what, and where

_active: list[Patch] = []
_to_tell: list[Patch] = []  # at the exit
_originals: dict[str, object] = {
    "ProcessPoolExecutor": process.ProcessPoolExecutor,
    "as_completed": concurrent.futures.as_completed,
    "wait": concurrent.futures.wait,
}
_added: list[Where] = []  # names that were not there before: ``concurrent.futures`` loads its classes when asked
_lock = threading.RLock()


def _tell_all() -> None:
    for patch in _to_tell:
        patch._tell()


atexit.register(_tell_all)


class _Locked:
    """One thread at a time; another one waits, but not for ever."""

    def __enter__(self) -> None:
        if not _lock.acquire(timeout=LOCK_LIMIT_S):
            raise TimeoutError("another thread has been patching modules for too long")

    def __exit__(self, *_: object) -> None:
        _lock.release()


def _show(patches: list[Patch]) -> None:
    """Have these be the active ones."""
    if PEBBLE in _originals:
        from ._pebble import class_with

        for patch in patches:
            patch._stand_ins.setdefault(PEBBLE, class_with(patch.executor))
    wanted = {**_originals, **(patches[-1]._stand_ins if patches else {})}
    known = {
        id(thing): key
        for things in (_originals, *(patch._stand_ins for patch in (*_active, *patches)))
        for key, thing in things.items()
    }
    if patches and not _active:
        _add("ProcessPoolExecutor")
    # First where modules that are imported meanwhile look.  Scenario 1: (a) a module is importing one of the names,
    # on another thread, and has looked it up, (b) everything is replaced, (c) it stores what it found: so look twice.
    _replace([vars(concurrent.futures)], known, wanted)
    for _ in range(2):
        _replace(_namespaces(), known, wanted)
    _active[:] = patches
    if not patches:
        while _added:
            namespace, name = _added.pop()
            if namespace.get(name) is _originals[name]:
                del namespace[name]


def stand_in_for_pebble(module: Any = None) -> None:
    """Pebble is loaded, by whomever: what is active stands in for its pool, too."""
    pebble: Any = sys.modules.get(PEBBLE)
    if hasattr(pebble, "ProcessPool"):  # else it is just being loaded
        with _Locked():
            if PEBBLE not in _originals:
                _originals[PEBBLE] = pebble.ProcessPool
                _show([*_active])


def _add(name: str) -> None:
    namespace = vars(concurrent.futures)
    if name not in namespace:
        namespace[name] = _originals[name]
        _added.append((namespace, name))


def _namespaces() -> list[dict[str, Any]]:
    """Of all modules but our own, without waking those that load themselves when they are touched."""
    found = []
    for name, module in tuple(sys.modules.items()):
        if name.partition(".")[0] != OURS:
            with suppress(AttributeError):  # not a module, but something that a program has put there
                found.append(object.__getattribute__(module, "__dict__"))
    return [namespace for namespace in found if isinstance(namespace, dict)]


def _replace(namespaces: list[dict[str, Any]], known: dict[int, str], wanted: dict[str, object]) -> None:
    for namespace in namespaces:
        for name, value in tuple(namespace.items()):
            key = known.get(id(value))
            if key is not None:
                namespace[name] = wanted[key]
