"""Ends families: what has lost its parent, is the keeper's child by now, and comes from a worker that is done with it.

Everything that is signalled here is an own child that was not waited for, so its pid cannot be another process's.
A family is at its end when two looks find nobody: whoever is killed passes its own children on to the keeper.
"""

from __future__ import annotations

import os
from time import monotonic

from . import _tags
from ._os import linux
from ._packets import NOT_ENDED

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable, Collection, Iterator

    from ._packets import Left

    Done = Callable[[list[Left]], object]
else:
    import _signal

LIMIT_S = 1.0  # for a family to end; then its worker's end is told all the same
MOST_TOLD = 32  # leftovers of one sweep


class Family:
    """Of a worker that lives; where there are no tags, of all that live."""

    def __init__(self) -> None:
        self.workers = 0  # where there are no tags all are of one family
        self.spared: set[int] = set()  # orphans that its initializer made, or that were only reported: they stay


class Sweep:
    """The ending of one family, or with ``kill=False`` only a look at it."""

    def __init__(self, kill: bool, done: Done) -> None:
        self.kill = kill
        self.until = monotonic() + LIMIT_S
        self.done = done
        self.found: dict[int, Left] = {}


class Families:
    """Families are known by the soft limit of their tag; None: it cannot be told whose a process is."""

    def __init__(self, number: int | None) -> None:
        self._number = number  # the keeper's tag
        self._is_marked = _tags.is_left_on_purpose(linux.own_tag())  # then all are, and it means nothing
        self._count = 0
        self._living: dict[int | None, Family] = {}
        self._left: set[int | None] = set()  # of dead workers, to be left alone
        self._sweeps: dict[int | None, Sweep] = {}
        self.not_orphans: set[int] = set()  # own children that were asked for: workers, zygotes
        self.unborn: set[int | None] = set()  # of workers that are being forked; None: one in advance is

    def new(self) -> int | None:
        """The tag of the next worker's family."""
        if self._number is None:
            return None
        for _ in range(_tags.most_workers(self._number)):
            self._count += 1
            family = _tags.of_worker(self._number, self._count)
            if family not in self._living and family not in self._sweeps:
                self._left.discard(family)
                return family
        raise OSError("there are too many workers to tell their families apart")

    def begin(self, family: int | None) -> None:
        """A worker of it lives."""
        self._living.setdefault(family, Family()).workers += 1

    def spare(self, family: int | None) -> None:
        """What orphans it has now stay as long as its worker."""
        living = self._living.get(family)
        if living is not None:
            living.spared |= {pid for pid, whose in self._orphans() if whose == family}

    def sweep(self, family: int | None, *, kill: bool, done: Done) -> None:
        """Begin to end what was left in it; ``done`` is called with what was found."""
        earlier = self._sweeps.pop(family, None)
        if earlier is not None:  # its worker asked, and died over it
            earlier.done(list(earlier.found.values()))
        self._sweeps[family] = Sweep(kill, done)

    def end(self, family: int | None, *, leave: bool, done: Done) -> None:
        """A worker of it is dead."""
        living = self._living.get(family)
        if living is not None:
            living.workers -= 1
            if living.workers <= 0:
                del self._living[family]
        if leave:
            self._left.add(family)
            done([])
        else:
            self.sweep(family, kill=True, done=done)

    def is_at_work(self) -> bool:
        return bool(self._sweeps)

    def go_on(self, reap: Callable[[], None]) -> None:
        """Look at the orphans, twice, until a look changes nothing that could be told."""
        while self._sweeps:
            left = self._look()
            reap()
            left |= self._look()
            now = monotonic()
            finished = [
                family
                for family, sweep in self._sweeps.items()
                if family not in left or not sweep.kill or now >= sweep.until
            ]
            if not finished:
                return
            for family in finished:
                self._finish(family, is_gone=family not in left)

    def _finish(self, family: int | None, *, is_gone: bool) -> None:
        """Tell; a family that forks as fast as it is killed is killed on and on, but nobody waits for it any longer."""
        sweep = self._sweeps.pop(family)
        found = list(sweep.found.values())
        if sweep.kill and not is_gone and family is not None:
            if family in self._living:
                found.append(NOT_ENDED)  # its worker ends over it: the next task would start among them
            else:
                silent = self._sweeps[family] = Sweep(kill=True, done=_tell_nobody)
                silent.until = float("inf")
        sweep.done(found)

    def _orphans(self) -> Iterator[tuple[int, int | None]]:
        """(pid, family) of the children that nobody asked for."""
        for pid, tag in self._children(but=self.not_orphans):
            yield pid, None if tag is None or self._number is None else _tags.owner(self._number, tag)

    def _look(self) -> set[int | None]:
        """Kill what is to be killed; the families that still have somebody."""
        left: set[int | None] = set()
        for pid, family in self._orphans():
            sweep, living = self._sweeps.get(family), self._living.get(family)
            if family in self.unborn:
                # Scenario 1: (a) one is forked, (b) its parent has ended, so it is an orphan, (c) we hear of (a).
                left.add(family)
            elif sweep is None:
                if living is None and family not in self._left:
                    kill(pid)  # of a worker long dead, or nobody's
            elif living is None or pid not in living.spared:
                is_news = pid not in sweep.found and len(sweep.found) < MOST_TOLD and not linux.is_zombie(pid)
                words = linux.words_of(pid) if is_news else ""  # the dead have none
                gone = kill(pid) if sweep.kill else False
                if gone:
                    left.add(family)
                if is_news:
                    sweep.found[pid] = pid, words, gone
                if living is not None and not sweep.kill:
                    living.spared.add(pid)  # told once
        return left

    def kill_all(self) -> tuple[int, int]:
        """At the end of everything: how many children there are, and how many of them may not be killed."""
        there = may_not = 0
        for pid, _ in self._children():
            there += 1
            may_not += not kill(pid)
        return there, may_not

    def _children(self, but: Collection[int] = ()) -> Iterator[tuple[int, _tags.Tag | None]]:
        """Own children and their tags; what is left on purpose does not count."""
        for pid in linux.children():
            if pid in but:
                continue
            tag = linux.tag_of(pid)
            if self._is_marked or not _tags.is_left_on_purpose(tag):
                yield pid, tag


def _tell_nobody(found: list[Left]) -> None:
    pass


def kill(child: int) -> bool:
    """A child that was not waited for.  False: it is another user's by now."""
    try:
        os.kill(child, _signal.SIGKILL)
    except PermissionError:
        return False
    return True
