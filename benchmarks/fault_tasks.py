"""What the rows of the fault grid run in workers, and as initializers; small, because every worker imports it."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

LIMIT_S = 60.0  # no task here runs longer, but for those that only a kill ends
LOOK_S = 0.005
ROOM_BYTES = 64 << 20  # what a task short of memory may still have
LOCK = threading.Lock()  # for a row in which a thread of the parent holds it


def echo(value: Any) -> Any:
    return value


def nap(seconds: float, value: Any = None) -> Any:
    time.sleep(seconds)
    return value


def size(index: int, data: bytes) -> tuple[int, int]:
    return index, len(data)


def pid_after(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


# ------------------------------------------------- what a test can see and hold


def begin(folder: str, name: str) -> None:
    """Say that this task runs, in which process and since when: a file that appears whole or not at all."""
    place = Path(folder)
    being_written = place / f".{name}.{os.getpid()}"
    being_written.write_text(f"{os.getpid()} {time.monotonic()}")
    being_written.rename(place / name)


def hold(folder: str, name: str, value: Any = None) -> Any:
    """Begin, and return ``value`` once the file ``release`` is there."""
    begin(folder, name)
    release, end = Path(folder) / "release", time.monotonic() + LIMIT_S
    while not release.exists():
        if time.monotonic() > end:
            raise TimeoutError("nobody released it")
        time.sleep(LOOK_S)
    return value


def note(folder: str, number: int, seconds: float) -> int:
    """Take some time, then leave a file that tells so."""
    time.sleep(seconds)
    begin(folder, f"note-{number}")
    return number


# ----------------------------------------------------------- ways to go wrong


def leave(how: str) -> None:
    """End this worker, or try to."""
    if how == "sys.exit()":
        sys.exit("said by sys.exit")
    if how.startswith("os._exit"):
        os._exit(int(how[9:-1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), signal.Signals[how])
    time.sleep(LIMIT_S)


def raise_this(kind: type[BaseException], words: str) -> None:
    raise kind(words)


def sleep_on(folder: str, name: str) -> None:
    begin(folder, name)
    time.sleep(3600)


def hold_the_gil(folder: str, name: str) -> int:
    """A loop in C that lets no other thread of this process run, for hours."""
    begin(folder, name)
    return sum(range(10**12))


def ignore_sigterm(folder: str, name: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    begin(folder, name)
    end = time.monotonic() + 3600
    while time.monotonic() < end:
        time.sleep(1)


def flood(folder: str, name: str) -> None:
    """Print 50 MB."""
    begin(folder, name)
    for _ in range(500):
        print("x" * 100_000)


def run_out_of_memory(how: str) -> int:
    """Raise ``MemoryError``, in one large step or in many small ones, near a limit that stays in force."""
    with open("/proc/self/statm") as sizes:
        now = int(sizes.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    if how == "at once":
        return len(bytearray(1 << 40))
    pile: list[bytearray] = []
    while True:
        pile.append(bytearray(4096))


def take_the_lock() -> str:
    if not LOCK.acquire(timeout=LIMIT_S):
        return "a lock that nobody here holds stayed locked"
    LOCK.release()
    return "taken"


# -------------------------------------------------------------- initializers


def raise_in_initializer(folder: str, words: str) -> None:
    begin(folder, f"start-{os.getpid()}-{time.monotonic_ns()}")
    raise ValueError(words)


def exit_in_initializer(folder: str, code: int) -> None:
    begin(folder, f"start-{os.getpid()}-{time.monotonic_ns()}")
    os._exit(code)


# --------------------------------------------------------- what is hard to send


class Unsendable:
    """Raises when it is pickled."""

    def __init__(self, words: str) -> None:
        self.words = words

    def __reduce__(self) -> Any:
        raise TypeError(self.words)


class Deadly:
    """Kills the process that unpickles it."""

    def __reduce__(self) -> Any:
        return leave, ("SIGKILL",)


class Holder(Exception):
    """Holds something that cannot be pickled."""

    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.lock = threading.Lock()


class TwoArguments(Exception):
    """Cannot be made again from its ``args``."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


def make_unsendable(words: str) -> Unsendable:
    return Unsendable(words)


def raise_holder(words: str) -> None:
    raise Holder(words)


def raise_two_arguments(one: str, two: str) -> None:
    raise TwoArguments(one, two)


# ------------------------------------------------------------- a pool in a task


def squares_by_a_pool(name: str, start: str, numbers: list[int]) -> list[int]:
    """The squares of ``numbers``, by a pool of this worker's own."""
    from benchmarks.pools import open_pool

    pool = open_pool(name, 1, start)
    try:
        return [future.result(LIMIT_S) for future in [pool.submit(pow, number, 2) for number in numbers]]
    finally:
        pool.shutdown()
