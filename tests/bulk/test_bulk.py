"""Big data, from one process to another and back: what comes is what was sent, and belongs to who has it."""

from __future__ import annotations

import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from safepool import _bulk, _os, _unpack
from safepool._os import memory
from safepool._parts import BIG_BYTES, Parts
from tests.bulk.peer import (
    INLINE,
    LENT,
    SMALL,
    Peer,
    descriptors,
    echo,
    facts,
    fill,
    kept,
    loaded,
    pickled,
    size,
    total_of_kept,
    without_descriptors_from_now_on,
)

np = pytest.importorskip("numpy")
BIG = 3 * BIG_BYTES


class Sub(np.ndarray):  # type: ignore[name-defined, misc]
    """A subclass of the user's."""


def _arrays() -> Iterator[Any]:
    one = np.arange(BIG // 8, dtype=float)
    yield pytest.param(one, id="plain")
    yield pytest.param(one.reshape(3, -1), id="C order")
    yield pytest.param(np.asfortranarray(one.reshape(3, -1)), id="Fortran order")
    yield pytest.param(one[::2], id="not contiguous")
    yield pytest.param(one.reshape(3, -1)[:, ::-3], id="not contiguous in two dimensions")
    yield pytest.param(np.zeros(BIG // 16, dtype=[("a", "<i8"), ("b", "S8")]), id="structured")
    yield pytest.param(one.astype(">f8"), id="byte order")
    yield pytest.param(one.view(Sub), id="subclass")
    yield pytest.param(np.ma.masked_array(one, one > 5), id="masked")
    yield pytest.param(np.zeros((0, BIG)), id="empty")
    yield pytest.param(np.array(["a" * 100, None, 3] * 20_000, dtype=object), id="objects")
    yield pytest.param(np.array(["wörter" * 1000] * 100), id="words")
    yield pytest.param(one.astype("datetime64[s]"), id="times")


@pytest.mark.parametrize("array", list(_arrays()))
def test_arrays_come_as_they_were_sent(peer: Peer, array: Any) -> None:
    """Whatever the kind of an array, it comes equal, of the same kind, and can be written to, both ways."""
    back = peer.call(echo, array)
    np.testing.assert_array_equal(back, array)
    assert (type(back), back.dtype, back.shape, back.flags.writeable) == (type(array), array.dtype, array.shape, True)
    assert peer.call(facts, array)[:3] == (array.dtype, array.shape, True)
    assert array.nbytes < BIG_BYTES or LENT in peer.hows


@pytest.mark.parametrize("sizes", [(BIG,), (BIG_BYTES,), (BIG_BYTES - 100,), (100 * BIG_BYTES,)], ids=str)
@pytest.mark.parametrize("kind", [bytes, bytearray, str])
def test_bytes_come_as_they_were_sent(peer: Peer, kind: Any, sizes: Any) -> None:
    """Bytes, byte arrays and texts of any size come as what they are, wherever they lie."""
    text = "ö" if kind is str else b"\x01"
    for number in sizes:
        value = kind(text * number)
        for nested in (value, {"deep": [(value, 1)]}):
            back = peer.call(echo, nested)
            assert back == nested
        assert type(back["deep"][0][0]) is kind
        assert peer.call(size, value) == number


def test_what_is_small_goes_as_ever(peer: Peer) -> None:
    """Below the threshold nothing but the pickle itself is sent."""
    assert peer.call(echo, np.zeros(BIG_BYTES // 16)).nbytes == BIG_BYTES // 2
    assert peer.call(echo, b"x" * (BIG_BYTES // 2)) == b"x" * (BIG_BYTES // 2)
    assert set(peer.hows) == {SMALL}
    assert peer.store.cached_bytes() == 0


def test_one_object_stays_one_object(peer: Peer) -> None:
    """What is the same object twice in a call is the same object twice there."""
    array = np.ones(BIG // 8)
    back = peer.call(echo, [array, array, array[:5]])
    assert back[0] is back[1]
    assert not np.shares_memory(back[0], back[2])


def test_many_buffers_share_one_descriptor(peer: Peer) -> None:
    """A call may hold more big arrays than descriptors can be passed at once."""
    arrays = [np.full(BIG_BYTES // 8 + n, n, dtype=float) for n in range(300)]
    back = peer.call(echo, arrays)
    assert all((one == n).all() for n, one in enumerate(back))
    assert peer.hows == [LENT]


def test_read_only_arrays_stay_so(peer: Peer) -> None:
    """As with any unpickling by protocol 5."""
    array = np.ones(BIG // 8)
    array.flags.writeable = False
    assert not peer.call(echo, array).flags.writeable
    assert peer.call(facts, array)[2] is False


def test_big_things_travel_with_functions_by_value(peer: Peer) -> None:
    """cloudpickle's picklers offer what is big, too."""
    array, data = np.arange(BIG // 8), b"x" * BIG
    parts = pickled((lambda: (array, data), ()), by_value=True)
    assert [buffer.nbytes for buffer in parts.buffers] == [BIG]
    assert sum(len(part) for part in parts if part is not data) < BIG_BYTES
    peer.send((lambda: (array, data), ()), by_value=True)
    back = peer.receive()
    np.testing.assert_array_equal(back[0], array)
    assert back[1] == data


def test_sender_and_receiver_are_independent(peer: Peer) -> None:
    """What is changed on one side is not changed on the other, whoever is first, and whatever is sent next."""
    array = np.ones(BIG // 8)
    peer.send((fill, (array, 7)))
    array[:] = 2
    back = peer.receive()
    assert (back == 7).all()
    assert (array == 2).all()
    assert peer.call(kept, array) == 1
    array[:] = 3
    other = peer.call(echo, array)
    back[:] = 9
    assert (other == 3).all()
    assert peer.call(kept, np.full(BIG // 8, 5.0)) == 2
    assert peer.call(total_of_kept) == [np.float64(2).tobytes(), np.float64(5).tobytes()]


def test_what_is_kept_for_ever_costs_no_descriptors(peer: Peer) -> None:
    """A program may keep any number of arrays: neither side has a descriptor open for one."""
    ours, theirs = _own_descriptors(), peer.call(descriptors)
    mine = [peer.call(echo, np.full(BIG // 8, n)) for n in range(20)]
    for n in range(20):
        assert peer.call(kept, np.full(BIG // 8, n)) == n + 1
    assert all((one == n).all() for n, one in enumerate(mine))
    peer.store.trim(float("inf"))
    assert _own_descriptors() == ours
    assert len(peer.call(descriptors)) <= len(theirs) + 2  # the one warm block that it sends its results in


def _own_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# -------------------------------------------------------- sending again, dying


def test_what_was_not_read_can_be_sent_again(peers: Callable[[], Peer]) -> None:
    """A receiver dies before or while it reads: the next one gets the same."""
    first, second = peers(), peers()
    assert first.call(size, b"") == 0
    cargo = _bulk.pack(pickled((size, (b"x" * BIG,))), first.store)
    os.kill(first.process.pid, signal.SIGSTOP)
    first.send_cargo(cargo)
    first.process.kill()
    first.process.wait(10)
    second.send_cargo(cargo)
    assert second.receive() == BIG


def test_nothing_is_left_of_a_process_that_dies(peers: Callable[[], Peer]) -> None:
    """Whoever is killed, with whatever unread: no descriptor, no shared memory.  (The audit looks at both.)"""
    peer = peers()
    before = _own_descriptors()
    peer.send((echo, (np.ones(BIG // 8),)))
    unread = peer.take()
    peer.send((echo, (np.ones(BIG // 8),)))
    os.kill(peer.process.pid, signal.SIGKILL)
    peer.process.wait(10)
    assert (unread.load() == 1).all()  # what a dead one has sent is not lost
    del unread
    peer.store.close()
    assert _own_descriptors() == before
    assert not [name for name in os.listdir("/dev/shm") if "safepool" in name]


def test_what_has_come_can_be_read_twice(peer: Peer) -> None:
    """A retry policy looks at a result, then the program does: each gets an object of its own."""
    peer.send((echo, (np.ones(BIG // 8),)))
    arrived = peer.take()
    one, other = arrived.load(), arrived.load()
    one[:] = 5
    assert (other == 1).all()


def test_results_that_nobody_reads_hold_few_descriptors(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """From some number on, what comes is read at once."""
    monkeypatch.setattr(_bulk, "MOST_ARRIVED", 3)
    before = _own_descriptors()
    unread = []
    for n in range(10):
        peer.send((echo, (np.full(BIG // 8, n),)))
        unread.append(peer.take())
    peer.store.trim(float("inf"))
    assert _own_descriptors() <= before + 3
    assert sorted({type(one).__name__ for one in unread}) == ["Arrived", "Inlined"]
    assert all((one.load() == n).all() for n, one in enumerate(unread))


def test_a_forked_child_reads_what_its_parent_has_not(peer: Peer) -> None:
    """In a child that the program forks, a result that came before is there, and is not given away under its parent."""
    peer.send((echo, (b"x" * BIG,)))
    arrived = peer.take()
    child = os.fork()
    if child == 0:
        os._exit(0 if arrived.load() == b"x" * BIG and arrived.close() is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for _ in range(3):  # blocks are used again
        assert peer.call(echo, b"y" * BIG) == b"y" * BIG
    assert arrived.load() == b"x" * BIG


def test_a_forked_child_never_reads_what_was_meant_for_others(peer: Peer) -> None:
    """If its parent has let go of it, the child is told so, instead of being given other data."""
    peer.send((echo, (b"x" * BIG,)))
    arrived = peer.take()
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(told, 1)
        try:
            arrived.load()
        except EOFError as error:
            os._exit(0 if "before the fork" in str(error) else 2)
        os._exit(1)
    arrived.close()
    assert peer.call(echo, b"y" * BIG) == b"y" * BIG
    os.write(tell, b".")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(told)
    os.close(tell)


# ------------------------------------------------------------ what is missing


@pytest.mark.parametrize("value", [b"x" * BIG, np.arange(BIG // 8)], ids=["bytes", "array"])
def test_without_blocks_it_goes_through_the_channel(peer: Peer, monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    """No system call, no descriptor, no memory for it: the same, but slower."""

    def refuse() -> int:
        raise OSError(24, "Too many open files")

    def no_memory(fd: int, data: memoryview, at: int) -> None:
        raise OSError(28, "No space left on device")

    sent: list[Any] = []
    monkeypatch.setattr(peer, "_send", lambda how, body, send=peer._send: (sent.append(how), send(how, body)))
    for name, instead in (("new_block", refuse), ("write_at", no_memory)):
        with monkeypatch.context() as patch:
            patch.setattr(memory, name, instead)
            back = peer.call(echo, value)
        assert bytes(memoryview(back).cast("B")) == bytes(memoryview(value).cast("B"))
    assert sent == [INLINE, INLINE]
    assert isinstance(back, bytes) or back.flags.writeable


def test_where_there_are_no_blocks_there_is_the_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    """On other systems the same is packed for the channel, and can be written to, too."""
    monkeypatch.setattr(memory, "HAS_BLOCKS", False)
    value = [np.arange(BIG // 8), b"x" * BIG]
    cargo = _bulk.pack(pickled(value), _bulk.Store())
    assert cargo.lend() is None
    back = _bulk.Inlined.of(b"".join(cargo.inline())).load()
    back[0] += 1
    assert (back[0] == value[0] + 1).all()
    assert back[1] == value[1]


def test_a_limit_on_files_is_no_error(peer: Peer) -> None:
    """Where files may not be big, blocks are not used."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BIG_BYTES, limits[1]))
    try:
        assert peer.call(size, b"x" * BIG) == BIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_receiver_without_descriptors_still_receives(peer: Peer) -> None:
    """A task has left the worker not one descriptor: what it is sent arrives, and its big answers too."""
    assert peer.call(size, b"x" * BIG) == BIG
    peer.call(without_descriptors_from_now_on)
    for _ in range(3):
        assert peer.call(echo, b"x" * BIG) == b"x" * BIG


@pytest.fixture
def sent() -> Iterator[tuple[socket.socket, int]]:
    """A socket to which ``12345678`` and a descriptor were sent, and that descriptor."""
    ours, theirs = socket.socketpair()
    fd = memory.new_block()
    memory.send_with(ours, b"12345678", fd)
    yield theirs, fd
    os.close(fd)
    ours.close()
    theirs.close()


def _in_child_without_descriptors(check: Callable[[], bool]) -> bool:
    """A child has no descriptor left and then checks something."""
    child = os.fork()
    if child == 0:
        try:
            memory.take_reserve()
            without_descriptors_from_now_on()
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_cannot_be_received_now_is_not_lost(sent: tuple[socket.socket, int]) -> None:
    """If no descriptor is left at all, the message stays where it is until there is one."""

    def check() -> bool:
        memory._reserve.fds, reserve = [], memory._reserve.fds
        with pytest.raises(OSError, match="no descriptor is left"):
            memory.receive_with(sent[0], 8)
        os.close(reserve.pop())
        data, copy = memory.receive_with(sent[0], 8, socket.MSG_DONTWAIT)
        assert copy is not None
        assert os.fstat(copy).st_ino == os.fstat(sent[1]).st_ino
        os.close(copy)
        try:
            memory.receive_with(sent[0], 8, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return data == b"12345678"
        return False

    assert _in_child_without_descriptors(check)


def test_a_reading_ends_where_a_descriptor_came() -> None:
    """However many bytes are asked for: so the n-th descriptor can be told to belong to the n-th frame that has one."""
    parent, worker = socket.socketpair()
    fds = [memory.new_block() for _ in range(3)]
    parent.sendall(b"some")
    memory.send_with(parent, b"with a first", fds[0])
    parent.sendall(b"more")
    memory.send_with(parent, b"with a second" * 1000, fds[1])
    memory.send_with(parent, b"with a third", fds[2])
    parent.sendall(b"the end")
    found, data, buffer = [], b"", bytearray(1000)
    while not data.endswith(b"the end"):
        got, more, flags, _ = worker.recvmsg_into([buffer], socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        assert not flags & socket.MSG_CTRUNC
        data += buffer[:got]
        if more:
            copy = _os.descriptor_in(more)
            assert copy is not None
            found.append(os.fstat(copy).st_ino)
            os.close(copy)
    assert found == [os.fstat(fd).st_ino for fd in fds]
    assert data == b"somewith a firstmore" + b"with a second" * 1000 + b"with a thirdthe end"
    for fd in fds:
        os.close(fd)
    parent.close()
    worker.close()


def test_answers_come_through_whatever_else_was_written(store: _bulk.Store) -> None:
    """Stray bytes of a task, and a block whose answer was never given, are passed over; if none came, that is said."""
    worker, parent = socket.socketpair()
    before = _own_descriptors()
    bodies = []
    for n in range(3):
        worker.sendall(b"stray bytes, any number of them" * n)
        bodies.append(_bulk.send(worker, pickled(bytes([n]) * BIG), store))
    worker.sendall(b"the last")
    for n in (0, 2):  # the answer in between was never given
        arrived = _bulk.receive(parent, bodies[n])
        assert isinstance(arrived, _bulk.Arrived)
        assert arrived.load() == bytes([n]) * BIG
        arrived.close()
    with pytest.raises(BlockingIOError):
        _bulk.receive(parent, bodies[1])
    with suppress(BlockingIOError):
        while True:
            worker.send(b"stray" * 1000, socket.MSG_DONTWAIT)
    body = _bulk.send(worker, pickled(b"x" * BIG), store)
    assert isinstance(_bulk.receive(parent, body), _bulk.Inlined), "whoever sends never waits"
    store.trim(float("inf"))
    assert _own_descriptors() == before
    parent.close()
    worker.close()


def test_sizes_of_more_than_four_gigabytes() -> None:
    """The message has room for them, and a big block is read and written in steps."""

    class Huge:
        nbytes = 5 << 30

    parts = Parts([b"p" * 10])
    parts.buffers = [Huge(), Huge()]  # type: ignore[list-item]
    head, pieces, total = _bulk._layout(parts)
    assert _bulk._buffers(head) == [(64, 5 << 30), (64 + (5 << 30), 5 << 30)]
    assert [at for at, _ in pieces] == [64, 128, 128 + (5 << 30)]
    assert total == 128 + (10 << 30)


def test_reading_and_writing_go_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system moves less than 2 GB at a time: the rest follows."""
    monkeypatch.setattr(memory, "MOST_AT_ONCE", 1000)
    fd = memory.new_block()
    data, back = os.urandom(12_345), bytearray(12_345)
    memory.write_at(fd, memoryview(data), 5 << 30)
    memory.read_at(fd, memoryview(back), 5 << 30)
    assert back == data
    with pytest.raises(EOFError):
        memory.read_at(fd, memoryview(bytearray(10)), (5 << 30) + 12_340)
    os.close(fd)


def test_a_bytearray_that_grows_meanwhile() -> None:
    """What is pickled is what it was: another thread may go on with it."""
    growing = bytearray(BIG)
    parts = pickled([growing])
    growing += b"more"
    assert _unpack.loads(b"".join(parts)) == [bytearray(BIG)]


def test_big_data_loads_what_it_needs_when_it_comes() -> None:
    """A worker starts without any of it."""
    import subprocess
    import sys

    code = "import sys, safepool._worker; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not set(done.stdout.split()) & {
        "safepool._bulk",
        "safepool._blocks",
        "safepool._os.memory",
        "ctypes",
        "mmap",
    }


def test_modules_of_the_peer(peer: Peer) -> None:
    """Nor does it load numpy for bytes."""
    peer.call(size, b"x" * BIG)
    assert "numpy" not in peer.call(loaded)
