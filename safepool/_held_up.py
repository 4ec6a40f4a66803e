"""What cannot be done now, for another thread has a lock, is tried again until it is done.

By the watchdog, as long as it runs; when its pool is closed, by a thread that nobody waits for: not by that of
callbacks, for whoever shuts a pool down waits for those, and may be the one who has the lock.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from contextlib import suppress
from time import sleep

from ._log import ERROR, tell

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

FIRST_LOOK_S = 0.001
LONGEST_LOOK_S = 0.5

_jobs: deque[Callable[[], bool]] = deque()
_is_running = False


def try_until_done(job: Callable[[], bool]) -> None:
    """Call ``job`` soon, and again and again until it returns True.  It may not wait for anything."""
    _jobs.append(job)
    if not _is_running:
        with suppress(RuntimeError):  # no thread is to be had: the next one tries again
            threading.Thread(target=_run, name="safepool-held-up", daemon=True).start()


def _run() -> None:
    global _is_running
    # Scenario 2: (a) this thread is being started, (b) a signal handler of the user's raises there, (c) nobody knows
    # whether it runs.  So it says so itself, and there may be two: then one ends.
    if _is_running:
        return
    _is_running = True
    pause_s = FIRST_LOOK_S
    while True:
        if try_once(_jobs):
            pause_s = FIRST_LOOK_S
        if not _jobs:
            _is_running = False
            # Scenario 1: (a) there is nothing to do, (b) a job comes, and is left to this thread, (c) it ends.
            if not _jobs or _is_running:
                return
            _is_running = True
        sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_LOOK_S)


def try_once(jobs: deque[Callable[[], bool]]) -> bool:
    """Call each; those that are not done stay.  Was any of them done?"""
    is_any_done = False
    for _ in range(len(jobs)):
        try:
            job = jobs.popleft()
        except IndexError:  # another thread has taken them over
            break
        if _is_done(job):
            is_any_done = True
        else:
            jobs.append(job)
    return is_any_done


def _is_done(job: Callable[[], bool]) -> bool:
    try:
        return job()
    except BaseException as error:
        tell(ERROR, "an unexpected error in what was put off", error=error)
        return True


def _let_go_in_child() -> None:
    global _is_running
    _jobs.clear()
    _is_running = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
