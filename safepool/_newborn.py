"""Makes a process that was just forked, or executed, right as a worker: owner, streams, names, random state, exit.

A worker that was forked from a zygote is as one in a fresh interpreter: its own signals, standard streams, arguments,
working directory and random state, and multiprocessing believes that it was started by the user's process.
"""

from __future__ import annotations

import _socket
import atexit
import io
import itertools
import marshal
import os
import sys
import time

from . import _leftovers, _os, _stacks, _worker
from ._loading import once_loaded
from ._os import linux
from ._packets import BACK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

ADOPTION_LIMIT_S = 10.0
MORE_OOM_SCORE = 200  # when memory runs out, workers go before the programs they work for
MOST_OOM_SCORE = 1000
MOST_BYTES = 1 << 20

_held: list[Any] = []  # what must not be collected: its descriptors are closed, and may be others by now


def live(body: bytes, fds: list[int]) -> NoReturn:
    """The whole life of a worker that was forked.

    ``body``: a marshalled ``dict`` that says what the parent is like, see ``_keep``; ``fds``: the channel to the
    keeper, then those that ``body`` names, then those that are inherited by what the parent pickled.
    """
    _from_here_to_the_end(lambda: _be_forked(body, fds))


def come_back() -> NoReturn:
    """The same for one that was executed: a fresh interpreter."""
    memory, *fds = map(int, sys.argv[2].split(","))
    os.lseek(memory, 0, os.SEEK_SET)
    told = marshal.loads(os.read(memory, MOST_BYTES))
    os.close(memory)
    for fd in fds:
        os.set_inheritable(fd, False)
    _from_here_to_the_end(lambda: _live(told, fds))


def _from_here_to_the_end(life: Callable[[], int]) -> NoReturn:
    code = 1
    try:
        code = life()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _be_forked(body: bytes, fds: list[int]) -> int:
    linux.close_but(fds)
    told = marshal.loads(body)
    if told["fresh"]:
        _be_executed(told, body, fds)
    atexit._clear()
    return _live(told, fds)


def be_adopted(keeper: int) -> None:
    """Before it is a worker: be the keeper's child, end with it, and go first when memory runs out."""
    end = time.monotonic() + ADOPTION_LIMIT_S
    while os.getppid() != keeper:
        if time.monotonic() > end:
            os._exit(1)
        time.sleep(0)
    linux.end_with_parent()
    if os.getppid() != keeper:
        os._exit(1)  # it ended between the two
    os.setpgid(0, 0)  # a task that signals its group hits its own family
    try:
        with open("/proc/self/oom_score_adj", "r+b", buffering=0) as file:
            file.write(b"%d" % min(int(file.read()) + MORE_OOM_SCORE, MOST_OOM_SCORE))
    except (OSError, ValueError):
        pass


def rehearse() -> None:
    """Do for nothing, while nobody waits, what a worker does first: the memory that this touches is copied now."""
    marshal.loads(marshal.dumps({"fds": ("channel",), "setup": b"", "path": sys.path}))
    for fd, like in ((1, sys.stdout), (2, sys.stderr)):
        _stream(fd, like).detach()
    open(0, closefd=False).detach()
    if "multiprocessing.process" in sys.modules:
        sys.modules["multiprocessing.process"].BaseProcess()
    _worker.rehearse()


def belong(family: int | None) -> None:
    """Be a worker."""
    linux.be_called(b"safepool-worker")
    if family is not None:
        linux.wear((family, linux.own_tag()[1]))


def _be_executed(told: dict[str, Any], body: bytes, fds: list[int]) -> NoReturn:
    memory = os.memfd_create("safepool")
    os.write(memory, body)
    for fd in (memory, *fds):
        os.set_inheritable(fd, True)
    words = ",".join(map(str, (memory, *fds)))
    command = [*told["interpreter"], "-c", f"{BACK}from safepool._newborn import come_back; come_back()"]
    os.execv(command[0], [*command, told["home"], words])


def _live(told: dict[str, Any], fds: list[int]) -> int:
    named = dict(zip(told["fds"], fds[1:]))
    _own_streams(named)
    sys.path[:] = told["path"]
    sys.argv[:] = told["argv"]
    try:
        os.chdir(told["cwd"])
    except OSError:
        pass  # it was removed: stay where the keeper was started
    _own_names(told, named, fds[1 + len(named) :])
    _own_random_state()
    ends = _os.Ends(
        _socket.socket(fileno=named["channel"]),
        _os.End(named["answers"]),
        _os.End(named["tickets"]) if "tickets" in named else None,
    )
    if "stacks" in named:
        _stacks.answer_in(named["stacks"])
    leftovers = _leftovers.Leftovers(_leftovers.AtKeeper(_socket.socket(fileno=fds[0])), told["leftovers"])
    _worker.main(ends, told["setup"], leftovers)
    return _leave()


# -------------------------------------------------------------------- streams


def _own_streams(named: dict[str, int]) -> None:
    """As with multiprocessing: nobody types for a worker, and it prints where its parent does now."""
    _held.extend((sys.stdin, sys.stdout, sys.stderr, sys.__stdin__, sys.__stdout__, sys.__stderr__))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number, fd in ((0, nowhere), (1, named.get("out", nowhere)), (2, named.get("err", nowhere))):
        os.dup2(fd, number)
    for fd in {nowhere, *(named[name] for name in ("out", "err") if name in named)}:
        if fd > 2:
            os.close(fd)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = _stream(1, sys.stdout) if "out" in named else None  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _stream(2, sys.stderr) if "err" in named else None  # type: ignore[misc]


def _stream(fd: int, like: Any) -> Any:
    """As the interpreter makes it at its start."""
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    raw = open(fd, "wb", -1, closefd=False)
    lines = fd == 2 or raw.isatty()
    encoding, errors = (like.encoding, like.errors) if like is not None else (None, "backslashreplace")
    return io.TextIOWrapper(raw, encoding, errors, line_buffering=lines, write_through=unbuffered)


# ---------------------------------------------------------------------- names


def _own_names(told: dict[str, Any], named: dict[str, int], inherited: list[int]) -> None:
    """multiprocessing's: at once if the zygote has loaded it, else when somebody does."""

    def default_method(module: Any) -> None:
        if told["method"] is not None:
            module.set_start_method(told["method"], force=True)

    def process(module: Any) -> None:
        me = module.BaseProcess(name=told["name"])
        me._identity = (told["number"],)
        me._parent_pid = told["parent"]
        me._parent_name = told["parent_name"]
        me.authkey = told["authkey"]
        sentinel = None if told["isolated"] else os.pidfd_open(told["parent"])  # (a namespace has pids of its own)
        module._current_process = me
        module._parent_process = module._ParentProcess(told["parent_name"], told["parent"], sentinel)
        module._process_counter = itertools.count(1)
        module._children = set()
        module._dangling.discard(me)

    def tracker(module: Any) -> None:
        if "tracker" in named:
            module._resource_tracker._fd = named["tracker"]

    def server(module: Any) -> None:
        module._forkserver._inherited_fds = inherited

    def util(module: Any) -> None:
        module._finalizer_registry.clear()
        module._run_after_forkers()
        atexit.register(module._exit_function)

    once_loaded("multiprocessing.process", process)
    once_loaded("multiprocessing", default_method)
    once_loaded("multiprocessing.resource_tracker", tracker)
    if inherited:
        once_loaded("multiprocessing.forkserver", server)
    if "multiprocessing.util" in sys.modules:
        util(sys.modules["multiprocessing.util"])


# ----------------------------------------------------------- randomness, exit


def _own_random_state() -> None:
    """(The random module sees to itself.)"""
    for name in ("numpy.random", "torch.random"):
        if name in sys.modules:
            sys.modules[name].seed()


def _leave() -> int:
    """The end of one of multiprocessing's processes, as far as what it needs was loaded."""
    util, threading = sys.modules.get("multiprocessing.util"), sys.modules.get("threading")
    if sys.version_info < (3, 13) and util is not None:
        util._exit_function()
    if threading is not None:
        threading._shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, ValueError, OSError):
            pass
    if sys.version_info >= (3, 13):
        atexit._run_exitfuncs()
    return 0
