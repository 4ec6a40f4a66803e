"""Makes the keeper the first process of a Linux process namespace: when it ends, the kernel ends all that is in it."""

from __future__ import annotations

import ctypes
import marshal
import os
import select

from ._os import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x20000, 0x10000000, 0x20000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 1 << 14, 1 << 18
CAPABILITIES_VERSION = 0x20080522


def enter(control: _socket.socket) -> None:
    """Return in a new process that is the first of its namespace; the one that calls this ends with it.

    Says ``("isolated",)`` on ``control``, or ``("refused", why)``, and then it does not return.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def must(what: str, result: int) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")

    try:
        user, group = os.geteuid(), os.getegid()
        flags = CLONE_NEWPID | CLONE_NEWNS | (0 if user == 0 else CLONE_NEWUSER)
        must("unshare", libc.unshare(flags))
        if user != 0:
            maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
            for name, line in maps.items():
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(line)
        alive, held = os.pipe()
        first = os.fork()
        if first != 0:
            control.close()
            os.close(alive)
            _end_with(first)
        os.close(held)
        linux.end_with_parent()
        if select.select([alive], [], [], 0)[0]:
            os._exit(1)  # it ended before that
        must("mount of / as private", libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
        must("mount of /proc", libc.mount(b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None))
        if user != 0:
            _drop_capabilities(libc)
    except OSError as error:
        control.send(marshal.dumps(("refused", str(error))))
        os._exit(1)
    control.send(marshal.dumps(("isolated",)))


def _end_with(first: int) -> None:
    """All that is left to do for the process outside: it is what the user's side watches."""
    try:
        os.waitpid(first, 0)
    finally:
        os._exit(0)


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Those that a user has in a namespace of its own, and needs no more."""
    header = (ctypes.c_uint32 * 2)(CAPABILITIES_VERSION, 0)
    nothing = (ctypes.c_uint32 * 6)()
    if libc.capset(header, nothing) != 0:
        raise OSError(ctypes.get_errno(), "capset was refused")
