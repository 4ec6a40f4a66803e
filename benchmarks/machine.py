"""What is measured where: one line on the machine, and which version of which pool, or that it is left out."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.pools import POOLS

Versions = dict[str, str | None]


def installed(pools: Iterable[str] = POOLS) -> Versions:
    """Pool -> its version; "" for what is part of Python, None for what is not installed."""
    return {name: "" if POOLS[name] is None else _version_of(str(POOLS[name])) for name in pools}


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def present(found: Versions) -> list[str]:
    return [name for name, what in found.items() if what is not None]


def machine_line() -> str:
    """Processor, cores that may be used, kernel and Python."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = [_processor(), f"{cores} cores", f"{platform.system()} {platform.release()}"]
    return ", ".join([*words, f"{platform.python_implementation()} {platform.python_version()}"])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def versions_line(found: Versions) -> str:
    """Pools with their versions; those that are not installed are said to be left out."""
    words = [f"{name} {what}".strip() for name, what in found.items() if what is not None]
    missing = [f"{name}: not installed, left out" for name, what in found.items() if what is None]
    return "; ".join([", ".join(words), *missing])


def heading(found: Versions) -> str:
    return f"{machine_line()}\n{versions_line(found)}"


def in_turns(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Every pool once a round, each round beginning with another one, so that drift hits all alike."""
    for turn in range(rounds):
        first = turn % len(names)
        yield from (*names[first:], *names[:first])
