"""Ends families that have no keeper for a parent: found by tags, signalled by descriptors, never by a bare pid.

Those of keepers that are gone, and those of workers that the user's own process forked.
"""

from __future__ import annotations

import os
from time import monotonic, sleep

from . import _registry, _tags
from ._families import LIMIT_S, MOST_TOLD
from ._os import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator

    from ._packets import Left
    from ._registry import Entry

    Found = dict[int, tuple[str, bool]]  # pid -> (command line, may it be signalled)

EMPTY_ROUNDS = 2  # in a row: then nobody is left
LOOK_AGAIN_S = 0.002
MOST_GENERATIONS = 1000  # between a worker and a process that it has to do with


def is_member(number: int, pid: int, spared: Container[int | None] = ()) -> bool:
    """Of the family of this keeper, but not of its workers ``spared``."""
    tag = linux.tag_of(pid)
    return tag is not None and _tags.is_in_family(number, tag) and _tags.owner(number, tag) not in spared


def signal_member(number: int, pid: int, signal: int = linux.SIGKILL, *, spared: Container[int | None] = ()) -> bool:
    """False: it is another user's."""
    return linux.signal_if(pid, lambda: is_member(number, pid, spared), signal)


def members(number: int, spared: Container[int | None] = ()) -> Iterator[int]:
    """Pids of the living members; they may be reused a moment later."""
    me = os.getpid()
    for pid in linux.processes():
        if is_member(number, pid, spared) and pid != me and not linux.is_zombie(pid):
            yield pid


def end_family(number: int, limit_s: float, spared: Container[int | None] = ()) -> Found:
    """Kill all members, to two empty rounds, for at most ``limit_s``; but those of the workers ``spared``."""
    return _end(lambda: members(number, spared), lambda pid: signal_member(number, pid, spared=spared), limit_s)


def _end(look: Callable[[], Iterable[int]], kill: Callable[[int], bool], limit_s: float) -> Found:
    found: Found = {}
    end = monotonic() + limit_s
    empty = 0
    while empty < EMPTY_ROUNDS and monotonic() < end:
        empty += 1
        for pid in look():
            if not found.get(pid, ("", True))[1]:
                continue
            if pid not in found:  # (who forks as fast as this kills must not wait for words)
                found[pid] = linux.words_of(pid) if len(found) < MOST_TOLD else "", True
            try:
                is_allowed = kill(pid)
            except OSError:
                is_allowed = True  # short of descriptors now: in the next round
            if is_allowed:
                empty = 0
            else:
                found[pid] = found[pid][0], False
        if empty < EMPTY_ROUNDS:
            sleep(LOOK_AGAIN_S)
    return found


def end_abandoned(limit_s: float) -> Iterator[tuple[Entry, Found]]:
    """End the families of keepers that were killed together with their programs, each within ``limit_s``.

    The files of those that have nobody left are removed, and nothing is said of them.
    """
    gone = {entry.number: entry for entry in _registry.entries() if is_abandoned(entry)}
    alive = _families_alive(gone)
    for number, entry in gone.items():
        if not entry.is_of_old() and number in alive:
            found = end_family(number, limit_s)
            if found:
                yield entry, found
            if any(members(number)):
                continue
        _registry.withdraw(entry.path)


def is_abandoned(entry: Entry) -> bool:
    """Its keeper is gone and so is its program; and what is left would be seen from here."""
    return entry.is_free and (entry.is_of_old() or (entry.is_visible() and not entry.has_user()))


def _families_alive(numbers: Container[int]) -> set[int]:
    """Those that have members; one look at the machine, however many there are."""
    tags = filter(None, map(linux.tag_of, linux.processes()))
    hards = {hard for soft, hard in tags if not _tags.is_left_on_purpose((soft, hard))}
    return {number for hard in hards for number in (hard, _tags.outermost(hard)) if number in numbers}


class ForkedWorker:
    """The family of a worker that the user's process forked: what loses its parent there goes to nobody of ours.

    So it is told by its tag, and by whether the worker is above it: what is not was left behind.
    """

    def __init__(self, number: int, family: int, pid: int) -> None:
        """``pid``: the worker, or 0 when it is dead."""
        self._number = number
        self._family = family
        self._pid = pid
        self._spared: set[int] = set()
        self.is_hopeless = False  # what cannot be ended in time is left to the end of the program

    def ask(self, word: str) -> list[Left]:
        """As the keeper is asked by the workers that are its children."""
        if word == "spare":
            self._spared.update(self._orphans())
        elif word == "look":
            found = self._orphans()
            self._spared.update(found)  # told once
            return [(pid, linux.words_of(pid), False) for pid in found]
        else:
            return [(pid, words, gone) for pid, (words, gone) in self.end().items()]
        return []

    def end(self) -> Found:
        return _end(self._orphans, lambda pid: linux.signal_if(pid, lambda: self._is_orphan(pid)), LIMIT_S)

    def close(self) -> None:
        """There is nothing to close."""

    def _is_member(self, pid: int) -> bool:
        tag = linux.tag_of(pid)
        if tag is None or _tags.is_left_on_purpose(tag):
            return False
        return _tags.owner(self._number, tag) == self._family

    def _orphans(self) -> list[int]:
        members = filter(self._is_member, linux.processes())
        if self._pid == 0:
            return [pid for pid in members if not linux.is_zombie(pid)]
        parents = {pid: linux.parent_of(pid) for pid in members}
        return [pid for pid in parents if not self._stays(pid, parents.get) and not linux.is_zombie(pid)]

    def _is_orphan(self, pid: int) -> bool:
        """Now: of those that were listed a parent may have ended, and its pid have been given to another process."""

        def parent_within(pid: int) -> int | None:
            return linux.parent_of(pid) if self._is_member(pid) else None

        return self._is_member(pid) and (self._pid == 0 or not self._stays(pid, parent_within))

    def _stays(self, pid: int | None, parent: Callable[[int], int | None]) -> bool:
        """It is the worker, or one that is spared, or below one of them."""
        for _ in range(MOST_GENERATIONS):
            if pid is None or pid == self._pid or pid in self._spared:
                break
            pid = parent(pid)
        return pid is not None and (pid == self._pid or pid in self._spared)
