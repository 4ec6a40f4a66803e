"""The user's process of a cell: it enters its cgroup, becomes its user, has a pool leave a family, and ends as told.

``python -I -S benchmarks/family_users.py PLAN`` does the first two and becomes
``python -m benchmarks.family_users PLAN``; the plan is JSON, see ``Plan``.  What happens it tells as lines of JSON on
its stdout.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NoReturn

ROOT = str(Path(__file__).parent.parent)
ENTERED = "FAMILY_ENTERED"
LIMIT_S = 20.0
LIFE_S = 60.0  # of a user's process that nobody ends
LOOK_S = 0.002
SPARE_S, SETTLED_S = 1.0, 0.02  # for a worker to be forked in advance, and for its keeper to know it
MS_BIND, MS_REC, MS_PRIVATE, CLONE_NEWNS = 0x1000, 0x4000, 0x40000, 0x20000


@dataclass
class Plan:
    """What a user's process is to do in ``folder``; files that appear there tell it when.

    ``fifos``: leave a family on each, one after another; ``go``: the tasks return once the file ``go`` is there,
    or at once if it is empty, or never if it is None.  ``ending``: once the file ``end`` is there.
    """

    program: str  # of PROGRAMS
    folder: str
    shape: str = "child"
    start: str = "default"
    fifos: list[str] = field(default_factory=list)
    go: str | None = None
    timeout: float | None = None
    ending: str = "shutdown"
    options: dict[str, Any] = field(default_factory=dict)  # of the pool
    rounds: int = 0
    cgroup: str | None = None
    uid: int | None = None


# ------------------------------------------------------- before it is itself


def enter(plan: Plan) -> NoReturn:
    """Be in the right cgroup and the right user, and start anew."""
    if plan.cgroup is not None:
        Path(plan.cgroup, "cgroup.procs").write_text(str(os.getpid()))
    if plan.uid is not None:
        show_interpreter()
        os.setgroups([])
        os.setgid(plan.uid)
        os.setuid(plan.uid)
    os.chdir(plan.folder)
    command = [sys.executable, "-m", "benchmarks.family_users", *sys.argv[1:]]
    os.execve(sys.executable, command, {**os.environ, ENTERED: "1"})


def show_interpreter() -> None:
    """If others may not reach this interpreter, give this process a view of the file system in which they may."""
    prefixes = [os.path.dirname(os.path.dirname(os.path.realpath(sys.executable))), ROOT]
    prefixes += [sys.prefix, os.path.dirname(os.path.dirname(sys.executable))]
    closed = {top for prefix in prefixes if (top := _closed(prefix)) is not None}
    if not closed:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    _mount(libc, "none", "/", MS_REC | MS_PRIVATE)
    for top in closed:
        inner = {prefix for prefix in prefixes if prefix.startswith(top + "/")}
        kept = {prefix: os.open(prefix, os.O_PATH) for prefix in inner}
        _mount(libc, "tmpfs", top, 0, "tmpfs", "mode=755")
        for prefix, place in kept.items():
            os.makedirs(prefix, exist_ok=True)
            _mount(libc, f"/proc/self/fd/{place}", prefix, MS_BIND | MS_REC)
            os.close(place)


def _closed(path: str) -> str | None:
    """The first folder on the way to ``path`` that is closed to others."""
    folders = [*reversed(Path(path).parents), Path(path)]
    return next((str(folder) for folder in folders if not folder.stat().st_mode & 0o001), None)


def _mount(libc: ctypes.CDLL, source: str, target: str, flags: int, *more: str) -> None:
    kind, options = (word.encode() for word in more or ("none", ""))
    if libc.mount(source.encode(), target.encode(), kind, ctypes.c_ulong(flags), options) != 0:
        raise OSError(ctypes.get_errno(), f"mount {target}")


# ------------------------------------------------------------------ programs


def tell(**facts: Any) -> None:
    """One line; threads may tell, too."""
    os.write(1, (json.dumps(facts) + "\n").encode())


def open_pool(plan: Plan, workers: int = 2) -> Any:
    import multiprocessing

    from safepool import SafePoolExecutor

    context = None if plan.start == "default" else multiprocessing.get_context(plan.start)
    return SafePoolExecutor(workers, context, **plan.options)


def keeper_pid() -> int | None:
    """The pid of the keeper of this process, if there is such a thing."""
    with suppress(ImportError, AttributeError):
        from safepool import _keep

        return _keep.keeper_pid() or next(iter(_keep.keeper_pids()), None)
    return None


def leave_families(plan: Plan) -> None:
    """Have the pool leave one family after another, tell what becomes of each task, and end."""
    from benchmarks import family_shapes as shapes

    pool = open_pool(plan)
    view = pool if plan.timeout is None else pool.options(timeout=plan.timeout)
    end = Path(plan.folder, "end")
    latest = monotonic() + LIFE_S
    go = {None: str(Path(plan.folder, "never")), "": None}.get(plan.go, plan.go)
    for fifo in plan.fifos:
        future = view.submit(shapes.leave, plan.shape, fifo, go)
        since = monotonic()
        while not (future.running() or future.done()):
            if monotonic() > since + LIMIT_S:
                raise TimeoutError("the task does not run")
            sleep(LOOK_S)
        tell(worker=future.worker_pid, workers=[*pool._processes], keeper=keeper_pid())
        future.add_done_callback(_tell_outcome)
        while not end.exists() and not (future.done() and fifo != plan.fifos[-1]):
            if monotonic() > latest:
                os._exit(4)
            sleep(LOOK_S)
    if plan.ending == "raise":
        raise RuntimeError("the script gives up")
    if plan.ending == "exit":
        os._exit(3)
    tell(useful=pool.submit(pow, 2, 5).result(LIMIT_S) == 32)
    pool.shutdown()


def _tell_outcome(future: Any) -> None:
    at = monotonic()
    error = future.exception(0)
    left = [(each.pid, str(each.command)) for each in getattr(future, "leftovers", None) or ()]
    tell(outcome="result" if error is None else type(error).__name__, at=at, words=str(error), leftovers=left)


def pools_dropped(plan: Plan) -> None:
    """Make a pool, use it and drop it, over and over."""

    def one(number: int) -> None:
        pool = open_pool(plan, 1)
        future = pool.submit(abs, -number)
        if number % 2:
            pool.shutdown()
        assert future.result(LIMIT_S) == number
        del pool, future
        gc.collect()

    _count_around(one, plan.rounds)


def workers_killed(plan: Plan) -> None:
    """Kill the worker of one task after another."""
    from benchmarks import family_shapes as shapes

    pool = open_pool(plan, 1)
    never = str(Path(plan.folder, "never"))

    def one(number: int) -> None:
        future = pool.submit(shapes.await_file, never)
        _until(lambda: future.worker_pid is not None and future.running(), "the task runs")
        os.kill(future.worker_pid, signal.SIGKILL)
        assert type(future.exception(LIMIT_S)).__name__ == "WorkerDied"
        assert pool.submit(abs, -number).result(LIMIT_S) == number  # there is a worker again

    _count_around(one, plan.rounds)
    pool.shutdown()


def keepers_killed(plan: Plan) -> None:
    """Kill one keeper after another, while a task runs."""
    from benchmarks import family_shapes as shapes

    pool = open_pool(plan, 1)
    never = str(Path(plan.folder, "never"))

    def one(number: int) -> None:
        future = pool.submit(shapes.await_file, never)
        _until(future.running, "the task runs")
        os.kill(keeper_pid() or future.worker_pid, signal.SIGKILL)
        assert type(future.exception(LIMIT_S)).__name__ == "WorkerDied"
        assert pool.submit(abs, -number).result(LIMIT_S) == number  # there is a worker again

    _count_around(one, plan.rounds)
    pool.shutdown()


def _count_around(one: Any, rounds: int) -> None:
    """Play ``one`` so many times and tell what there is then that was not there after the first few."""
    warm = min(10, rounds)
    for number in range(warm):
        one(number)
    gc.collect()
    sleep(1.0)  # what is only slow to end is not a leak: what there is now is the measure
    before = census()
    for number in range(warm, warm + rounds):
        one(number)
    gc.collect()
    since = monotonic()
    while (left := grown(before, census())) and monotonic() < since + LIMIT_S / 2:
        sleep(0.05)  # the next worker may just be being forked in advance
    tell(grown=left)


def census() -> dict[str, int]:
    """How much there is of everything that could leak."""
    import psutil

    end = monotonic() + SPARE_S
    while True:
        family = psutil.Process().children(recursive=True)
        spare = sum(_name_of(process) == "safepool-spare" for process in family)
        if spare or keeper_pid() is None or monotonic() > end:
            break
        sleep(LOOK_S)
    sleep(SETTLED_S)  # the keeper has heard of it, and holds its channel
    found = {
        "processes": len(family) - spare,
        "forked in advance": max(1, spare),  # the next one may be on its way
        "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "shared memory": len(os.listdir("/dev/shm")),
        "temporary files": sum(len(files) + len(folders) for _, folders, files in os.walk(tempfile.gettempdir())),
    }
    if (keeper := keeper_pid()) is not None:
        with suppress(psutil.Error):
            found["descriptors of the keeper"] = psutil.Process(keeper).num_fds()
            found["threads of the keeper"] = psutil.Process(keeper).num_threads()
    return found


def _name_of(process: Any) -> str:
    with suppress(Exception):
        return str(process.name())
    return ""


def grown(before: dict[str, int], after: dict[str, int]) -> list[str]:
    return [f"{what}: {before[what]} -> {after[what]}" for what in before if after.get(what, 0) > before[what]]


def _until(condition: Any, what: str) -> None:
    end = monotonic() + LIMIT_S
    while not condition():
        if monotonic() > end:
            raise TimeoutError(what)
        sleep(LOOK_S)


def clean(plan: Plan) -> NoReturn:
    """What a user types after a crash."""
    os.execv(sys.executable, [sys.executable, "-m", "safepool", "clean", "--end", "kill"])


PROGRAMS = {
    program.__name__: program for program in (leave_families, pools_dropped, workers_killed, keepers_killed, clean)
}

if __name__ == "__main__":
    told = Plan(**json.loads(sys.argv[1]))
    if ENTERED not in os.environ:
        enter(told)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a script has none
    PROGRAMS[told.program](told)
