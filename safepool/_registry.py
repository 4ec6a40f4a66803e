"""One small file per keeper, locked as long as it lives: what tells a later program that a family was left alone.

``name: value`` lines.  The lock goes with the process, however it ends; a file that can be locked is that of a keeper
that was killed.  The directory is its user's alone; one that is not is not used.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time

from ._os import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_BYTES = 1 << 14
TRIES = 3


class Entry:
    """The file of one keeper."""

    def __init__(self, path: str, facts: dict[str, str], is_free: bool) -> None:
        self.path = path
        self.facts = facts
        self.is_free = is_free  # its keeper is gone

    @property
    def number(self) -> int:
        """The keeper's tag."""
        return int(self.facts["tag"])

    def is_visible(self) -> bool:
        """Could its processes be seen from here?  Else it is of an earlier boot, or of another process namespace."""
        return not self.is_of_old() and self.facts.get("namespace") == _namespace()

    def is_of_old(self) -> bool:
        return self.facts.get("boot") != _boot()

    def has_user(self) -> bool:
        """The program itself lives: it sees to what is its own."""
        user = self.facts.get("user", "")
        started = linux.started_at(int(user)) if user.isdigit() else None
        return started is not None and str(started) == self.facts.get("user started")


def directory() -> str | None:
    """Where the files of this user are; None: there is no place that is safe."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    path = os.path.join(base, "safepool") if os.path.isdir(base) else f"/tmp/safepool-{os.geteuid()}"
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        found = os.lstat(path)
    except OSError:
        return None
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
    return path if mine else None


def facts_of(user: int) -> dict[str, object]:
    """Of a keeper's program, as its own namespace knows it."""
    command = linux.words_of(user).replace("\n", " ")
    return {"namespace": _namespace(), "user": user, "user started": linux.started_at(user), "command": command}


def claim(number: int, facts: dict[str, object]) -> str | None:
    """Write the file of this keeper, locked until it ends; its path, or None if there is no place for it."""
    known = {"tag": number, "boot": _boot(), "keeper": os.getpid(), "started": int(time.time())}
    lines = [f"{name}: {value}\n" for name, value in {**known, **facts}.items()]
    for _ in range(TRIES):
        folder = directory()
        if folder is None:
            break
        path = os.path.join(folder, f"{number:x}")
        try:
            # Held open for ever, and the lock with it; every child of the keeper's closes it at once.
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.write(fd, "".join(lines).encode(errors="surrogateescape")[:MOST_BYTES])
            return path
        except OSError:
            continue  # the last keeper of another program has just removed the directory, or somebody looks
    return None


def withdraw(path: str) -> None:
    """The end of a keeper that has left nothing."""
    try:
        os.unlink(path)
        os.rmdir(os.path.dirname(path))
    except OSError:
        pass  # there are others


def forget(number: int) -> None:
    """The file of a keeper that was killed, and whose family was ended."""
    folder = directory()
    if folder is not None:
        withdraw(os.path.join(folder, f"{number:x}"))


def entries() -> Iterator[Entry]:
    """Of this user, those of living keepers too."""
    folder = directory()
    try:
        names = sorted(os.listdir(folder)) if folder is not None else []
    except OSError:
        return  # the last keeper of another program has just removed it
    for name in names:
        path = os.path.join(str(folder), name)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            text = os.read(fd, MOST_BYTES).decode(errors="replace")
            facts = dict(line.partition(": ")[::2] for line in text.splitlines())
            if facts.get("tag", "").isdigit():
                yield Entry(path, facts, _is_free(fd))
        finally:
            os.close(fd)


def _is_free(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _boot() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""
