"""Linux: what a keeper needs to own processes, in a handful of verbs.  Imports next to nothing.

* ``adopt_orphans()``: descendants whose parent ends become this process's children;
* ``end_with_parent()``: be killed when the parent ends;
* ``children() -> pids``: own children, the dead ones that are not waited for too;
* ``tag_of(pid)``: see ``_tags``; ``wear(tag)``: on this process;
* ``processes() -> pids``: of the whole machine; ``words_of(pid)``: its command line;
* ``signal_if(pid, is_ours)``: to that process, if it is still ours when its pid cannot become another's;
* ``close_but(fds)``; ``let_go_of(*streams)``: they lead nowhere.

Wherever a pid is taken from a listing, it is the caller who knows that it cannot have been reused.
"""

from __future__ import annotations

import _ctypes
import os
import resource

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable, Iterable
else:
    import _signal

# A resource that kernels since 2.4.25 do not look at any more, but still pass on: RLIMIT_LOCKS.
TAG = 10
SIGKILL: int = _signal.SIGKILL
PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
MOST_WORDS = 200  # bytes of a command line

# (``ctypes`` itself costs as much to load as all the rest of a keeper.)
_libc = _ctypes.dlopen(None, os.RTLD_NOW)  # type: ignore[arg-type]


def _prctl(option: int, value: int | bytes) -> None:
    if _ctypes.call_function(_ctypes.dlsym(_libc, "prctl"), (option, value, 0, 0, 0)) != 0:
        raise OSError(f"prctl({option}, {value!r}) was refused")


def adopt_orphans() -> None:
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent() -> None:
    """Be killed when the parent ends.  (It is told of its parent's thread: keepers have but one.)"""
    _prctl(PR_SET_PDEATHSIG, _signal.SIGKILL)


def be_called(name: bytes) -> None:
    """What ``ps`` and ``top`` show, 15 bytes."""
    _prctl(PR_SET_NAME, name[:15])


def children() -> list[int]:
    """The children of this process, whichever thread made them."""
    found: list[int] = []
    for thread in os.listdir("/proc/self/task"):
        try:
            found += map(int, _read(f"/proc/self/task/{thread}/children").split())
        except (FileNotFoundError, ProcessLookupError):
            # That thread has ended; or the kernel was built without CONFIG_PROC_CHILDREN.
            if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
                return _children_by_parent()
    return found


def _children_by_parent() -> list[int]:
    """The slow way: ask every process for its parent."""
    me = os.getpid()
    return [pid for pid in processes() if parent_of(pid) == me]


def parent_of(pid: int) -> int | None:
    """None: it is gone.  Raises ``OSError`` when it cannot be told."""
    return _in_stat(pid, 1)


def started_at(pid: int) -> int | None:
    """In ticks since the boot: with its pid this names a process.  None: it is gone."""
    return _in_stat(pid, 19)


def _in_stat(pid: int, field: int) -> int | None:
    try:
        return int(_read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[field])
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return None


def processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def threads() -> int:
    """How many this process has, those of C libraries too."""
    return len(os.listdir("/proc/self/task"))


def tag_of(pid: int) -> tuple[int, int] | None:
    """(soft, hard) of that process; None: it is gone, or may not be asked."""
    try:
        return resource.prlimit(pid, TAG)
    except (OSError, ValueError):
        return _tag_in_listing(pid)


def _tag_in_listing(pid: int) -> tuple[int, int] | None:
    """The limits of a process of another user may be read, but not asked for."""
    try:
        for line in _read(f"/proc/{pid}/limits").splitlines():
            if line.startswith(b"Max file locks"):
                soft, hard = (-1 if word == b"unlimited" else int(word) for word in line.split()[3:5])
                return soft, hard
    except (OSError, ValueError):
        pass
    return None


def wear(tag: tuple[int, int]) -> None:
    """Raises ``ValueError`` or ``OSError`` if an ordinary user may not."""
    resource.setrlimit(TAG, tag)


def own_tag() -> tuple[int, int]:
    return resource.getrlimit(TAG)


def words_of(pid: int) -> str:
    """Its command line, or what the kernel calls it; empty if it is gone."""
    try:
        name = _read(f"/proc/{pid}/comm").strip()
        words = _read(f"/proc/{pid}/cmdline", MOST_WORDS).replace(b"\0", b" ").strip()
        forked = name.startswith(b"safepool-")  # with the command line of the keeper
        return (words if words and not forked else b"[" + name + b"]").decode(errors="replace")
    except OSError:
        return ""


def is_zombie(pid: int) -> bool:
    try:
        return _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[:1] == [b"Z"]
    except OSError:
        return True


def signal_if(pid: int, is_ours: Callable[[], bool], number: int = SIGKILL) -> bool:
    """Hold on to the process, ask once more, and send the signal: False if it is another user's; death is no error."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        if is_ours():
            _signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        pass
    except PermissionError:
        return False
    finally:
        os.close(pidfd)
    return True


def close_but(fds: Iterable[int]) -> None:
    """Close every descriptor above the standard streams but these."""
    low = 3
    for fd in sorted({fd for fd in fds if fd >= low}):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, max(low, 1 << 20))


def let_go_of(*streams: int) -> None:
    """Let these descriptors lead nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in streams:
        os.dup2(nowhere, stream)
    if nowhere > 2:
        os.close(nowhere)


def _read(path: str, most: int = 1 << 20) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while most > 0 and (part := os.read(fd, min(most, 1 << 16))):
            parts.append(part)
            most -= len(part)
        return b"".join(parts)
    finally:
        os.close(fd)
