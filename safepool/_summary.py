"""Tells what became of the tasks of a program: a few lines on stderr for people, JSON for programs.

A summary is a ``dict`` of counts, of ``seconds_lost``, and of the first ``failures``, see ``_tally``.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress

from . import _os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

COUNTS = ("pools", "done", "failed", "cancelled", "retried", "killed", "workers_lost")
MOST_TOLD = 100  # failures by name
MOST_BYTES = 3500  # that surely go into a pipe that has room at all


def tell(told: Mapping[str, Any], path: str | os.PathLike[str] | None) -> None:
    """On stderr, and in the file ``path`` if there is to be one.  Raises nothing."""
    if path is not None:
        try:
            write(told, path)
        except (OSError, TypeError, ValueError) as error:
            say(f"safepool: the summary cannot be written: {error}")
    say(words_of(told))


def write(told: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Whole or not at all, whoever reads it meanwhile; a device or a pipe is written to.  Raises ``OSError``."""
    text = json.dumps(told, indent=1) + "\n"
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        fd = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
        with open(fd, "w", encoding="utf-8") as file:
            file.write(text)
        return
    beside = f"{path}.{os.getpid()}"
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(beside, path)
    except OSError:
        with suppress(OSError):
            os.unlink(beside)
        raise


def words_of(told: Mapping[str, Any]) -> str:
    lines = [
        f"safepool: {told['done']} tasks done, {told['failed']} failed, {told['cancelled']} cancelled; "
        f"{told['retried']} attempts retried, {told['killed']} killed, {told['workers_lost']} workers lost, "
        f"{told['seconds_lost']:.1f} s of work lost"
    ]
    lines += [f"safepool: failed: {failure['task']}: {failure['why']}" for failure in told["failures"]]
    untold = told["failed"] - len(told["failures"])
    if untold > 0:
        lines.append(f"safepool: and {untold} more")
    return "\n".join(lines)


def say(words: str) -> None:
    """On stderr, if anybody reads it: a pipe that is full must not hold the exit of a program."""
    stream = sys.stderr
    if stream is None:
        return
    try:
        if not _os.has_room(stream.fileno()):
            return
    except (AttributeError, OSError, ValueError):
        pass  # closed, or an object of the program's own
    try:
        if len(words.encode(errors="replace")) > MOST_BYTES:
            words = words.encode(errors="replace")[:MOST_BYTES].decode(errors="ignore") + " ..."
        print(words, file=stream, flush=True)
    except (AttributeError, OSError, ValueError):
        pass


def merged(tolds: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One summary of several processes."""
    tolds = tuple(tolds)
    failures = [failure for told in tolds for failure in told["failures"]]
    sums = {name: sum(told[name] for told in tolds) for name in (*COUNTS, "seconds_lost")}
    return {**sums, "failures": failures[:MOST_TOLD]}
