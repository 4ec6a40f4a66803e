"""What the pools of these tests run; small, because every worker imports it."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import signal
import threading
import time
from dataclasses import dataclass
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
    """Add a line to the file ``log``, whole or not at all, whenever this worker is killed."""
    line = f"{word!s:<15}\n".encode()
    assert len(line) == 16  # a write may be cut where a page of the file ends, so no line may lie across it
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, line)
    finally:
        os.close(file)
    return word


def note_and_wait(log: Path, word: object, gate: Path) -> object:
    note(log, word)
    return wait_for(gate, word)


def note_twice(log: Path) -> None:
    """As an initializer: how many have begun, and how many ended."""
    note(log, "begun")
    time.sleep(0.3)
    note(log, "ended")


def noted(log: Path) -> list[str]:
    """The lines that tasks have added to ``log``."""
    return [line.rstrip() for line in log.read_text().splitlines()] if log.exists() else []


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


def fork_a_child(seconds: float) -> int:
    """Leave a child of this worker, made by fork, that sleeps; its pid."""
    pid = os.fork()
    if pid == 0:
        time.sleep(seconds)
        os._exit(0)
    return pid


def use_lock(lock: Any) -> None:
    assert lock.acquire(timeout=LIMIT_S)
    lock.release()


def set_environ(name: str, value: str) -> None:
    os.environ[name] = value


def keywords(**kwargs: Any) -> dict[str, Any]:
    return kwargs


def add(*numbers: int) -> int:
    return sum(numbers)


def fail_at(number: int, bad: int) -> int:
    if number == bad:
        raise ValueError(f"item {number}")
    return number


def pool_in_a_pool(method: str | None, values: list[int]) -> list[int]:
    """The squares of ``values``, by a pool of this worker's own."""
    import multiprocessing

    from safepool import SafePoolExecutor

    context = None if method is None else multiprocessing.get_context(method)
    with SafePoolExecutor(1, context) as executor:
        return list(executor.map(pow, values, [2] * len(values), timeout=LIMIT_S))


# ------------------------------------------------- what is hard to send


class Unsendable:
    """Raises ``error`` when it is pickled."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


class Unreadable:
    """Calls ``fn(*args)`` when it is unpickled."""

    def __init__(self, fn: Any, *args: Any) -> None:
        self.call = fn, args

    def __reduce__(self) -> Any:
        return self.call


class TwoArguments(Exception):
    """Cannot be made again from its ``args``."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


class Holder(Exception):
    """Holds something that cannot be pickled."""

    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.lock = threading.Lock()


class Falsy(Exception):
    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True)
class Frozen(Exception):
    code: int


class Closed(Exception):
    def __setattr__(self, name: str, value: Any) -> None:
        raise RuntimeError(f"{name} may not be set")


def make(cls: Any, *args: Any) -> Any:
    return cls(*args)


def make_and_raise(cls: Any, *args: Any) -> None:
    raise cls(*args)


def a_set() -> set[int]:
    return {1}


def a_lock() -> Any:
    return threading.Lock()


def nested_list(depth: int) -> list[Any]:
    """A list in a list in a list ..., too deep for a pickle."""
    outer: list[Any] = []
    for _ in range(depth):
        outer = [outer]
    return outer


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def big(size_bytes: int) -> bytes:
    return random.Random(size_bytes).randbytes(size_bytes)


shared: Any = None


def share(*things: Any) -> None:
    """An initializer: locks and queues travel only so."""
    global shared
    shared = things


def use_shared(word: str) -> None:
    lock, queue = shared
    assert lock.acquire(timeout=LIMIT_S)
    try:
        queue.put(word)
    finally:
        lock.release()


def attempt(log: Path) -> int:
    """The number of this attempt."""
    note(log, os.getpid())
    return len(noted(log))
