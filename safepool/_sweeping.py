"""Ends the families of keepers that are gone: found by their tags, signalled by descriptors, never by a bare pid."""

from __future__ import annotations

import os
from time import monotonic, sleep

from . import _tags
from ._os import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

EMPTY_ROUNDS = 2  # in a row: then nobody is left
LOOK_AGAIN_S = 0.002


def is_member(number: int, pid: int) -> bool:
    tag = linux.tag_of(pid)
    return tag is not None and _tags.is_in_family(number, tag)


def signal_member(number: int, pid: int, signal: int = linux.SIGKILL) -> bool:
    """False: it is another user's."""
    return linux.signal_if(pid, lambda: is_member(number, pid), signal)


def members(number: int) -> Iterator[int]:
    """Pids of the living members of the family of this keeper; they may be reused a moment later."""
    me = os.getpid()
    for pid in linux.processes():
        if is_member(number, pid) and pid != me and not linux.is_zombie(pid):
            yield pid


def end_family(number: int, limit_s: float) -> dict[int, tuple[str, bool]]:
    """Kill all members, to two empty rounds, for at most ``limit_s``; pid -> (command line, was it allowed)."""
    found: dict[int, tuple[str, bool]] = {}
    end = monotonic() + limit_s
    empty = 0
    while empty < EMPTY_ROUNDS and monotonic() < end:
        empty += 1
        for pid in members(number):
            if found.get(pid, ("", True))[1]:
                found.setdefault(pid, (linux.words_of(pid), True))
                if signal_member(number, pid):
                    empty = 0
                else:
                    found[pid] = found[pid][0], False
        if empty < EMPTY_ROUNDS:
            sleep(LOOK_AGAIN_S)
    return found
