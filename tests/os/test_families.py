"""How families end, with made-up children: nobody waits for ever, and nobody is let off."""

from __future__ import annotations

import os
import sys

import pytest

if sys.platform != "linux":
    pytest.skip("only Linux lets a process adopt orphans", allow_module_level=True)

from safepool import _families, _tags
from safepool._families import Families
from safepool._os import linux
from safepool._packets import NOT_ENDED

NUMBER = _tags.FIRST + (9 << 34)


class Children:
    """Of a keeper: a family with one orphan, whoever is killed, until it is worn out."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.family = 0
        self.kills = 0
        self.most = 1 << 30
        patch.setattr(linux, "children", lambda: [1000 + self.kills] if self.kills < self.most else [])
        patch.setattr(linux, "tag_of", lambda pid: (self.family, NUMBER))
        patch.setattr(linux, "own_tag", lambda: (NUMBER, NUMBER))
        patch.setattr(linux, "is_zombie", lambda pid: False)
        patch.setattr(linux, "words_of", lambda pid: "a bomb")
        patch.setattr(os, "kill", self._kill)
        patch.setattr(_families, "LIMIT_S", 0.0)

    def _kill(self, pid: int, number: int) -> None:
        assert pid == 1000 + self.kills
        self.kills += 1


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Children:
    return Children(monkeypatch)


def with_worker(children: Children) -> tuple[Families, int]:
    """Families, one of them that of a living worker."""
    families = Families(NUMBER)
    children.family = families.new() or 0
    families.begin(children.family)
    return families, children.family


def go_on(families: Families, rounds: int) -> None:
    for _ in range(rounds):
        families.go_on(lambda: None)


def test_a_dead_workers_family_that_does_not_end_is_told_in_time_and_killed_on_and_on(children: Children) -> None:
    """Its worker's death is told after the limit; the killing stops when nobody is left, and not before."""
    families, family = with_worker(children)
    told: list[list[tuple[int, str, bool]]] = []
    families.end(family, leave=False, done=told.append)
    go_on(families, 1)
    assert len(told) == 1
    assert all(words == "a bomb" and gone for _, words, gone in told[0])
    go_on(families, 10)
    assert children.kills > 10
    assert families.is_at_work()
    children.most = children.kills
    go_on(families, 1)
    assert not families.is_at_work()
    assert len(told) == 1


def test_a_living_worker_is_told_that_its_family_does_not_end(children: Children) -> None:
    """So it ends itself after its answer, and its family with it: else the next task would start among them."""
    families, family = with_worker(children)
    told: list[list[tuple[int, str, bool]]] = []
    families.sweep(family, kill=True, done=told.append)
    go_on(families, 1)
    assert told[0][-1] == NOT_ENDED
    assert not families.is_at_work()
    families.end(family, leave=False, done=told.append)
    go_on(families, 1)
    assert families.is_at_work()


def test_numbers_of_families_that_are_still_ended_are_not_given_again(children: Children) -> None:
    """However long that takes."""
    families, first = with_worker(children)
    families.end(first, leave=False, done=lambda found: None)
    go_on(families, 1)
    assert first not in {families.new() for _ in range(2 * _tags.most_workers(NUMBER))}
