"""The pools that are measured, behind one face: ``submit``, ``map`` and ``close``."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

LIMIT_S = 60.0  # for anything that is waited for here

STOCK, OURS, PEBBLE = "stock", "safepool", "pebble"


def nothing(number: int) -> int:
    """The no-op task."""
    return number


class Pool(Protocol):
    """What a measurement may ask of a pool."""

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]: ...

    def map(self, fn: Callable[[Any], Any], items: Iterable[Any], chunksize: int) -> Iterator[Any]: ...

    def close(self) -> None: ...


class _ExecutorPool:
    def __init__(self, executor: Executor) -> None:
        self.submit = executor.submit
        self._executor = executor

    def map(self, fn: Callable[[Any], Any], items: Iterable[Any], chunksize: int) -> Iterator[Any]:
        return self._executor.map(fn, items, chunksize=chunksize, timeout=LIMIT_S)

    def close(self) -> None:
        self._executor.shutdown()


class _PebblePool:
    def __init__(self, workers: int) -> None:
        from pebble import ProcessPool

        self._pool: Any = ProcessPool(workers)  # its annotations are incomplete

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        future: Future[Any] = self._pool.schedule(fn, args=args)
        return future

    def map(self, fn: Callable[[Any], Any], items: Iterable[Any], chunksize: int) -> Iterator[Any]:
        results: Iterator[Any] = self._pool.map(fn, items, chunksize=chunksize).result(LIMIT_S)
        return results

    def close(self) -> None:
        self._pool.close()
        self._pool.join(LIMIT_S)


def open_pool(name: str, workers: int) -> Pool:
    """A new pool of ``workers``, in its own default start method.  Imports what it needs only now."""
    if name == PEBBLE:
        return _PebblePool(workers)
    if name == OURS:
        from safepool import SafePoolExecutor

        return _ExecutorPool(SafePoolExecutor(workers))
    from concurrent.futures import ProcessPoolExecutor

    return _ExecutorPool(ProcessPoolExecutor(workers))


def versions() -> dict[str, str | None]:
    """What is measured where; None: that package is not installed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": str(cores),
        OURS: _version_of(OURS),
        PEBBLE: _version_of(PEBBLE),
    }


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def contestants(found: dict[str, str | None]) -> list[str]:
    """The pools that can be measured here, the stock pool first."""
    return [STOCK, OURS, *([PEBBLE] if found[PEBBLE] else [])]


def heading(found: dict[str, str | None]) -> str:
    """One line on the versions, and one on a peer that is missing."""
    line = ", ".join(f"{name} {what}" for name, what in found.items() if what)
    missing = [f"{name} is not installed, so it is left out" for name, what in found.items() if not what]
    return "\n".join([line, *missing])


def in_turns(names: list[str], rounds: int) -> Iterator[str]:
    """Every pool once a round, each round beginning with another one, so that drift hits all alike."""
    for turn in range(rounds):
        first = turn % len(names)
        yield from names[first:] + names[:first]
