"""After every test nothing is left of it: no process, zombie, thread, descriptor, shared memory or file."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, settings

from safepool import SafePoolExecutor, _os
from tests.support import LIMIT_S

GONE_S = 8.0  # from the end of a test until nothing may be left of it
SHARED = Path("/dev/shm")
OURS_IN_SHARED = ("sem.mp-", "sem.loky-", "pym-", "psm_", "loky", "safepool")
#: Processes that multiprocessing and loky start once and keep as long as the program runs.
HELPERS = ("multiprocessing.forkserver", "resource_tracker", "semaphore_tracker")
#: And safepool: one keeper, the process that workers are forked from, and the one that is forked in advance.
KEPT = ("safepool-keeper", "safepool-zygote", "safepool-spare")
CONTEXTS = ("default", "fork", "spawn", "forkserver")

# How long an example takes is the machine's affair; no test has more time than pytest-timeout gives it.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


# ------------------------------------------------------------------ the audit


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory for temporary files that only this session uses, so that whatever appears there is ours."""
    folder = tmp_path_factory.mktemp("t")  # a short name: sockets in it may have 107 characters
    with pytest.MonkeyPatch.context() as patch:
        # Where keepers are written down: what a test leaves to the next program is not for one of a test beside it.
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("r")))
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", None)
        yield folder


@pytest.fixture(scope="session")
def helpers(scratch: Path) -> None:
    """Have every helper process that is kept by design started before anybody counts."""
    for context in CONTEXTS:
        with SafePoolExecutor(1, _context(context)) as executor:
            assert executor.submit(pow, 2, 5).result(LIMIT_S) == 32
    multiprocessing.get_context("spawn").Lock()
    # Where there is no keeper, which some tests take away: multiprocessing's fork server, and our own one.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_os, "CAPABILITIES", frozenset({"fork"}))
        for context in ("default", "forkserver"):
            with SafePoolExecutor(1, _context(context)) as executor:
                assert executor.submit(pow, 2, 5).result(LIMIT_S) == 32
    from loky.backend import resource_tracker

    from safepool._os import memory

    resource_tracker.ensure_running()
    memory.take_reserve()  # a descriptor that a process keeps from its first big data on


@pytest.fixture(autouse=True)
def audit(helpers: None, scratch: Path) -> Iterator[None]:
    """Nothing is left of a test, a few seconds after it at the latest."""
    before = _census(scratch)
    yield
    end = monotonic() + GONE_S
    while (left := _census(scratch) - before) and monotonic() < end:
        sleep(0.02)
    _kill_leftovers(left)
    if left:
        pytest.fail("left over: " + "; ".join(sorted(f"{kind} {what}" for kind, what in left)), pytrace=False)


def _census(scratch: Path) -> set[tuple[str, str]]:
    """What exists now, as pairs of kind and words."""
    found = {("process", _words(process)) for process in _family()}
    found |= {("thread", f"{thread.name} ({thread.ident})") for thread in threading.enumerate()}
    found |= {("descriptor", words) for words in _descriptors()}
    found |= {("temporary file", path.name) for path in scratch.iterdir()}
    if not IS_ONE_OF_SEVERAL:
        found |= {("shared memory", name) for name in _shared_memory()}
    return found


def _shared_memory() -> set[str]:
    names = {path.name for path in SHARED.iterdir()} if SHARED.is_dir() else set()
    return {name for name in names if name.startswith(OURS_IN_SHARED)}


# Shared memory has no owner whom one could ask: where several processes run tests (pytest -n), what another one has
# cannot be told from what this one left.  Then it is looked at when all have ended.

IS_ONE_OF_SEVERAL = "PYTEST_XDIST_WORKER" in os.environ
before_all = pytest.StashKey[set[str]]()


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[before_all] = _shared_memory()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if IS_ONE_OF_SEVERAL:
        return
    end = monotonic() + GONE_S
    while (left := _shared_memory() - session.config.stash[before_all]) and monotonic() < end:
        sleep(0.02)
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\nERROR: left in {SHARED} when all tests had ended: {', '.join(sorted(left))}")


def _family() -> list[psutil.Process]:
    """All descendants of this process, zombies too, but for the helpers themselves."""
    me = psutil.Process()
    return [child for child in me.children(recursive=True) if not _is_helper(child)]


def _is_helper(process: psutil.Process) -> bool:
    # A worker that a fork server made has the server's command line, but not its parent.
    try:
        if process.name() in KEPT:
            return True
        words = " ".join(process.cmdline())
        is_tracker = "tracker" in words
        return any(helper in words for helper in HELPERS) and (is_tracker or process.ppid() == os.getpid())
    except psutil.Error:
        return False


def _words(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {process.status()} {' '.join(process.cmdline())[-100:]}"
    except psutil.Error:
        return f"{process.pid} zombie"


def _descriptors() -> Iterator[str]:
    folder = "/proc/self/fd"
    if not os.path.isdir(folder):
        return
    for number in os.listdir(folder):
        with suppress(OSError):  # the descriptor of the listing itself
            yield f"{number} -> {os.readlink(f'{folder}/{number}')}"


def _kill_leftovers(left: set[tuple[str, str]]) -> None:
    """The next test starts clean."""
    for process in _family():
        if ("process", _words(process)) in left:
            with suppress(psutil.Error):
                process.kill()


# ----------------------------------------------------------------- for tests


def _context(name: str) -> Any:
    return None if name == "default" else multiprocessing.get_context(name)


@pytest.fixture(params=CONTEXTS)
def context(request: pytest.FixtureRequest) -> Any:
    """Every way to start workers: the default (None) and multiprocessing's three."""
    return _context(request.param)


@pytest.fixture(params=[name for name in CONTEXTS if name != "fork"])
def retiring_context(request: pytest.FixtureRequest) -> Any:
    """Every way to start workers that allows ``max_tasks_per_child``."""
    return _context(request.param)


@pytest.fixture
def pool() -> Iterator[Callable[..., SafePoolExecutor]]:
    """Makes pools, and kills each of them at the end of the test."""
    made: list[SafePoolExecutor] = []

    def make(*args: Any, **kwargs: Any) -> SafePoolExecutor:
        made.append(SafePoolExecutor(*args, **kwargs))
        return made[-1]

    yield make
    for executor in made:
        thread = executor._executor_manager_thread
        executor.kill_workers()
        if thread is not None:
            thread.join(LIMIT_S)
            assert not thread.is_alive(), f"it does not end: {executor!r}"
