"""A keeper may be killed like anything else; nobody else is touched, and nothing accumulates, however often."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import psutil
import pytest

from benchmarks.families import LEAKS, STARTS, bystanders, leaks
from benchmarks.family_shapes import await_file
from benchmarks.family_users import census, grown, keeper_pid
from safepool import SafePoolExecutor, WorkerDied
from tests.support import LIMIT_S, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process adopt orphans")

GONE_S = 8.0
FEW, MANY = 50, 1000
LONG = [pytest.mark.slow, pytest.mark.timeout(1200)]
Make = Callable[..., SafePoolExecutor]


@pytest.fixture(autouse=True)
def audit(helpers: None) -> Iterator[None]:
    """In the place of that for other tests: a new keeper brings new descriptors for old ones, so all is counted."""
    before = census()
    yield
    end = monotonic() + GONE_S
    while (left := grown(before, census())) and monotonic() < end:
        sleep(0.02)  # the next worker may just be being forked in advance
    assert left == []


def test_the_pool_goes_on_when_its_keeper_is_killed(pool: Make, tmp_path: Path) -> None:
    """Only what ran then fails, as by the death of its worker; later tasks have a new keeper."""
    executor = pool(2)
    assert executor.submit(pow, 2, 5).result(LIMIT_S) == 32
    keepers = set()
    for _ in range(3):
        running = executor.submit(await_file, str(tmp_path / "never"))
        until(running.running, "the task runs")
        keeper = keeper_pid()
        assert keeper is not None
        keepers.add(keeper)
        os.kill(keeper, signal.SIGKILL)
        assert isinstance(running.exception(LIMIT_S), WorkerDied)
        assert [executor.submit(abs, -n).result(LIMIT_S) for n in range(10)] == [*range(10)]
    assert len(keepers) == 3


def test_one_keeper_serves_all_pools(pool: Make) -> None:
    """Two pools at once have one keeper, which is the parent of their workers."""
    workers = [pool(1).submit(os.getpid).result(LIMIT_S) for _ in range(2)]
    assert {psutil.Process(worker).ppid() for worker in workers} == {keeper_pid()}


def _rounds(few: int) -> list[Any]:
    return [few, pytest.param(MANY, marks=LONG)]


def _starts() -> list[Any]:
    return [start if start == "default" else pytest.param(start, marks=LONG) for start in STARTS]


@pytest.mark.parametrize("rounds", _rounds(20))
def test_bystanders_are_never_touched(rounds: int) -> None:
    """Processes of the same name, user and command line as leftovers live on, however the leftovers are ended."""
    assert bystanders(rounds) == []


@pytest.mark.parametrize("start", _starts())
@pytest.mark.parametrize("rounds", _rounds(FEW))
@pytest.mark.parametrize("program", LEAKS)
def test_nothing_accumulates(program: str, rounds: int, start: str) -> None:
    """Processes, threads, descriptors, shared memory and files are as many after it as before, the keeper's too."""
    assert leaks(program, rounds, start, limit_s=100.0 if rounds == FEW else 1100.0) == []
