"""What tasks leave behind: the facts, and the way to leave a process running on purpose."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from . import _tags
from ._os import CAPABILITIES
from ._shapes import frozen

_lock = threading.Lock()
_within = 0  # how many threads
_tag_outside = (0, 0)


@frozen
class Leftover:
    """A process that outlived the task that made it.

    ``pid``; ``command``: its command line; ``task``: in words; ``ended``: it was killed, and is gone.
    """

    pid: int
    command: str
    task: str
    ended: bool


@contextmanager
def leave_running() -> Iterator[None]:
    """Processes that are started within are left running: no pool, and no ``safepool clean``, ends them.

    ``with safepool.leave_running(): subprocess.Popen(["my-daemon"])``, in a task.  It counts for all that this process
    starts meanwhile, whatever thread does, and for their descendants.  Where pools have no keeper (see
    ``CAPABILITIES``), and in a pool with ``isolation="namespace"``, which is ended by the kernel, it changes nothing.
    """
    if "keeper" not in CAPABILITIES:
        yield
        return
    from ._os import linux

    global _within, _tag_outside
    with _lock:
        if _within == 0:
            _tag_outside = linux.own_tag()
            linux.wear((_tags.LEFT_ON_PURPOSE, _tag_outside[1]))
        _within += 1
    try:
        yield
    finally:
        with _lock:
            _within -= 1
            if _within == 0:
                linux.wear(_tag_outside)
