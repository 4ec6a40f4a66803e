"""In a worker: what a task leaves behind, found when it ends, at no cost if there is nothing.

A task cannot have made a process without one of these: this worker has a child, dead or alive; or it has waited for
one since the last look; or it ignores the deaths of its children.  Two system calls tell, and none are made after
tasks that were too short to make a process at all.

Own children are ended here; what has lost its parent is the keeper's, which is asked to end it.  (A worker that was
forked from the user's process has no keeper for a parent, and looks for what it left itself.)
"""

from __future__ import annotations

import gc
import marshal
import os
import resource
import sys
from time import monotonic, sleep

from . import _tags
from ._os import linux
from ._packets import NOT_ENDED

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    import signal as _signal

    from ._packets import Left
    from ._sweeping import ForkedWorker

else:
    import _signal

END_LIMIT_S = 1.0
LOOK_AGAIN_S = 0.001
ANSWER_LIMIT_S = 5.0
MOST_BYTES = 1 << 17
#: Processes that a module starts once and expects to stay: (module, object in it, its attribute with the pid).
HELPERS = (
    ("multiprocessing.resource_tracker", "_resource_tracker", "_pid"),
    ("multiprocessing.forkserver", "_forkserver", "_forkserver_pid"),
    ("loky.backend.resource_tracker", "_resource_tracker", "_pid"),
    ("joblib.externals.loky.backend.resource_tracker", "_resource_tracker", "_pid"),
)


class AtKeeper:
    """The keeper, as it is asked by the worker at the other end of this channel."""

    def __init__(self, channel: _socket.socket) -> None:
        self._channel = channel
        self.is_hopeless = False  # what was to end goes on
        channel.settimeout(ANSWER_LIMIT_S)

    def ask(self, word: str) -> list[Left]:
        """``word``: "sweep" the orphans of this family, only "look", or "spare" what there are now."""
        try:
            self._channel.send(word.encode())
            found: list[Left] = marshal.loads(self._channel.recv(MOST_BYTES))
        except (OSError, EOFError, ValueError):
            return []  # it has ended, and so will this worker
        if found and found[-1] == NOT_ENDED:
            self.is_hopeless = True
            found.pop()
        return found

    def close(self) -> None:
        self._channel.close()


class Leftovers:
    """``orphans`` ends what has lost its parent; ``policy``: "kill" what a task leaves, "report" it or "leave" it."""

    def __init__(self, orphans: AtKeeper | ForkedWorker, policy: str) -> None:
        self._orphans = orphans
        self._policy = policy
        self._spared: set[int] = set()
        self._waited_for = _waited_for()

    def spare(self) -> None:
        """What the initializer started stays until the worker ends."""
        if self._are_possible():
            self._spared.update(linux.children())
            self._orphans.ask("spare")

    def look(self) -> list[Left]:
        """What the task left that has just run; with "kill" it is gone when this returns."""
        if self._policy == "leave" or not self._are_possible():
            return []
        found: list[Left] = []
        staying = self._spared | _helpers()
        end = monotonic() + END_LIMIT_S
        # More than once: a task may have had its worker adopt the orphans of its family.
        while (own := [pid for pid in linux.children() if pid not in staying]) and monotonic() < end:
            if self._policy == "report":
                found += [(pid, linux.words_of(pid), False) for pid in own if not linux.is_zombie(pid)]
                self._spared.update(own)
            else:
                found += _end(own)
            staying.update(own)
        found += self._orphans.ask("sweep" if self._policy == "kill" else "look")
        self._waited_for = _waited_for()
        return found

    def is_hopeless(self) -> bool:
        """Something goes on forking as fast as it is killed: it is ended with the worker, and not before."""
        return self._orphans.is_hopeless

    def close(self) -> None:
        self._orphans.close()

    def _are_possible(self) -> bool:
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return self._waited_for != _waited_for() or _signal.getsignal(_signal.SIGCHLD) == _signal.SIG_IGN
        return True


def _waited_for() -> int:
    """A number that grows with every child that was waited for."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt


def _helpers() -> set[int]:
    found = set()
    for module, thing, attribute in HELPERS:
        pid = getattr(getattr(sys.modules.get(module), thing, None), attribute, None)
        if pid is not None:
            found.add(pid)
    keep = sys.modules.get(f"{__package__}._keep")
    return found if keep is None else found | keep.keeper_pids()


def _end(pids: list[int]) -> list[Left]:
    """Kill these children and wait for them, for a limited time."""
    found = []
    statuses = {}
    for pid in pids:
        gone = True
        if not linux.is_zombie(pid):
            if _tags.is_left_on_purpose(linux.tag_of(pid)):
                continue
            words = linux.words_of(pid)
            # (A thread that the task left may wait for it meanwhile: no bare pid.)
            gone = linux.signal_if(pid, lambda pid=pid: linux.parent_of(pid) == os.getpid())  # type: ignore[misc]
            found.append((pid, words, gone))
        if gone:
            statuses[pid] = _wait_for(pid)
    _tell_programs(statuses)
    return found


def _wait_for(pid: int) -> int | None:
    """Its status; None if it does not end, or somebody else has waited for it."""
    end = monotonic() + END_LIMIT_S
    try:
        while (found := os.waitpid(pid, os.WNOHANG))[0] == 0 and monotonic() < end:
            sleep(LOOK_AGAIN_S)
    except ChildProcessError:
        return None
    return found[1] if found[0] else None


def _tell_programs(statuses: dict[int, int | None]) -> None:
    """A Popen that is kept from one task to the next would take an unknown status for success."""
    subprocess = sys.modules.get("subprocess")
    if subprocess is None or not any(status is not None for status in statuses.values()):
        return
    for thing in gc.get_objects():
        if type(thing) is subprocess.Popen and thing.returncode is None:
            status = statuses.get(thing.pid)
            if status is not None:
                thing.returncode = os.waitstatus_to_exitcode(status)
