"""What is left of a task's processes, seen from outside: every shape of a family against every way to end it.

``python -m benchmarks.families [--shapes a,b] [--triggers a,b] [--start default,fork] [--uid N,M] [--repeat N]``.  The
exit code is 1 if a cell that must hold does not.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import monotonic, sleep
from typing import Any

from benchmarks.family_shapes import COMMAND, LIFE, SHAPES, SMALL, leave
from benchmarks.family_users import ROOT, Plan

GONE_S = 1.5  # from the trigger until nothing may be left
BOMB_GONE_S = 4.0
PROMISE_MS = 150.0  # from SIGKILL of the user's process to the last process of a small family
READY_S = 15.0  # for a family to be there
END_S = 10.0  # for a user's process to do as it is told
LOOK_S = 0.005
LONG_LIFE_S = "1200"  # of a bystander that nobody ends
NOBODY = 65534
TIMEOUT_S, LONG_TIMEOUT_S = 0.6, 2.0
STARTS = ("default", "fork", "spawn", "forkserver")
ISOLATIONS = ("none", "namespace")
OK, LEFT, ALLOWED, WRONG, NA = "ok", "LEFT", "left", "wrong", "n/a"
WORST_FIRST = (WRONG, LEFT, ALLOWED, OK, NA)

#: How the user's process ends -> what its exit status is then.
USER_ENDS = {
    "user SIGKILL": (-signal.SIGKILL,),
    "user SIGTERM": (-signal.SIGTERM,),
    "user os._exit": (3,),
    "user raises": (1,),
    "user Ctrl-C": (-signal.SIGINT, 1, 130),
    "keeper then user": (-signal.SIGKILL,),
    "keeper and user": (-signal.SIGKILL,),
}
#: How a task ends -> what its future comes to.
TASK_ENDS = {
    "return": "result",
    "return at once": "result",
    "timeout": "TaskTimeout",
    "worker SIGKILL": "WorkerDied",
    "keeper SIGKILL": "WorkerDied",
}
TRIGGERS = (*TASK_ENDS, *USER_ENDS)
NEED_KEEPER = ("keeper SIGKILL", "keeper then user", "keeper and user")
WITH_CHILDREN = ("keeper SIGKILL", "keeper then user")  # the same, and workers must be its children
LEAKS = ("pools_dropped", "workers_killed", "keepers_killed")


@dataclass(frozen=True)
class Case:
    """One cell of the table."""

    shape: str
    trigger: str
    start: str = "default"
    uid: int | None = None  # None: as we are
    isolation: str = "none"

    @property
    def limit_s(self) -> float:
        return BOMB_GONE_S if SHAPES[self.shape].is_bomb else GONE_S

    @property
    def must_hold(self) -> bool:
        """With the keeper gone somebody has to look for the family, and two of them may outrun that.

        So it is always where workers are forked from the user's own process: their orphans are not the keeper's, and
        they may be there before the keeper is known to others.
        """
        looks = self.trigger in ("keeper SIGKILL", "keeper then user", "keeper and user") and self.isolation == "none"
        if self.start == "fork" and self.trigger == "keeper and user":
            return False
        return not ((looks or self.start == "fork") and SHAPES[self.shape].outruns)

    def __str__(self) -> str:
        words = [self.shape, self.trigger, self.start, *([] if self.uid is None else [f"uid {self.uid}"])]
        return ", ".join([*words, *([] if self.isolation == "none" else [self.isolation])])


@dataclass
class Cell:
    """What one run of a case came to; ``ms``: from the trigger to the last process of the family."""

    case: Case
    verdict: str = OK
    ms: float | None = None
    all_ms: float | None = None  # to the last process of all, workers and keeper too
    left: int = 0
    evidence: list[str] = field(default_factory=list)

    def fail(self, verdict: str, words: str) -> None:
        self.verdict = min(self.verdict, verdict, key=WORST_FIRST.index)
        self.evidence.append(words)

    def __str__(self) -> str:
        if self.verdict in (LEFT, ALLOWED):
            return f"{self.verdict} {self.left}"
        return f"ok {self.ms:.0f}" if self.verdict == OK and self.ms is not None else self.verdict


class NotReady(Exception):
    """The family was not there in time: this says nothing about who ends it."""


# ------------------------------------------------------------- seen from outside


class Watch:
    """Sees the end of processes from outside, to the millisecond: of a family by its FIFO, of others by their pidfd."""

    def __init__(self) -> None:
        self.gone: dict[str, float] = {}  # by name: when its last process was gone
        self.ready = 0  # members of the newest family that said so
        self.told: list[dict[str, Any]] = []
        self._poll = select.poll()
        self._names: dict[int, str] = {}
        self._rest = b""

    def family(self, name: str, path: Path) -> None:
        """Watch a family that will hold this FIFO open."""
        self.ready = 0
        self._add(name, os.open(path, os.O_RDONLY | os.O_NONBLOCK))

    def process(self, name: str, pid: int) -> None:
        try:
            self._add(name, os.pidfd_open(pid))
        except ProcessLookupError:
            self.gone[name] = monotonic()

    def words(self, fd: int) -> None:
        """Read what a user's process tells."""
        self._add("", os.dup(fd))

    def is_gone(self, name: str) -> bool:
        return name in self.gone

    def until(self, condition: Callable[[], object], limit_s: float) -> bool:
        """Look until the condition holds; did it within the limit?"""
        end = monotonic() + limit_s
        while not condition():
            rest = end - monotonic()
            if rest <= 0:
                return False
            for fd, events in self._poll.poll(min(rest, LOOK_S) * 1000):
                self._look(fd, events, monotonic())
        return True

    def _look(self, fd: int, events: int, now: float) -> None:
        name = self._names[fd]
        data = b""
        if not name or name.startswith("family"):
            with suppress(BlockingIOError):
                data = os.read(fd, 1 << 16)
            if data and name:
                self.ready += len(data)
            elif data:
                *lines, self._rest = (self._rest + data).split(b"\n")
                self.told += map(json.loads, lines)
            if data or not events & (select.POLLHUP | select.POLLERR):
                return
        if name:
            self.gone[name] = now
        self._drop(fd)

    def _add(self, name: str, fd: int) -> None:
        self._names[fd] = name
        self._poll.register(fd, select.POLLIN)

    def _drop(self, fd: int) -> None:
        self._poll.unregister(fd)
        os.close(fd)
        del self._names[fd]

    def close(self) -> None:
        for fd in tuple(self._names):
            self._drop(fd)


def holders(path: Path) -> list[int]:
    """The processes that hold this file open, as far as we may see."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            with suppress(OSError):
                fds = os.listdir(f"/proc/{entry}/fd")
                if any(_link(f"/proc/{entry}/fd/{fd}") == str(path) for fd in fds):
                    found.append(int(entry))
    return found


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def end_holders(path: Path) -> None:
    """End every process that holds this file open, until there is none; what outruns this ends by itself."""
    for _ in range(200):
        pids = holders(path)
        for pid in pids:
            with suppress(ProcessLookupError):
                handle = os.pidfd_open(pid)
                try:
                    if any(_link(f"/proc/{pid}/fd/{fd}") == str(path) for fd in os.listdir(f"/proc/{pid}/fd")):
                        signal.pidfd_send_signal(handle, signal.SIGKILL)
                except OSError:
                    pass
                finally:
                    os.close(handle)
        if not pids:
            return


class Leaf:
    """A cgroup of its own for one cell, where this machine allows that; ``path`` is None where it does not."""

    def __init__(self) -> None:
        self.path: Path | None = None
        with suppress(OSError):
            mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
            top = next((Path(words[1]) for words in mounts if words[2] == "cgroup2"), None)
            lines = Path("/proc/self/cgroup").read_text().splitlines()
            mine = next((line[3:] for line in lines if line.startswith("0::")), None)
            if top is not None and mine is not None:
                path = top / mine.lstrip("/") / f"family-{uuid.uuid4().hex}"
                path.mkdir()
                self.path = path

    def pids(self) -> list[int]:
        if self.path is None:
            return []
        return [int(word) for word in (self.path / "cgroup.procs").read_text().split()]

    def close(self) -> None:
        """End all that is in it."""
        if self.path is None:
            return
        end = monotonic() + END_S
        while monotonic() < end:
            with suppress(OSError):
                (self.path / "cgroup.kill").write_text("1")
            with suppress(OSError):
                self.path.rmdir()
                return
            sleep(LOOK_S)


def describe(pids: Sequence[int]) -> str:
    words = []
    for pid in pids[:5]:
        with suppress(OSError, IndexError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            words.append(f"{pid} {stat[0]} parent {stat[1]} {command[:90].strip()}")
    return "; ".join([*words, *(["..."] if len(pids) > 5 else [])])


# ------------------------------------------------------------- a user's process


class User:
    """A user's process, in a folder and, if there are any, a cgroup of its own; ``close()`` ends all it started."""

    def __init__(self, program: str, uid: int | None = None, **plan: Any) -> None:
        # Not where temporary files go: another user may not reach that.
        self.folder = Path(tempfile.mkdtemp(prefix="family-", dir="/tmp"))
        self.leaf = Leaf()
        self.watch = Watch()
        self.fifos: list[Path] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._plan = Plan(program, str(self.folder), uid=uid, **plan)
        if self.leaf.path is not None:
            self._plan.cgroup = str(self.leaf.path)
        self.folder.chmod(0o755)
        (self.folder / "tmp").mkdir()
        if uid is not None:
            for place in (self.folder, self.folder / "tmp"):
                os.chown(place, uid, uid)

    def add_fifo(self) -> None:
        path = self.folder / f"fifo-{len(self.fifos)}"
        os.mkfifo(path)
        path.chmod(0o666)
        self.fifos.append(path)
        self._plan.fifos.append(str(path))

    def start(self) -> None:
        self._process = self._run(self._plan, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.watch.process("user", self._process.pid)
        self.watch.words(self._process.stdout.fileno())

    def clean(self) -> str:
        """Run ``safepool clean`` as that user; what is wrong with it, in words."""
        plan = Plan(**{**asdict(self._plan), "program": "clean"})
        process = self._run(plan, stdout=subprocess.DEVNULL)
        try:
            return "" if process.wait(END_S) == 0 else f"clean: exit code {process.returncode}: {self.errors()}"
        except subprocess.TimeoutExpired:
            return f"clean does not end within {END_S:g} s"
        finally:
            process.kill()
            process.wait()

    def _run(self, plan: Plan, stdout: int) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
        tmp = str(self.folder / "tmp")
        environ = {**os.environ, "PYTHONPATH": path, "TMPDIR": tmp, "HOME": tmp, "XDG_RUNTIME_DIR": tmp}
        with (self.folder / "stderr").open("ab") as errors:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", f"{ROOT}/benchmarks/family_users.py", json.dumps(asdict(plan))],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=errors,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def told(self, what: str) -> Any:
        """The newest that it told of this; None: nothing."""
        return next((facts[what] for facts in reversed(self.watch.told) if what in facts), None)

    def tell(self, name: str) -> float:
        """Make the file ``name``; when that was."""
        (self.folder / name).touch()
        return monotonic()

    def exitcode(self) -> int | None:
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(END_S)
        return None

    def errors(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace").strip()[-3000:]

    def close(self) -> None:
        """End everything, whatever became of it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(END_S)
            assert self._process.stdout is not None
            self._process.stdout.close()
        self.leaf.close()
        for path in self.fifos:
            end_holders(path)
        self.watch.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def a_user(program: str, uid: int | None = None, **plan: Any) -> Iterator[User]:
    user = User(program, uid, **plan)
    try:
        yield user
    finally:
        user.close()


# --------------------------------------------------------------------- one cell


def run_case(case: Case) -> Cell:
    """Play one case in processes of its own; a family that was not there in time gets more of it."""
    if (reason := not_offered(case)) is not None:
        return Cell(case, NA, evidence=[reason])
    words = ""
    for slowness in (1, 3):
        try:
            return _run(case, slowness)
        except NotReady as error:
            words = str(error)
    return Cell(case, WRONG, evidence=[words])


def not_offered(case: Case) -> str | None:
    """Why a case cannot be played here; None: it can."""
    import safepool

    if case.uid is not None and os.geteuid() != 0:
        return "only root can be another user"
    parameters = inspect.signature(safepool.SafePoolExecutor).parameters
    if case.isolation != "none" and "isolation" not in parameters:
        return "the pool has no isolation"
    if case.trigger in WITH_CHILDREN and case.start == "fork":
        return "workers are not children of the keeper"
    if case.trigger in NEED_KEEPER and find_spec("safepool._keep") is None:
        return "the pool has no keeper"
    if case.trigger == "keeper and user" and case.isolation == "none" and not _has_clean():
        return "there is no safepool clean"
    return None


@cache
def _has_clean() -> bool:
    command = [sys.executable, "-m", "safepool", "clean", "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=END_S).returncode == 0


def _run(case: Case, slowness: int) -> Cell:
    shape = SHAPES[case.shape]
    timeout = None
    if case.trigger == "timeout":
        timeout = slowness * (LONG_TIMEOUT_S if shape.is_bomb else TIMEOUT_S)
    options = {} if case.isolation == "none" else {"isolation": case.isolation}
    ending = {"user os._exit": "exit", "user raises": "raise"}.get(case.trigger, "shutdown")
    plan = {"shape": case.shape, "start": case.start, "timeout": timeout, "options": options, "ending": ending}
    with a_user("leave_families", case.uid, **plan) as user:
        if case.trigger.startswith("return"):
            user._plan.go = str(user.folder / "go") if case.trigger == "return" else ""
        cell = Cell(case)
        rounds = 2 if case.trigger == "keeper then user" else 1
        for number in range(rounds):
            user.add_fifo()
            user.watch.family(f"family {number}", user.fifos[-1])
        user.start()
        for number in range(rounds):
            if not _await_family(user, cell, number):
                return cell
            if number < rounds - 1:
                _kill(user.told("keeper"))
        began = _pull(case, user)
        if case.trigger in TASK_ENDS:
            _judge_task_end(cell, user, began)
        else:
            _judge_user_end(cell, user, began)
        if cell.verdict == WRONG and (words := user.errors()):
            cell.evidence.append(f"its stderr: {words}")
        return cell


def _await_family(user: User, cell: Cell, number: int) -> bool:
    """Wait for a whole family; False: the cell has failed."""
    watch, wanted = user.watch, SHAPES[cell.case.shape].members
    soon = ("timeout", "return at once")  # a family that may be ended before it is whole

    def is_there() -> bool:
        is_whole = watch.ready >= wanted or (number < len(user.fifos) - 1 and watch.is_gone(f"family {number}"))
        is_over = cell.case.trigger in soon and user.told("outcome") is not None
        count = sum("worker" in facts for facts in watch.told)
        return (is_whole or is_over) and count > number

    if not watch.until(lambda: is_there() or watch.is_gone("user"), READY_S):
        raise NotReady(f"{watch.ready} of {wanted} members after {READY_S:g} s")
    if watch.is_gone("user"):
        cell.fail(WRONG, f"the user's process ended too soon: {user.errors()}")
        return False
    if cell.case.trigger == "timeout" and watch.ready < wanted:
        raise NotReady(f"{watch.ready} of {wanted} members when the task was over")
    if cell.case.trigger in NEED_KEEPER and user.told("keeper") is None:
        cell.fail(WRONG, "there is no keeper")
        return False
    for pid in user.told("workers"):
        watch.process(f"worker {pid}", pid)
    if (keeper := user.told("keeper")) is not None:
        watch.process(f"keeper {keeper}", keeper)
    watch.ready = 0
    return True


def _kill(pid: int) -> float:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return monotonic()


def _pull(case: Case, user: User) -> float | None:
    """Pull the trigger; when that was, None: that is still to be seen."""
    if case.trigger == "return":
        return user.tell("go")
    if case.trigger == "worker SIGKILL":
        return _kill(user.told("worker"))
    if case.trigger == "keeper SIGKILL":
        return _kill(user.told("keeper"))
    if case.trigger == "keeper and user":
        _kill(user.told("keeper"))
    if case.trigger in ("user SIGKILL", "keeper then user", "keeper and user"):
        return _kill(user.pid)
    if case.trigger == "user SIGTERM":
        os.kill(user.pid, signal.SIGTERM)
    elif case.trigger == "user Ctrl-C":
        os.killpg(user.pid, signal.SIGINT)
    elif case.trigger in ("user os._exit", "user raises"):
        user.tell("end")
    return None


def _judge_task_end(cell: Cell, user: User, began: float | None) -> None:
    """The task is over: so is its family, the pool goes on, and nothing is left when it is shut down."""
    case, watch = cell.case, user.watch
    if not watch.until(lambda: user.told("outcome") is not None, END_S):
        cell.fail(WRONG, "the future is not done")
        return
    if user.told("outcome") != TASK_ENDS[case.trigger]:
        cell.fail(WRONG, f"the future has {user.told('outcome')}: {user.told('words')}")
    began = user.told("at") if began is None else began
    _see_family_gone(cell, user, began)
    user.tell("end")
    if not watch.until(lambda: watch.is_gone("user"), END_S):
        cell.fail(WRONG, "the user's process does not end")
        return
    _see_exit(cell, user, (0,))
    if not user.told("useful"):
        cell.fail(WRONG, "the pool is of no use afterwards")
    if cell.verdict == OK:
        _see_all_gone(cell, user, monotonic())


def _judge_user_end(cell: Cell, user: User, began: float | None) -> None:
    """The user's process is gone: so is everything."""
    case, watch = cell.case, user.watch
    if not watch.until(lambda: watch.is_gone("user"), END_S):
        cell.fail(WRONG, "the user's process does not end")
        return
    began = watch.gone["user"] if began is None else began
    _see_exit(cell, user, USER_ENDS[case.trigger])
    if case.trigger == "keeper and user" and case.isolation == "none":
        if words := user.clean():
            cell.fail(WRONG, words)
        began = monotonic()
    _see_family_gone(cell, user, began)
    if cell.verdict == OK:
        _see_all_gone(cell, user, began)


def _see_exit(cell: Cell, user: User, wanted: tuple[int, ...]) -> None:
    code = user.exitcode()
    if code not in wanted:
        cell.fail(WRONG, f"the user's process ended with {code}, not {wanted[0]}")


def _see_family_gone(cell: Cell, user: User, began: float) -> None:
    watch = user.watch
    names = [f"family {number}" for number in range(len(user.fifos))]
    if watch.until(lambda: all(map(watch.is_gone, names)), began + cell.case.limit_s - monotonic()):
        cell.ms = max(0.0, max(watch.gone[name] for name in names) - began) * 1000
        return
    pids = [pid for path in user.fifos for pid in holders(path)]
    cell.left = max(1, len(pids))  # who is fast is not always seen
    cell.fail(LEFT if cell.case.must_hold else ALLOWED, f"left of the family: {describe(pids)}")


def _see_all_gone(cell: Cell, user: User, began: float) -> None:
    """Workers, keeper and helpers too: by their pidfds, and by the cgroup, which misses nobody."""
    watch = user.watch
    end = began + cell.case.limit_s
    known = {f"{kind} {pid}": pid for kind, pid in _known(user)}
    watch.until(lambda: all(map(watch.is_gone, known)), end - monotonic())
    pids = [pid for name, pid in known.items() if not watch.is_gone(name)]
    if not pids:
        cell.all_ms = max(0.0, max([watch.gone[name] for name in known], default=began) - began) * 1000
        cell.all_ms = max(cell.all_ms, cell.ms or 0.0)
        watch.until(lambda: not user.leaf.pids(), end - monotonic())
        pids = user.leaf.pids()
    if pids:
        cell.left = len(pids)
        cell.fail(LEFT if cell.case.must_hold else ALLOWED, f"left beside the family: {describe(pids)}")


def _known(user: User) -> Iterator[tuple[str, int]]:
    for facts in user.watch.told:
        if "worker" in facts:
            yield from (("worker", pid) for pid in facts["workers"])
            if facts["keeper"] is not None:
                yield "keeper", facts["keeper"]


# ------------------------------------------------------------------- bystanders


def bystanders(rounds: int, start: str = "default") -> list[str]:
    """Processes like the leftovers, by name, user and command line, and not of the pool; who of them was touched.

    Two live as long as the pool, one of them an orphan; one more comes in each round, while leftovers are being ended.
    Every round ends its task in another way.
    """
    import multiprocessing

    from safepool import SafePoolExecutor

    folder = Path(tempfile.mkdtemp(prefix="family-"))
    os.mkfifo(folder / "fifo")
    pool = SafePoolExecutor(2, None if start == "default" else multiprocessing.get_context(start))
    kept = _bystander()
    orphan = _orphan()
    found: list[str] = []
    try:
        for number in range(rounds):
            how = ("return", "timeout", "worker SIGKILL", "keeper SIGKILL")[number % 4]
            found += [f"round {number}, {how}: {words}" for words in _beside_a_bystander(pool, how, folder, number)]
            if kept.poll() is not None or select.select([orphan], [], [], 0)[0]:
                return [*found, f"round {number}, {how}: one of those that are kept is gone"]
        return found
    finally:
        pool.kill_workers()
        kept.kill()
        kept.wait()
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(orphan, signal.SIGKILL)
        os.close(orphan)
        end_holders(folder / "fifo")
        shutil.rmtree(folder)


def _beside_a_bystander(pool: Any, how: str, folder: Path, number: int) -> Iterator[str]:
    """One round; what is wrong, in words."""
    from safepool import TaskTimeout, WorkerDied

    watch = Watch()
    watch.family("family", folder / "fifo")
    fresh = None
    go = folder / ("never" if how != "return" else f"go-{number}")
    view = pool.options(timeout=TIMEOUT_S) if how == "timeout" else pool
    try:
        future = view.submit(leave, "grandchild", str(folder / "fifo"), str(go))
        watch.until(lambda: watch.ready >= SHAPES["grandchild"].members or future.done(), READY_S)
        if watch.ready == 0:
            yield f"there were no leftovers, but {future!r}"
            return
        _end_task(how, future, go)
        fresh = _bystander()
        error = future.exception(END_S)
        if not isinstance(error, {"return": type(None), "timeout": TaskTimeout}.get(how, WorkerDied)):
            yield f"the future has {error!r}"
        if not watch.until(lambda: watch.is_gone("family"), GONE_S):
            yield f"leftovers are left: {describe(holders(folder / 'fifo'))}"
            end_holders(folder / "fifo")
        if fresh.poll() is not None:
            yield f"the fresh bystander ended with {fresh.returncode}"
    finally:
        watch.close()
        if fresh is not None:
            fresh.kill()
            fresh.wait()


def _bystander() -> subprocess.Popen[bytes]:
    nowhere = subprocess.DEVNULL
    return subprocess.Popen([*COMMAND, "wait"], stdin=nowhere, stdout=nowhere, env={**os.environ, LIFE: LONG_LIFE_S})


def _orphan() -> int:
    """The same, of which we are not the parent; its pidfd."""
    words = f"exec 3>&1; {' '.join(COMMAND)} wait >/dev/null 3>&- & echo $! >&3"
    environ = {**os.environ, LIFE: LONG_LIFE_S}
    done = subprocess.run(["/bin/sh", "-c", words], stdout=subprocess.PIPE, check=True, timeout=END_S, env=environ)
    return os.pidfd_open(int(done.stdout))


def _end_task(how: str, future: Any, go: Path) -> None:
    if how == "return":
        go.touch()
    elif how == "worker SIGKILL":
        _kill(future.worker_pid)
    elif how == "keeper SIGKILL":
        from benchmarks.family_users import keeper_pid

        _kill(keeper_pid() or future.worker_pid)


# ------------------------------------------------------------------------ leaks


def leaks(program: str, rounds: int, start: str = "default", limit_s: float = 600.0) -> list[str]:
    """Play one of ``LEAKS`` so many times in a process of its own; what has grown, in words."""
    with a_user(program, rounds=rounds, start=start) as user:
        user.start()
        if not user.watch.until(lambda: user.watch.is_gone("user"), limit_s):
            return [f"not over within {limit_s:g} s"]
        found = user.told("grown")
        if found is None or user.exitcode() != 0:
            return [f"it failed with {user.exitcode()}: {user.errors()}"]
        user.watch.until(lambda: not user.leaf.pids(), GONE_S)
        return found + [f"left after its end: {describe(user.leaf.pids())}" for _ in user.leaf.pids()[:1]]


# ------------------------------------------------------------------ all of them


def worst(cells: Sequence[Cell]) -> Cell:
    """Repeats of a cell as one: the worst verdict, the median of the times."""
    found = min(cells, key=lambda cell: WORST_FIRST.index(cell.verdict))
    times = [cell.ms for cell in cells if cell.verdict == OK and cell.ms is not None]
    return Cell(found.case, found.verdict, median(times) if times else None, None, max(cell.left for cell in cells))


def latencies(cells: Sequence[Cell]) -> tuple[str, bool]:
    """SIGKILL of the user's process to the last process gone, of small families; is the promise kept?"""
    chosen = [c for c in cells if c.case.trigger == "user SIGKILL" and c.case.shape in SMALL and c.verdict == OK]
    family = [cell.ms for cell in chosen if cell.ms is not None]
    everything = [cell.all_ms for cell in chosen if cell.all_ms is not None]
    if not family or not everything:
        return "", True
    words = [
        f"user SIGKILL to the last process gone, small families, {len(chosen)} runs:",
        f"family median {median(family):.0f} ms, max {max(family):.0f} ms;",
        f"workers and keeper too median {median(everything):.0f} ms, max {max(everything):.0f} ms",
        f"(promise: {PROMISE_MS:g} ms)",
    ]
    return " ".join(words), median(everything) <= PROMISE_MS


def _names(text: str, allowed: Sequence[str], what: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := set(names) - set(allowed):
        raise SystemExit(f"no such {what}: {', '.join(sorted(unknown))}; there are {', '.join(allowed)}")
    return names


def _line(head: str, words: Sequence[str]) -> None:
    print(f"{head:12}" + "".join(f"{word:>{max(12, len(word) + 2)}}" for word in words), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description="What is left of a family.")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--triggers", default=",".join(TRIGGERS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--start", default="default", help=f"comma-separated, of {', '.join(STARTS)}")
    parser.add_argument("--uid", default="", help=f"comma-separated numbers, e.g. 0,{NOBODY} (default: as you are)")
    parser.add_argument("--isolation", default="none", help=f"comma-separated, of {', '.join(ISOLATIONS)}")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each cell; the worst counts")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time; more than one spoils the times")
    parser.add_argument("--bystanders", type=int, default=0, metavar="N", help="then N rounds beside bystanders")
    parser.add_argument("--leaks", type=int, default=0, metavar="N", help="then N pools dropped and N workers killed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run of every cell there")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that cells are ended, too
    logging.getLogger("concurrent.futures").setLevel(logging.ERROR)  # that there are leftovers is no news here

    shapes = _names(options.shapes, tuple(SHAPES), "shape") if options.shapes else []
    triggers = _names(options.triggers, TRIGGERS, "trigger") if options.triggers else []
    starts = _names(options.start, STARTS, "start method")
    isolations = _names(options.isolation, ISOLATIONS, "isolation")
    uids = [None if int(uid) == os.geteuid() else int(uid) for uid in options.uid.split(",")] if options.uid else [None]
    cores = len(os.sched_getaffinity(0))
    print(f"Python {platform.python_version()}, {platform.platform()}, {cores} cores, load {os.getloadavg()[0]:.1f}")
    print(
        "ok N: all gone after N ms; LEFT N: so many are left; left N: the same where it may be; n/a: not offered here"
    )

    cells: list[Cell] = []
    with ThreadPoolExecutor(options.jobs) as threads:
        try:
            for start, uid, isolation in ((s, u, i) for s in starts for u in uids for i in isolations):
                who = f"uid {os.geteuid() if uid is None else uid}"
                print(f"\nstart {start}, {who}, isolation {isolation}", flush=True)
                _line("", triggers)
                for shape in shapes:
                    cases = [Case(shape, trigger, start, uid, isolation) for trigger in triggers]
                    futures = [[threads.submit(run_case, case) for _ in range(options.repeat)] for case in cases]
                    row = [[future.result() for future in of_one] for of_one in futures]
                    cells += (cell for of_one in row for cell in of_one)
                    widths = [max(12, len(trigger) + 2) for trigger in triggers]
                    words = [f"{worst(of_one)!s:>{width}}" for of_one, width in zip(row, widths)]
                    print(f"{shape:12}" + "".join(words), flush=True)
        finally:
            threads.shutdown(cancel_futures=True)

    failed = [cell for cell in cells if cell.verdict in (LEFT, WRONG)]
    for cell in failed:
        print(f"\n{cell.case}: {cell}")
        print("\n".join(f"    {line}" for words in cell.evidence for line in words.splitlines()))
    words, is_kept = latencies(cells)
    if words:
        print(f"\n{words}")
    faults = [] if is_kept else ["the median is over the promise"]
    for start in starts:
        if options.bystanders:
            faults += (found := bystanders(options.bystanders, start))
            print(f"{options.bystanders} rounds beside bystanders, start {start}: {found or 'never touched'}")
        for program in LEAKS if options.leaks else ():
            faults += (found := leaks(program, options.leaks, start))
            print(f"{options.leaks} rounds of {program}, start {start}: {found or 'flat'}")
    if options.json:
        options.json.write_text(json.dumps([asdict(cell) for cell in cells], indent=1))
    return 1 if failed or faults else 0


if __name__ == "__main__":
    sys.exit(main())
