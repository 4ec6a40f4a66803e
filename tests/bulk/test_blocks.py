"""Blocks are used again, but only when they have been read, and no more of them are kept than is said."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from time import monotonic

import pytest

from safepool import _blocks, _bulk
from safepool._os import memory
from safepool._parts import BIG_BYTES
from tests.bulk.peer import LENT, Peer, echo, pickled, size

BIG = 3 * BIG_BYTES


def _packed(store: _bulk.Store, data: bytes) -> _bulk.Cargo:
    return _bulk.pack(pickled(data), store)


def _read(message: bytes, fd: int, *, close: bool = True) -> bytes:
    """As a receiver does, here."""
    arrived = _bulk.Arrived(message, os.dup(fd))
    data: bytes = arrived.load()
    if close:
        arrived.close()
    return data


def test_a_block_is_used_again_once_it_is_read(store: _bulk.Store) -> None:
    """The same memory carries the next thing, without being touched for the first time again."""
    inodes = set()
    for number in range(5):
        data = bytes([number]) * BIG
        cargo = _packed(store, data)
        lent = cargo.lend()
        assert lent is not None
        inodes.add(os.fstat(lent[1]).st_ino)
        assert _read(*lent) == data
        del cargo
    assert len(inodes) == 1
    assert repr(store).startswith("<Store of 1 blocks: ")


def test_a_block_is_not_used_again_before(store: _bulk.Store) -> None:
    """Neither while the sender may need it nor while a receiver may read it."""
    cargo = _packed(store, b"1" * BIG)
    lent = cargo.lend()
    assert lent is not None
    message, fd = lent[0], os.dup(lent[1])
    other = _packed(store, b"2" * BIG)  # the sender still has the first
    del cargo
    third = _packed(store, b"3" * BIG)  # it is dropped, but nobody has read it
    assert _read(message, fd) == b"1" * BIG
    fourth = _packed(store, b"4" * BIG)
    lent = fourth.lend()
    assert lent is not None
    assert os.fstat(lent[1]).st_ino == os.fstat(fd).st_ino
    os.close(fd)
    for cargo, data in ((other, b"2" * BIG), (third, b"3" * BIG)):
        lent = cargo.lend()
        assert lent is not None
        assert _read(*lent) == data


def test_only_the_last_receiver_counts(store: _bulk.Store) -> None:
    """Sent, taken back and sent again: what the first receiver says is not taken for the second one's word."""
    cargo = _packed(store, b"1" * BIG)
    first, second = cargo.lend(), cargo.lend()
    assert first is not None
    assert second is not None
    message, fd = second[0], os.dup(second[1])
    _bulk.Arrived(first[0], os.dup(first[1])).close()
    del cargo
    _packed(store, b"2" * BIG)
    assert _read(message, fd) == b"1" * BIG
    os.close(fd)


def test_sizes_that_grow_and_shrink(peer: Peer) -> None:
    """A block grows with what it must carry, and carries less; none is kept for something far smaller."""
    for number in (BIG, 5 * BIG, 2 * BIG, 5 * BIG + 1, BIG, 30 * BIG, BIG_BYTES):
        data = os.urandom(1000) * (number // 1000)
        assert peer.call(echo, data) == data
    assert set(peer.hows) == {LENT}


def test_what_is_cached_is_bounded() -> None:
    """However much was on its way at once, no more than the bound is kept."""
    store = _bulk.Store(3 * BIG)
    many = [_packed(store, b"x" * BIG) for _ in range(10)]
    many.clear()
    del many
    _packed(store, b"x" * BIG)
    assert store.cached_bytes() <= 4 * BIG  # the last was given back since
    assert len([block for block in _blocks._all if block in store._free + store._back]) <= 4
    store.close()


def test_blocks_are_bounded_in_number() -> None:
    """Of many calls that wait, most do so on the heap, and go by a block when it is their turn."""
    store = _bulk.Store(most_blocks=2)
    before = len(os.listdir("/proc/self/fd"))
    many = [_packed(store, bytes([n]) * BIG) for n in range(6)]
    assert len(os.listdir("/proc/self/fd")) == before + 2
    assert many[5].lend() is None
    assert b"".join(many[5].inline()).endswith(bytes([5]) * 100 + b"\x94.")
    for n, cargo in enumerate(many):
        many[n] = None  # type: ignore[call-overload]
        lent = cargo.lend()
        assert lent is not None
        assert _read(*lent) == bytes([n]) * BIG
        del cargo
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_not_used_is_given_back(store: _bulk.Store) -> None:
    """After a while without big data nothing is kept, and nobody need look again."""
    assert store.trim(monotonic()) is None
    _packed(store, b"x" * BIG)
    again = store.trim(monotonic())
    assert again is not None
    assert again <= monotonic() + _blocks.KEEP_S
    assert store.cached_bytes() >= BIG
    assert store.trim(again) is None
    assert store.cached_bytes() == 0


def test_a_closed_store_keeps_nothing() -> None:
    """What was packed before can still be sent; then it is gone."""
    before = len(os.listdir("/proc/self/fd"))
    store = _bulk.Store()
    cargo = _packed(store, b"x" * BIG)
    store.close()
    lent = cargo.lend()
    assert lent is not None
    assert _read(*lent) == b"x" * BIG
    assert _packed(store, b"y" * BIG).lend() is None
    del cargo
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_block_cannot_be_cut_short(store: _bulk.Store) -> None:
    """A task that truncates what descriptors it finds does not end the program by a signal."""
    cargo = _packed(store, b"x" * BIG)
    lent = cargo.lend()
    assert lent is not None
    with pytest.raises(PermissionError):
        os.ftruncate(lent[1], 0)


def test_a_forked_child_leaves_blocks_alone(store: _bulk.Store) -> None:
    """A child that the program forks neither keeps the memory nor uses it for its own."""
    cargo, free = _packed(store, b"x" * BIG), _packed(store, b"y" * BIG)
    del free
    child = os.fork()
    if child == 0:
        held = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_there(fd)]
        mine = _packed(store, b"z" * BIG)
        is_fine = not any("memfd:safepool" in one for one in held) and mine.lend() is not None
        os._exit(0 if is_fine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    lent = cargo.lend()
    assert lent is not None
    assert _read(*lent) == b"x" * BIG


def _is_there(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_many_threads_share_a_store(peers: Callable[[], Peer]) -> None:
    """Callers on many threads pack at the same time, and each gets its own back."""
    store = _bulk.Store()
    wrong: list[int] = []

    def use(number: int) -> None:
        peer = peers()
        peer.store = store
        for n in range(8):
            data = bytes([number * 10 + n]) * (BIG + number)
            if peer.call(echo, data) != data or peer.call(size, data) != len(data):
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong
    store.close()


def test_a_write_that_fails_gives_the_block_up(store: _bulk.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is half written is never used, and Ctrl-C while one is written leaves nothing."""
    before = len(os.listdir("/proc/self/fd"))

    def interrupt(fd: int, data: memoryview, at: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "write_at", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _packed(store, b"x" * BIG)
    assert len(os.listdir("/proc/self/fd")) == before
