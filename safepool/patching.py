"""Doors to other people's programs: put our pool where they look for the standard library's."""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
from collections.abc import Iterator
from contextlib import contextmanager

from .executor import SafePoolExecutor
from .waiting import as_completed


@contextmanager
def patch() -> Iterator[type[SafePoolExecutor]]:
    """While this lasts, ``concurrent.futures.ProcessPoolExecutor`` and ``as_completed`` are safepool's.

    It serves code that looks the names up when it uses them, or imports them while it lasts; a module
    that did ``from concurrent.futures import ProcessPoolExecutor`` before keeps what it has.
    Yields the class that was put in place.
    """
    places = (
        (concurrent.futures, "ProcessPoolExecutor", SafePoolExecutor),
        (concurrent.futures.process, "ProcessPoolExecutor", SafePoolExecutor),
        (concurrent.futures, "as_completed", as_completed),
    )
    before = [(module, name, getattr(module, name)) for module, name, _ in places]
    for module, name, ours in places:
        setattr(module, name, ours)
    try:
        yield SafePoolExecutor
    finally:
        for module, name, theirs in before:
            setattr(module, name, theirs)
