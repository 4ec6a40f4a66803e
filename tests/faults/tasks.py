"""What the pools of these tests run, and what is hard to send to them or back."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

LIMIT_S = 60.0

kept: list[Any] = []  # what a task leaves behind on purpose


# ------------------------------------------------------------- ways to end


def end(how: str) -> None:
    """End, or stop, this process in the given way."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if how == "exit":
        os._exit(7)
    os.kill(os.getpid(), getattr(signal, how))
    time.sleep(LIMIT_S)


def end_later(how: str, seconds: float) -> float:
    """Return at once; a thread ends this worker some time later."""

    def wait_and_end() -> None:
        time.sleep(seconds)
        end(how)

    threading.Thread(target=wait_and_end, daemon=True).start()
    return seconds


def end_in_bytes(how: str, size: int) -> bytes:
    """A big answer; a thread ends this worker once the answer is on its way."""
    end_later(how, 0.0005 * (size % 7))
    return bytes(size)


class EndsWhenRead:
    """Ends the process that unpickles it."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        return end, (self.how,)


class EndsWhenPickled:
    """Ends the process that pickles it, after ``size`` bytes of its neighbour were pickled."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        end(self.how)
        return str, ()


def return_what_ends(how: str, size: int) -> Any:
    return [bytes(size), EndsWhenPickled(how)]


def retire_slowly(how: str) -> int:
    """Answer well; then end while the interpreter of this worker is on its way out."""
    from multiprocessing import util

    util.Finalize(None, end, (how,), exitpriority=100)
    return os.getpid()


def end_when_started(how: str, log: Path, times: int) -> None:
    """An initializer: the first ``times`` workers end in it."""
    number = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(number, b"x")
    os.close(number)
    if log.stat().st_size <= times:
        end(how)


# -------------------------------------------------------------- descriptors


def descriptors() -> list[int]:
    """The sockets and pipes that are a worker's own: its channel, where its answers go, its tickets, perhaps more."""
    found = []
    for fd in sorted(map(int, os.listdir("/proc/self/fd"))):
        with suppress(OSError):  # the descriptor of the listing itself
            if fd > 2 and os.readlink(f"/proc/self/fd/{fd}").startswith(("socket:", "pipe:")):
                found.append(fd)
    return found


def scribble(data: bytes) -> str:
    """Write ``data`` where only the worker itself may write."""
    for fd in descriptors():
        with suppress(OSError):  # it is for reading
            os.write(fd, data)
    return "scribbled"


def shut_descriptors() -> str:
    import socket

    for fd in descriptors():
        try:
            socket.socket(fileno=os.dup(fd)).shutdown(socket.SHUT_RDWR)
        except OSError:
            os.close(fd)
    return "shut"


def replace_descriptors(by: str) -> str:
    """Put something else in the place of each socket and each pipe of this worker."""
    import socket

    for fd in descriptors():
        if by == "null":
            other = os.open("/dev/null", os.O_RDWR)
        elif by == "pipe":
            reader, writer = os.pipe()
            flags = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
            other, rest = (reader, writer) if flags == os.O_RDONLY else (writer, reader)
            kept.append(rest)
        else:
            left, right = socket.socketpair()
            kept.append(right)
            other = left.detach()
        os.dup2(other, fd)
        os.close(other)
    return "replaced"


def close_standard(numbers: tuple[int, ...]) -> str:
    for number in numbers:
        os.close(number)
    return "closed"


def speak(value: Any) -> Any:
    """Speak by every road there is, if there is one."""
    with suppress(OSError, ValueError):
        print("a task speaks " * 20)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.write("it speaks " * 20)
                stream.flush()
    for number in (1, 2):
        with suppress(OSError):
            os.write(number, b"a library speaks " * 20)
    return value


def drop_streams() -> str:
    sys.stdin = sys.stdout = sys.stderr = None
    return "dropped"


def use_up_descriptors() -> int:
    """Leave no descriptor free in this worker."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    try:
        while True:
            kept.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        return len(kept)


def lose_modules() -> str:
    """Nothing can be imported in this worker from now on."""
    sys.path.clear()
    sys.path_importer_cache.clear()
    sys.meta_path.clear()
    return "lost"


# ------------------------------------------------------------------- memory


def cap_memory(more_mb: int) -> None:
    """From now on this worker may take so much more memory, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def size_of(data: bytes) -> int:
    return len(data)


# ---------------------------------------------------- misbehaving exceptions


class BadStr(Exception):
    """Cannot be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


class BadExit(Exception):
    """Ends whoever shows it."""

    def __str__(self) -> str:
        raise SystemExit(3)

    __repr__ = __str__


class SlowToShow(Exception):
    """Made with the pid of a process in which it cannot be shown before ``gate`` is open."""

    gate = threading.Event()

    def __str__(self) -> str:
        if os.getpid() == self.args[0]:
            self.gate.wait(LIMIT_S)
        return "shown"

    __repr__ = __str__


class BadTraceback(Exception):
    """Takes no traceback."""

    def with_traceback(self, tb: Any) -> Any:
        raise RuntimeError("no traceback")


class BadNotes(Exception):
    @property
    def __notes__(self) -> Any:
        raise SystemExit("no notes")


class BadReduce(Exception):
    def __reduce__(self) -> Any:
        raise SystemExit(4)


class BadInit(Exception):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if args and args[0] == "again":
            raise KeyError("cannot be made again")


class NotMadeAgain(Exception):
    """Comes back as something that is no exception."""

    def __reduce__(self) -> Any:
        return str, ("only words",)


class Throws:
    """Raises ``cls("x")`` when it is unpickled."""

    def __init__(self, cls: type[BaseException]) -> None:
        self.cls = cls

    def __reduce__(self) -> Any:
        return throw, (self.cls,)


def throw(cls: type[BaseException], *args: Any) -> None:
    raise cls(*(args or ("x",)))


def return_throws(cls: type[BaseException]) -> Any:
    return Throws(cls)


class Meta(type):
    def __hash__(cls) -> int:
        raise RuntimeError("no hash")

    def __eq__(cls, other: object) -> bool:
        raise RuntimeError("not comparable")


class Hashless(metaclass=Meta):
    """Its class can be neither hashed nor compared."""


class Grumpy:
    """Raises in every test of it."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, number: int) -> None:
        self.number = number

    def __bool__(self) -> bool:
        raise RuntimeError("neither true nor false")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not comparable")

    def __len__(self) -> int:
        raise RuntimeError("no length")


class Nameless:
    """A callable that answers no question about itself."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")

    def __call__(self) -> int:
        return 5


class Dying:
    """Raises when it is dropped."""

    error: type[BaseException] = RuntimeError

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __del__(self) -> None:
        raise self.error("while it was dropped")


class SlowToRead:
    """Takes for ever to unpickle."""

    def __init__(self, ready: Path | None = None) -> None:
        self.ready = ready

    def __reduce__(self) -> Any:
        return _sleep, (self.ready,)


class SlowToPickle:
    def __reduce__(self) -> Any:
        time.sleep(LIMIT_S)
        return str, ()


def _sleep(ready: Path | None) -> None:
    if ready is not None:
        ready.touch()
    time.sleep(LIMIT_S)


def make(cls: Any, *args: Any) -> Any:
    return cls(*args)


def generator() -> Any:
    yield 1


def recurse(depth: int) -> int:
    return recurse(depth + 1)


def long_words(size: int) -> None:
    raise ValueError("x" * size)


def odd_words() -> None:
    raise ValueError("half a pair: \ud800")


def chain(length: int) -> None:
    """Raise an exception with a chain of so many causes."""
    error: BaseException = ValueError(0)
    for n in range(1, length):
        following = ValueError(n)
        following.__cause__ = error
        error = following
    raise error


def circle() -> None:
    """Raise an exception that is the cause of its own cause."""
    one, two = ValueError(1), ValueError(2)
    one.__cause__, two.__cause__ = two, one
    raise one


# -------------------------------------------------------------- initializers


def wait_for_ever(ready: Path | None = None) -> None:
    _sleep(ready)


def leave(code: object) -> None:
    sys.exit(code)  # type: ignore[arg-type]


def start_a_thread() -> None:
    """Leave a thread that is not a daemon and runs for a long time."""
    threading.Thread(target=time.sleep, args=(LIMIT_S,)).start()


def raise_with_a_bad_log(words: str) -> None:
    """Raise, in a process whose log refuses everything."""
    import logging

    class Refusing(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            raise RuntimeError("the log is full")

    logging.getLogger().addHandler(Refusing())
    raise ValueError(words)


def raise_with_a_blocked_log(words: str) -> None:
    """Raise, in a process whose log never returns."""
    import logging

    class Blocking(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            time.sleep(LIMIT_S)
            return True

    logging.getLogger().addHandler(Blocking())
    raise ValueError(words)


def run(fn: Callable[..., Any], *args: Any) -> Any:
    return fn(*args)
