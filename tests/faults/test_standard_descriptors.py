"""Descriptors 0, 1 and 2 may be closed, missing or taken, here and in tasks: nothing is said into a channel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest

from safepool import SafePoolExecutor, WorkerDied
from tests.conftest import CONTEXTS
from tests.faults import tasks
from tests.pool import tasks as plain
from tests.pool.test_deaths import error_of, is_usable
from tests.support import LIMIT_S

MakePool = Callable[..., SafePoolExecutor]

SUBSETS = tuple(chain.from_iterable(combinations((0, 1, 2), n) for n in (1, 2, 3)))
ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, multiprocessing, os, sys
sys.path.insert(0, {root!r})
from safepool import SafePoolExecutor
from tests.faults import tasks

name, out, way = sys.argv[1:]
context = None if name == "default" else multiprocessing.get_context(name)
told = []
low = [os.open(os.devnull, os.O_RDWR) for _ in range(3)] if way == "freed later" else []
executor = SafePoolExecutor(2, context)
try:
    told.append([executor.submit(tasks.speak, n).result(20) for n in range(4)])
    for fd in low:
        os.close(fd)
    told.append(executor.submit(os._exit, 7).exception(20).exitcode)
    told.append([future.result(20) for future in [executor.submit(tasks.speak, n) for n in range(20)]])
    told.append(executor.submit(os._exit, 8).exception(20).exitcode)
    told.append(executor.submit(tasks.speak, "last").result(20))
    executor.shutdown()
except BaseException as error:
    told.append(repr(error))
    executor.kill_workers()
with open(out, "w") as file:
    json.dump(told, file)
"""


def run_with_closed(path: Path, closed: tuple[int, ...], name: str, way: str) -> tuple[int, Any]:
    """Run PROGRAM without the descriptors ``closed``; its exit code and what it told."""
    script, out = path / "script.py", path / "out"
    script.write_text(PROGRAM.format(root=str(ROOT)))
    closing = " ".join(f"{number}>&-" for number in closed)
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closing}', "sh", sys.executable, str(script), name, str(out), way],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=LIMIT_S,
        check=False,
    )
    return done.returncode, json.loads(out.read_text()) if out.exists() else None


EXPECTED = [[0, 1, 2, 3], 7, list(range(20)), 8, "last"]


@pytest.mark.parametrize("closed", SUBSETS, ids=repr)
@pytest.mark.parametrize("name", ["default", pytest.param("fork", marks=pytest.mark.slow)])
def test_a_program_without_standard_descriptors(tmp_path: Path, name: str, closed: tuple[int, ...]) -> None:
    """Started with some of 0, 1 and 2 closed, as daemons are: tasks run, print and die as ever."""
    assert run_with_closed(tmp_path, closed, name, "") == (0, EXPECTED)


@pytest.mark.parametrize("name", ["fork", "spawn", "forkserver"])
def test_a_program_without_any_standard_descriptor(tmp_path: Path, name: str) -> None:
    """The same for the other start methods, with all three closed."""
    assert run_with_closed(tmp_path, (0, 1, 2), name, "") == (0, EXPECTED)


@pytest.mark.parametrize("closed", [(0, 1), (1, 2), (0, 1, 2)], ids=repr)
@pytest.mark.parametrize("name", CONTEXTS)
def test_low_numbers_that_become_free_later(tmp_path: Path, name: str, closed: tuple[int, ...]) -> None:
    """0, 1 and 2 become free while the pool works: no later worker gets them as its channel, and prints into it."""
    assert run_with_closed(tmp_path, closed, name, "freed later") == (0, EXPECTED)


# ----------------------------------------------------------------- bad tasks


def test_a_task_that_closes_its_standard_descriptors(pool: MakePool, context: Any) -> None:
    """The worker of such a task goes on, and what later tasks print harms nobody."""
    for closed in ((1,), (0, 2), (0, 1, 2)):
        executor = pool(1, context)
        pid = executor.submit(os.getpid).result(LIMIT_S)
        assert executor.submit(tasks.close_standard, closed).result(LIMIT_S) == "closed"
        assert [executor.submit(tasks.speak, n).result(LIMIT_S) for n in range(3)] == [0, 1, 2]
        assert executor.submit(os.getpid).result(LIMIT_S) == pid
        executor.shutdown()


def test_a_task_that_has_no_streams_and_fails(pool: MakePool, context: Any) -> None:
    """Without sys.stdout and sys.stderr errors travel and deaths are told all the same."""
    executor = pool(1, context)
    assert executor.submit(tasks.drop_streams).result(LIMIT_S) == "dropped"
    assert executor.submit(tasks.speak, 1).result(LIMIT_S) == 1
    assert type(error_of(executor.submit(tasks.throw, ValueError))) is ValueError
    assert type(error_of(executor.submit(plain.a_lock))) is TypeError
    assert type(error_of(executor.submit(os._exit, 3))) is WorkerDied
    assert is_usable(executor)


def test_an_initializer_that_closes_everything_it_should_not(pool: MakePool, context: Any) -> None:
    """The same for an initializer; one that fails afterwards is still named."""
    executor = pool(1, context, tasks.close_standard, ((0, 1, 2),))
    assert executor.submit(tasks.speak, 1).result(LIMIT_S) == 1
    executor.shutdown()
    executor = pool(1, context, close_and_fail)
    assert "closed and failed" in str(error_of(executor.submit(tasks.speak, 1)))


def close_and_fail() -> None:
    tasks.close_standard((1, 2))
    tasks.drop_streams()
    raise ValueError("closed and failed")


# ------------------------------------------------------ odd streams at home


class Odd:
    """A stream of the user's making; ``how`` says what is odd about it."""

    def __init__(self, how: str) -> None:
        self._how = how

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        if self._how == "flush fails":
            raise RuntimeError("it cannot be flushed")

    def fileno(self) -> Any:
        if self._how == "no number":
            raise NotImplementedError
        return {"None": None, "a word": "one", "negative": -1}.get(self._how, 1)


ODD = ["flush fails", "no number", "None", "a word", "negative"]


@pytest.mark.parametrize("how", ODD)
def test_a_program_with_an_odd_stdout(pool: MakePool, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """What the program has put in the place of sys.stdout and sys.stderr does not keep workers from starting."""
    executor = pool(1)
    monkeypatch.setattr(sys, "stdout", Odd(how))
    monkeypatch.setattr(sys, "stderr", Odd(how))
    assert executor.submit(plain.echo, 1).result(LIMIT_S) == 1


def test_a_program_with_an_odd_stdout_under_every_start_method(
    pool: MakePool, context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same however workers are started, and for a program without streams."""
    for stream in (Odd("flush fails"), Odd("no number"), None):
        executor = pool(1, context)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", stream)
            assert executor.submit(plain.echo, 1).result(LIMIT_S) == 1
            executor.shutdown()
