"""A store of our own, and a process at the other end of a socket."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from safepool import _bulk
from safepool._os import memory
from tests.bulk.peer import Peer

if not memory.HAS_BLOCKS:
    collect_ignore_glob = ["test_*"]


@pytest.fixture
def store() -> Iterator[_bulk.Store]:
    made = _bulk.Store()
    yield made
    made.close()


@pytest.fixture
def peers() -> Iterator[Callable[[], Peer]]:
    """Starts processes, and ends each of them."""
    made: list[Peer] = []

    def start() -> Peer:
        made.append(Peer(_bulk.Store()))
        return made[-1]

    yield start
    for peer in made:
        peer.close()


@pytest.fixture
def peer(peers: Callable[[], Peer]) -> Peer:
    return peers()
