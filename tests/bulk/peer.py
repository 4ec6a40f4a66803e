"""Two processes that send each other big things, with nothing of the pool around it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from struct import Struct
from typing import Any

from safepool import _bulk, _payload, _unpack
from safepool._os import memory
from safepool._parts import Parts

LIMIT_S = 30.0
ROOT = Path(__file__).parent.parent.parent
FRAME = Struct("<BQ")  # how it comes; length of what follows
SMALL, LENT, INLINE = range(3)


def pickled(value: Any, *, by_value: bool = False) -> Parts:
    """As the pool pickles: by multiprocessing's rules, or by cloudpickle's."""
    parts = Parts()
    make = _payload._by_value_pickler(True) if by_value else _unpack._Pickler
    make(parts, protocol=5, buffer_callback=parts.offer).dump(value)
    return parts


class Talk:
    """One end.  ``hows``: how everything came that was received."""

    def __init__(self, channel: socket.socket, store: _bulk.Store) -> None:
        self.channel = channel
        self.store = store
        self.hows: list[int] = []
        channel.settimeout(LIMIT_S)

    def send(self, value: Any, *, by_value: bool = False) -> None:
        parts = pickled(value, by_value=by_value)
        if not parts.is_big():
            self._send(SMALL, parts.joined())
            return
        self.send_cargo(_bulk.pack(parts, self.store))

    def send_cargo(self, cargo: _bulk.Cargo) -> None:
        lent = cargo.lend()
        if lent is None:
            self._send(INLINE, b"".join(cargo.inline()))
            return
        message, fd = lent
        memory.send_with(self.channel, FRAME.pack(LENT, len(message)), fd)
        self.channel.sendall(message)

    def _send(self, how: int, body: bytes) -> None:
        self.channel.sendall(FRAME.pack(how, len(body)))
        self.channel.sendall(body)

    def receive(self) -> Any:
        arrived = self.take()
        try:
            return arrived.load() if isinstance(arrived, (_bulk.Arrived, _bulk.Inlined)) else _unpack.loads(arrived)
        finally:
            if isinstance(arrived, _bulk.Arrived):
                arrived.close()

    def take(self) -> Any:
        frame, fd = memory.receive_with(self.channel, FRAME.size)
        if not frame:
            raise EOFError
        how, length = FRAME.unpack(frame)
        body = self._exactly(length)
        self.hows.append(how)
        if how == LENT:
            assert fd is not None
            return _bulk.taken_in(body, fd)
        return _bulk.Inlined.of(body) if how == INLINE else body

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            more = self.channel.recv(min(size - len(data), 1 << 20))
            if not more:
                raise EOFError
            data += more
        return bytes(data)


class Peer(Talk):
    """A process that calls what it is sent, and sends back what that returns; this is our end."""

    def __init__(self, store: _bulk.Store) -> None:
        ours, theirs = socket.socketpair()
        super().__init__(ours, store)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import main; main({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
            )

    def call(self, fn: Any, *args: Any) -> Any:
        self.send((fn, args))
        return self.receive()

    def close(self) -> None:
        self.channel.close()
        self.store.close()
        try:
            self.process.wait(LIMIT_S)
        finally:
            self.process.kill()
            self.process.wait(LIMIT_S)


# ---------------------------------------------------------------- called there


def echo(value: Any) -> Any:
    return value


def size(value: Any) -> int:
    return len(value)


def fill(array: Any, value: Any) -> Any:
    """Change what has come, in place."""
    array[:] = value
    return array


def facts(array: Any) -> Any:
    return array.dtype, array.shape, array.flags.writeable, array.flags.f_contiguous, type(array).__name__


def kept(value: Any) -> int:
    """Keep it for ever; how many are kept."""
    _kept.append(value)
    return len(_kept)


def total_of_kept() -> Any:
    return [bytes(memoryview(one).cast("B")[:8]) for one in _kept]


_kept: list[Any] = []


def loaded() -> set[str]:
    return set(sys.modules)


def descriptors() -> list[str]:
    """What is open there, but for the listing itself."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue
    return sorted(found)


def without_descriptors_from_now_on() -> None:
    import resource

    _kept.append([os.dup(0) for _ in range(3)])
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    try:
        while True:
            _kept.append(os.dup(0))
    except OSError:
        pass


def main(fd: int) -> None:
    talk = Talk(socket.socket(fileno=fd), _bulk.Store())
    try:
        while True:
            fn, args = talk.receive()
            value = fn(*args)
            del args
            talk.send(value)
            del value
    except (EOFError, ConnectionError):
        pass
