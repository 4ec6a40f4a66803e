"""What a task may leave behind: every process of a family holds one FIFO open, and ends by itself after a while.

As a script (``python -I -S family_shapes.py wait``) it is a member that has been executed anew; the FIFO is its stdout.
It imports little, so that such a member starts fast.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from time import monotonic, sleep
from typing import NamedTuple, NoReturn

LIFE = "FAMILY_LIFE_S"  # in the environment of those that are to live longer
LIFE_S = float(os.environ.get(LIFE, "20"))  # of a member that nobody ends
HOP_S = 15.0  # of a family that keeps forking
TICK_S = 0.05  # from one fork of a line of the live bomb to its next
LOOK_S = 0.002
GROUPS, GROUP = 20, 19  # of the bomb: so many processes, each with so many children
LINES = 50  # of the live bomb, about two processes each
ZOMBIES = 50
DEAF_TO = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
COMMAND = [sys.executable, "-I", "-S", __file__]


# -------------------------------------------------------------------- members


def wait_long(out: int) -> NoReturn:
    """Be there until the end of a long life."""
    _say_ready(out)
    _sleep_until(monotonic() + LIFE_S)


def turn_deaf(out: int) -> NoReturn:
    for number in DEAF_TO:
        signal.signal(number, signal.SIG_IGN)
    wait_long(out)


def execute(out: int, environ: dict[str, str]) -> NoReturn:
    """Become a new program with this environment."""
    os.dup2(out, 1)
    os.execve(COMMAND[0], [*COMMAND, "wait"], environ)


def hop(out: int) -> NoReturn:
    """Fork the next one and exit, and so on, as fast as it goes."""
    _say_ready(out)
    end = monotonic() + HOP_S
    while monotonic() < end:
        if os.fork():
            os._exit(0)
    os._exit(0)


def be_a_line(out: int) -> NoReturn:
    """The same, slower, and each still lives for a moment beside its successor."""
    _say_ready(out)
    end = monotonic() + HOP_S
    while monotonic() < end:
        sleep(TICK_S)
        if os.fork():
            sleep(TICK_S)
            os._exit(0)
    os._exit(0)


def have_children(out: int) -> NoReturn:
    for _ in range(GROUP):
        _fork(wait_long, out)
    wait_long(out)


def have_lines(out: int) -> NoReturn:
    for _ in range(LINES):
        _fork(be_a_line, out)
    os._exit(0)


def stop(out: int) -> NoReturn:
    """Be stopped; a child of it ends it after a long life, for it could not do that itself."""
    me = os.pidfd_open(os.getpid())
    if os.fork() == 0:
        sleep(LIFE_S)
        signal.pidfd_send_signal(me, signal.SIGKILL)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGSTOP)
    wait_long(out)


def stop_a_child(out: int) -> NoReturn:
    _fork_stopped(out)
    os._exit(0)


def _say_ready(out: int) -> None:
    os.write(out, b".")


def _sleep_until(end: float) -> NoReturn:
    while (rest := end - monotonic()) > 0:
        sleep(rest)
    os._exit(0)


def _fork(run: Callable[[int], NoReturn], out: int) -> int:
    """Run it in a child."""
    pid = os.fork()
    if pid == 0:
        try:
            run(out)
        finally:
            os._exit(1)
    return pid


def _fork_apart(run: Callable[[int], NoReturn], out: int) -> None:
    """Run it in a daemon: forked twice, in a session of its own."""

    def fork_on(out: int) -> NoReturn:
        os.setsid()
        _fork(run, out)
        os._exit(0)

    pid = _fork(fork_on, out)
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _fork_stopped(out: int) -> None:
    """Ready is who is really stopped."""
    pid = _fork(stop, out)
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WUNTRACED)
    _say_ready(out)


# --------------------------------------------------------------------- shapes


def child(out: int) -> None:
    """A fork of the worker, with all that it holds."""
    _fork(wait_long, out)


def grandchild(out: int) -> None:
    """A program that started another one."""
    import subprocess

    kept.append(subprocess.Popen([*COMMAND, "start"], stdout=out))


def daemon(out: int) -> None:
    _fork_apart(wait_long, out)


def cleared(out: int) -> None:
    """A daemon that is another program by now and has nothing in its environment."""
    _fork_apart(lambda out: execute(out, {}), out)


def deaf(out: int) -> None:
    """A child and a daemon that ignore every signal that can be ignored."""
    _fork(turn_deaf, out)
    _fork_apart(turn_deaf, out)


def stopped(out: int) -> None:
    """A child and a daemon that are stopped."""
    _fork_stopped(out)
    _fork_apart(stop_a_child, out)


def bomb(out: int) -> None:
    """400 processes: 20 daemons with 19 children each."""
    for _ in range(GROUPS):
        _fork_apart(have_children, out)


def live_bomb(out: int) -> None:
    """About 100 processes at any time, which fork a thousand times per second."""
    _fork_apart(have_lines, out)


def hopper(out: int) -> None:
    """Never more than two, and never the same."""
    _fork_apart(hop, out)


kept: list[object] = []  # so that nobody waits for a program because its Popen is dropped


class Shape(NamedTuple):
    """How to make a family, and how many say that they are ready."""

    make: Callable[[int], None]
    members: int
    is_bomb: bool = False
    outruns: bool = False  # may outrun whoever looks for it in /proc


SHAPES = {
    "child": Shape(child, 1),
    "grandchild": Shape(grandchild, 2),
    "daemon": Shape(daemon, 1),
    "cleared": Shape(cleared, 1),
    "deaf": Shape(deaf, 2),
    "stopped": Shape(stopped, 2),
    "bomb": Shape(bomb, GROUPS * (GROUP + 1), is_bomb=True),
    "live bomb": Shape(live_bomb, LINES, is_bomb=True, outruns=True),
    "hopper": Shape(hopper, 1, outruns=True),
}
SMALL = tuple(name for name, shape in SHAPES.items() if not shape.is_bomb and not shape.outruns)


# ---------------------------------------------------------------------- tasks


def leave(shape: str, fifo: str, go: str | None = None) -> int:
    """Leave a family; then return, once the file ``go`` is there if one is named."""
    out = os.open(fifo, os.O_WRONLY)
    try:
        SHAPES[shape].make(out)
    finally:
        os.close(out)
    await_file(go)
    return os.getpid()


def leave_on_purpose(fifo: str) -> int:
    """Start one program that is to stay."""
    import subprocess

    import safepool

    out = os.open(fifo, os.O_WRONLY)
    try:
        with safepool.leave_running():
            kept.append(subprocess.Popen([*COMMAND, "wait"], stdout=out))
    finally:
        os.close(out)
    return os.getpid()


def leave_unwaited() -> int:
    """Leave 50 children that end at once, and wait for none."""
    for _ in range(ZOMBIES):
        if os.fork() == 0:
            os._exit(0)
    return os.getpid()


def exit_codes(count: int) -> list[int]:
    """What programs that exit with 0, 1, 2, ... are seen to exit with; some are over before anyone asks."""
    import subprocess

    started = [
        subprocess.Popen(["/bin/sh", "-c", f"sleep {0.05 * (code % 3)}; exit {code}"], stdout=subprocess.DEVNULL)
        for code in range(count)
    ]
    return [process.wait(LIFE_S) for process in reversed(started)][::-1]


def exit_codes_of_threads(count: int) -> list[int]:
    """The same, each from a thread of its own."""
    import subprocess
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda code: subprocess.call(["/bin/sh", "-c", f"exit {code}"]), range(count)))


def await_file(path: str | None) -> None:
    end = monotonic() + LIFE_S
    while path is not None and not os.path.exists(path) and monotonic() < end:
        sleep(LOOK_S)


if __name__ == "__main__":
    if sys.argv[1] == "start":
        os.posix_spawn(COMMAND[0], [*COMMAND, "wait"], dict(os.environ))
    wait_long(1)
