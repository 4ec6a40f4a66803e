"""Forks spares from a loaded, single-threaded state, one when it starts and one whenever it is asked to.

A spare is a child of the keeper.  It says ``("spare", pid)`` with a channel of its own, and waits there for a launch,
``(family, body)`` with descriptors, which makes it a worker.  ``("failed", why)``: there is none.  A zygote with a
``preload`` says ``("loaded", "")`` first, or ``("unfit", why)`` if it cannot be forked safely: the import started a
thread or a process, opened a descriptor, or raised.
"""

from __future__ import annotations

import _socket
import gc
import marshal
import os
import select
import sys
from importlib import import_module
from itertools import count

from . import _newborn, _worker
from ._os import linux
from ._packets import HURRY, SOON, receive, send

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from ._packets import Preload

QUIET_S = 0.01  # a worker that starts does not share its processor with what only later ones need
IDLE_S = 0.03  # then the program has made no pool yet, or its keeper was started in advance
AS_IT_IS = 2  # spares that are forked in a hurry before the zygote is complete: what they lack they load themselves


def serve(channel: _socket.socket, preload: Preload, keeper: int) -> None:
    """Until the keeper lets go of ``channel``."""
    if preload is not None:
        _worker.complete(by_value=True)
        unfit = _load(*preload)
        _say(channel, "unfit" if unfit else "loaded", unfit)
        if unfit:
            return
    gc.freeze()
    is_complete = preload is not None
    for forked in count(1):
        if not _fork_in_advance(channel, keeper):
            _say(channel, "failed", "the system refused to fork")
        if not is_complete and not select.select([channel], [], [], IDLE_S)[0]:
            is_complete = _complete()
        asked = HURRY
        while asked == HURRY:
            asked = channel.recv(1)
        if not asked:
            return
        is_urgent = asked != SOON or bool(select.select([channel], [], [], QUIET_S)[0])
        if not is_complete and not (is_urgent and forked < AS_IT_IS):
            is_complete = _complete()


def _complete() -> bool:
    _worker.complete(by_value=True)
    gc.freeze()
    return True


def _fork_in_advance(channel: _socket.socket, keeper: int) -> bool:
    """By a child that ends at once, so that the keeper, which adopts orphans, becomes its parent."""
    try:
        between = os.fork()
    except OSError:
        return False
    if between:
        return os.waitpid(between, 0)[1] == 0
    code = 1
    try:
        if os.fork() == 0:
            _wait_and_live(channel, keeper)
        code = 0
    finally:
        os._exit(code)


def _wait_and_live(channel: _socket.socket, keeper: int) -> NoReturn:
    try:
        linux.be_called(b"safepool-spare")
        _newborn.be_adopted(keeper)
        theirs, ours = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        is_wanted = send(channel, ("spare", os.getpid()), [theirs.fileno()])
        theirs.close()
        channel.close()
        if is_wanted and not select.select([ours], [], [], 0)[0]:
            _newborn.rehearse()
        data, fds = receive(ours) if is_wanted else (b"", [])
        if data:
            family, body = marshal.loads(data)
            _newborn.belong(family)
            _newborn.live(body, fds)
    except OSError:
        pass  # the keeper has ended
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(0)


def _say(channel: _socket.socket, word: str, what: Any) -> None:
    channel.send(marshal.dumps((word, what)))


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
            _fork_for_nothing()
        if linux.threads() > threads:
            return f"{name!r} started a thread when it was imported"
        if len(os.listdir("/proc/self/fd")) > opened:
            return f"{name!r} opened a file or a socket when it was imported"
        if linux.children():
            return f"{name!r} started a process when it was imported"
    return ""


def _fork_for_nothing() -> None:
    """Libraries that know how to be forked end their threads before it, and start them again when they are used.

    OpenBLAS does, and with it numpy, scipy, pandas and all that import them.
    """
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
