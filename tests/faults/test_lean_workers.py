"""A worker that has loaded next to nothing yet answers all the same, whatever its first task does to it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from safepool import TaskUnreadable, _payload, _wire
from safepool._wire import Frame
from safepool._worker import Setup
from tests.support import LIMIT_S, ByHand, run_script, words_and_value

ROOT = Path(__file__).parents[2]
BE_A_WORKER = """
import sys
from safepool import _os, _worker
channel, answers = map(int, sys.argv[1:])
_worker.main(_os.Ends(_os.socket_of(channel), _os.End(answers), None))
"""
LOADED = "sorted(__import__('sys').modules)"
USE_UP_DESCRIPTORS = """
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
try:
    while True:
        os.dup(1)
except OSError:
    pass
"""
LOSE_MODULES = "import sys; sys.path.clear(); sys.path_importer_cache.clear(); sys.meta_path.clear()"
RAISE = "\nraise ValueError('words')"


class LeanWorker(ByHand):
    """One in a fresh interpreter that has imported ``_worker`` alone, as the first worker of a program."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        fds = self.ends.channel.fileno(), self.ends.answers.fileno()
        command = [sys.executable, "-c", BE_A_WORKER, *map(str, fds)]
        self.process = subprocess.Popen(command, pass_fds=fds, cwd=ROOT)
        self.ends.close()
        self._calls = 0
        self.channel.sendall(_wire.encode(Frame(_wire.SETUP, body=_payload.dumps((dict(os.environ), setup)))))
        assert [self.hear().kind for _ in range(2)] == [_wire.BOOTED, _wire.READY]

    def send(self, fn: Any, *args: Any) -> None:
        self._calls += 1
        self.post(self._calls, fn, *args)

    def answer(self) -> Frame:
        """Of one task whose beginning is told by a frame of its own."""
        assert self.hear().kind == _wire.BEGAN
        return self.hear()

    def call(self, fn: Any, *args: Any) -> Frame:
        self.send(fn, *args)
        return self.answer()

    def end(self) -> None:
        self.close()
        assert self.process.wait(LIMIT_S) == 0


@pytest.fixture
def lean() -> Iterator[Callable[..., LeanWorker]]:
    made: list[LeanWorker] = []

    def make(*setup: Any) -> LeanWorker:
        made.append(LeanWorker(Setup(*setup)))
        return made[-1]

    yield make
    for worker in made:
        worker.end()


def test_it_loads_the_rest_after_its_first_answer(lean: Callable[..., LeanWorker]) -> None:
    """The first task finds nothing that only errors need; before the second one it is there, even if that waits."""
    worker = lean()
    worker.send(eval, LOADED)
    worker.send(eval, LOADED)
    first, second = worker.answer(), worker.answer()
    assert not first.kind & _wire.NEXT
    later, never = {"traceback", "tokenize", "safepool._payload"}, {"logging", "multiprocessing", "safepool.errors"}
    assert not (later | never) & {*words_and_value(first)[1]}
    assert later <= {*words_and_value(second)[1]}
    assert not never & {*words_and_value(second)[1]}


def test_it_loads_the_rest_before_an_initializer(lean: Callable[..., LeanWorker]) -> None:
    """An initializer may take all descriptors too."""
    answer = lean(exec, (USE_UP_DESCRIPTORS,)).call(exec, RAISE)
    text, error = words_and_value(answer)
    assert repr(error) == "ValueError('words')"
    assert b"Traceback" in text
    assert b"_worker.py" in text


@pytest.mark.parametrize("loss", [USE_UP_DESCRIPTORS, LOSE_MODULES], ids=["descriptors", "modules"])
def test_the_first_task_can_load_nothing_and_raises(lean: Callable[..., LeanWorker], loss: str) -> None:
    """Its error and the places where it came from are told; so are those of the next one."""
    worker = lean()
    for code in (loss + RAISE, RAISE):
        answer = worker.call(exec, code)
        assert answer.kind == _wire.RAISED
        text, error = words_and_value(answer)
        assert repr(error) == "ValueError('words')"
        assert text.startswith(b"Traceback (most recent call last):\n")
        assert b'File "<string>", line' in text
        assert text.endswith(b"ValueError: words\n")
    assert words_and_value(worker.call(pow, 2, 3))[1] == 8


class Lossy:
    """Unpickling it costs the worker what ``code`` takes."""

    def __init__(self, code: str) -> None:
        self._code = code

    def __reduce__(self) -> Any:
        return exec, (self._code,)


@pytest.mark.parametrize("loss", ["", USE_UP_DESCRIPTORS, LOSE_MODULES], ids=["nothing", "descriptors", "modules"])
def test_the_first_call_cannot_be_unpickled(lean: Callable[..., LeanWorker], loss: str) -> None:
    """It is told as ever, also by a worker that can load nothing any more."""
    worker = lean()
    answer = worker.call(abs, Lossy(loss + RAISE))
    assert answer.kind == _wire.RAISED
    text, error = words_and_value(answer)
    assert type(error) is TaskUnreadable
    assert error.pid == worker.process.pid
    assert b"ValueError: words" in text
    assert words_and_value(worker.call(pow, 2, 3))[1] == 8


@pytest.mark.parametrize("code", ["lambda: 5", "__import__('socket').socket()"], ids=["lambda", "socket"])
def test_a_first_result_that_is_not_pickled_by_the_plain_pickler(lean: Callable[..., LeanWorker], code: str) -> None:
    """By value, or with multiprocessing's reducers: loaded when it is needed."""
    assert lean().call(eval, code).kind == _wire.RETURNED


def test_a_first_result_that_cannot_be_pickled(lean: Callable[..., LeanWorker]) -> None:
    """The refusal is told, also if nothing can be loaded for a better try."""
    for loss in ("0", f"exec({LOSE_MODULES!r})"):
        answer = lean().call(eval, f"[{loss}, __import__('_thread').allocate_lock()]")
        assert answer.kind == _wire.RAISED
        assert "cannot pickle '_thread.lock'" in str(words_and_value(answer)[1])


FIRST = """
import math, os.path, sys
from safepool import SafePoolExecutor

FACTOR = 3
counted = []

def times(number: int, *, by: int = 2) -> int:
    "Multiplies."
    return number * by * FACTOR

times.mark = "kept"

def first(number):
    counted.append(number)
    loaded = "cloudpickle" in sys.modules
    return times(number) + math.floor(2.5), os.path.basename("a/b"), times.mark, times.__doc__, loaded

def later():
    return counted, [n * FACTOR for n in counted], (lambda: FACTOR)()

def closing(number):
    def inner():
        return number + FACTOR
    return inner

if __name__ == "__main__":
    with SafePoolExecutor(1) as pool:
        assert pool.submit(first, 2).result(20) == (14, "b", "kept", "Multiplies.", False)
        assert pool.submit(later).result(20) == ([2], [6], 3)
        assert pool.submit(closing(4)).result(20) == 7
"""


def test_the_first_function_of_a_script_does_not_wait_for_cloudpickle(tmp_path: Path) -> None:
    """Globals, modules, attributes, defaults and state are as ever; a closure loads what it needs."""
    done = run_script(tmp_path / "program.py", FIRST)
    assert done.returncode == 0, done.stderr
