"""``safepool clean``: ends what dead programs and their dead keepers have left, and says what it may not."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from time import monotonic, sleep
from typing import TextIO

from . import _registry, _sweeping
from ._os import linux
from ._registry import Entry

GRACE_S = 2.0  # from SIGTERM to the look at what is left
LIMIT_S = 5.0  # for one family to end
LOOK_AGAIN_S = 0.02


def clean(level: str | None, out: TextIO) -> bool:
    """List the families of keepers that are gone, and end them.

    ``level`` None: list only; ``"ask"``: ask at the terminal, family by family, and then kill; ``"terminate"``:
    SIGTERM, and tell what is left after two seconds; ``"kill"``: SIGKILL.  True: nothing is left of what was to end.
    """
    is_clean = True
    found = 0
    for entry in _registry.entries():
        if not _sweeping.is_abandoned(entry):
            continue
        members = () if entry.is_of_old() else tuple(_sweeping.members(entry.number))
        found += bool(members)
        if members:
            _tell(entry, members, out)
        if level is None:
            continue
        is_ended = not members or _end(entry, level, out)
        is_clean &= is_ended
        if is_ended:
            _registry.withdraw(entry.path)
    if not found:
        print("nothing is left of any pool", file=out)
    elif level is None:
        print("nothing was done: safepool clean --end kill ends them (or terminate, or ask)", file=out)
    return is_clean


def _tell(entry: Entry, members: tuple[int, ...], out: TextIO) -> None:
    facts = entry.facts
    print(f"left by process {facts.get('user')} ({facts.get('command')}), whose keeper is gone too:", file=out)
    for pid in members:
        print(f"  {pid} {linux.words_of(pid)}", file=out)


def _end(entry: Entry, level: str, out: TextIO) -> bool:
    if level == "ask" and input("end these processes? [y/N] ").strip().lower() not in ("y", "yes"):
        return False
    if level == "terminate":
        refused = _terminate(entry.number)
    else:
        refused = {pid for pid, (_, allowed) in _sweeping.end_family(entry.number, LIMIT_S).items() if not allowed}
    left = tuple(_sweeping.members(entry.number))
    for pid in left:
        why = f"it is user {_user_of(pid)}'s" if pid in refused else "it did not end"
        print(f"  still there: {pid} {linux.words_of(pid)}: {why}", file=out)
    return not left


def _terminate(number: int) -> set[int]:
    """The pids that may not be signalled."""
    members = tuple(_sweeping.members(number))
    refused = {pid for pid in members if not _sweeping.signal_member(number, pid, signal.SIGTERM)}
    end = monotonic() + GRACE_S
    while set(_sweeping.members(number)) - refused and monotonic() < end:
        sleep(LOOK_AGAIN_S)
    return refused


def _user_of(pid: int) -> int | None:
    with suppress(OSError):
        return os.stat(f"/proc/{pid}").st_uid
    return None
