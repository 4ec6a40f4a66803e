"""Forks workers from a loaded, single-threaded state; what is forked becomes a child of the keeper.

It serves one launch at a time: ``(family, body)`` with descriptors comes, ``("forked", pid)``,
or ``("failed", why)``, goes.  One with a ``preload`` says ``("loaded", "")`` first, or ``("unfit", why)`` if it cannot
be forked safely: the import started a thread or a process, opened a descriptor, or raised.
"""

from __future__ import annotations

import gc
import marshal
import os
import sys
from importlib import import_module

from . import _newborn, _worker
from ._keeper import receive
from ._os import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket

    from ._keeper import Preload

PID_BYTES = 4


def serve(channel: _socket.socket, preload: Preload, keeper: int) -> None:
    """Until the keeper lets go of ``channel``."""
    is_complete = preload is not None
    if preload is not None:
        _worker.complete(by_value=True)
        unfit = _load(*preload)
        channel.send(marshal.dumps(("unfit", unfit) if unfit else ("loaded", "")))
        if unfit:
            return
    gc.freeze()
    while True:
        data, fds = receive(channel)
        if not data:
            return
        _fork_worker(channel, data, fds, keeper)
        for fd in fds:
            os.close(fd)
        if not is_complete:
            is_complete = True
            _worker.complete(by_value=True)  # the first worker does not wait for what only later ones need
            gc.freeze()


def _load(path: list[str], environ: dict[str, str], names: tuple[str, ...]) -> str:
    """Import these modules; in words why a fork would not be safe now, if so."""
    threads, opened = linux.threads(), len(os.listdir("/proc/self/fd"))
    sys.path[:] = path
    os.environ.clear()
    os.environ.update(environ)
    for name in names:
        try:
            import_module(name)
        except BaseException as error:
            return f"importing {name!r} raised {type(error).__name__}: {error}"
        if linux.threads() > threads:
            return f"{name!r} started a thread when it was imported"
        if len(os.listdir("/proc/self/fd")) > opened:
            return f"{name!r} opened a file or a socket when it was imported"
        if linux.children():
            return f"{name!r} started a process when it was imported"
    return ""


def _fork_worker(channel: _socket.socket, data: bytes, fds: list[int], keeper: int) -> None:
    """Through a child that ends at once, so that the keeper, which adopts orphans, becomes the worker's parent."""
    read, write = os.pipe()
    try:
        between = os.fork()
        if between == 0:
            _go_between(write, data, fds, keeper)
        os.waitpid(between, 0)
        os.set_blocking(read, False)
        pid = int.from_bytes(os.read(read, PID_BYTES), sys.byteorder)
        answer = ("forked", pid) if pid else ("failed", "the system refused to fork")
    except BlockingIOError:
        answer = ("failed", "the system refused to fork")
    except OSError as error:
        answer = ("failed", f"the system refused to fork: {error}")
    finally:
        os.close(read)
        os.close(write)
    channel.send(marshal.dumps(answer))


def _go_between(write: int, data: bytes, fds: list[int], keeper: int) -> None:
    """Never returns, neither here nor in the worker."""
    try:
        pid = os.fork()
        if pid == 0:
            family, body = marshal.loads(data)
            _newborn.live(family, body, fds, keeper)
        os.write(write, pid.to_bytes(PID_BYTES, sys.byteorder))
    finally:
        os._exit(0)
