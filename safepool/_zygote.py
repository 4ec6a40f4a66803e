"""Forks workers from a loaded, single-threaded state; what is forked becomes a child of the keeper.

It serves one launch at a time: ``(family, body)`` with descriptors comes, ``("forked", pid)``,
or ``("failed", why)``, goes.  One with a ``preload`` says ``("loaded", "")`` first, or ``("unfit", why)`` if it cannot
be forked safely: the import started a thread or a process, opened a descriptor, or raised.

A launch is received by a child that was forked in advance, and forks the worker and ends: so the keeper, which adopts
orphans, becomes the worker's parent, and a worker waits for one fork only.
"""

from __future__ import annotations

import gc
import marshal
import os
import select
import sys
from importlib import import_module

from . import _newborn, _worker
from ._keeper import receive
from ._os import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from typing import NoReturn

    from ._keeper import Preload

ANSWER_BYTES = 4096
QUIET_S = 0.01  # the first worker does not share its processor with what only later ones need


def serve(channel: _socket.socket, preload: Preload, keeper: int) -> None:
    """Until the keeper lets go of ``channel``."""
    if preload is not None:
        _worker.complete(by_value=True)
        unfit = _load(*preload)
        channel.send(marshal.dumps(("unfit", unfit) if unfit else ("loaded", "")))
        if unfit:
            return
    gc.freeze()
    is_served = _serve_once(channel, keeper)
    if is_served and preload is None:
        select.select([channel], [], [], QUIET_S)
        _worker.complete(by_value=True)
        gc.freeze()
    while is_served:
        is_served = _serve_once(channel, keeper)


def _serve_once(channel: _socket.socket, keeper: int) -> bool:
    """One launch.  False: there are no more, or its process was killed."""
    try:
        answer = _through_a_child(channel, keeper)
    except OSError as error:
        data, fds = receive(channel)
        for fd in fds:
            os.close(fd)
        answer = data and _refusal(error)
    if answer:
        channel.send(answer)
    return bool(answer)


def _through_a_child(channel: _socket.socket, keeper: int) -> bytes:
    """The answer, when the child has ended and the keeper is the worker's parent; ``OSError``: there is no child."""
    read, write = os.pipe()
    try:
        between = os.fork()
        if between == 0:
            _be_between(channel, write, keeper)
        os.waitpid(between, 0)
        os.set_blocking(read, False)
        try:
            return os.read(read, ANSWER_BYTES)
        except BlockingIOError:
            return b""
    finally:
        os.close(read)
        os.close(write)


def _be_between(channel: _socket.socket, write: int, keeper: int) -> NoReturn:
    """Returns neither here nor in the worker."""
    try:
        linux.end_with_parent()
        data, fds = receive(channel)
        if data:
            os.write(write, _fork_worker(data, fds, keeper))
    finally:
        os._exit(0)


def _fork_worker(data: bytes, fds: list[int], keeper: int) -> bytes:
    try:
        pid = os.fork()
    except OSError as error:
        return _refusal(error)
    if pid == 0:
        family, body = marshal.loads(data)
        _newborn.live(family, body, fds, keeper)
    return marshal.dumps(("forked", pid))


def _refusal(error: OSError) -> bytes:
    return marshal.dumps(("failed", f"the system refused to fork: {error}"))


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
