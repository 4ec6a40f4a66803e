"""What the pools of these tests run; small, because every worker imports it."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

LIMIT_S = 60.0


def echo(value: Any) -> Any:
    return value


def size(index: int, data: bytes) -> tuple[int, int]:
    return index, len(data)


def nap(seconds: float, value: Any = None) -> Any:
    time.sleep(seconds)
    return value


def wait_for(gate: Path, value: Any = None) -> Any:
    """Return ``value`` once the file ``gate`` exists."""
    end = time.monotonic() + LIMIT_S
    while not gate.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"nobody opened {gate}")
        time.sleep(0.005)
    return value


def note(log: Path, word: object) -> object:
    """Add a line to the file ``log``: one write, so that lines of several workers do not mix."""
    with log.open("a", buffering=1) as file:
        file.write(f"{word}\n")
    return word


def note_and_wait(log: Path, word: object, gate: Path) -> object:
    note(log, word)
    return wait_for(gate, word)


def noted(log: Path) -> list[str]:
    """The lines that tasks have added to ``log``."""
    return log.read_text().splitlines() if log.exists() else []


def send_self(number: int) -> None:
    """End, or stop, this worker by a signal."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), number)
    time.sleep(LIMIT_S)


def raise_error(error: BaseException) -> None:
    raise error


def hold_the_gil() -> int:
    """A loop in C that lets no other thread of this process run, for hours."""
    return sum(range(10**12))


def ignore_sigterm(ready: Path | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if ready is not None:
        ready.touch()
    time.sleep(LIMIT_S)


def close_all_descriptors() -> str:
    os.closerange(3, 1 << 16)
    return "nobody can hear this"


def fail_until(log: Path, times: int) -> int:
    """Raise ``ValueError`` in the first ``times`` attempts; then the number of this attempt."""
    note(log, os.getpid())
    attempt = len(noted(log))
    if attempt <= times:
        raise ValueError(f"attempt {attempt}")
    return attempt


def die_until(log: Path, times: int) -> int:
    """Kill this worker in the first ``times`` attempts; then the number of this attempt."""
    note(log, os.getpid())
    attempt = len(noted(log))
    if attempt <= times:
        send_self(signal.SIGKILL)
    return attempt


def sleep_until(log: Path, times: int) -> int:
    """Take for ever in the first ``times`` attempts; then the number of this attempt."""
    note(log, os.getpid())
    attempt = len(noted(log))
    if attempt <= times:
        time.sleep(LIMIT_S)
    return attempt


def exit_in_initializer() -> None:
    os._exit(1)


def raise_in_initializer(text: str) -> None:
    raise ValueError(text)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]
