"""Races of the fast dispatch that a review found: each was a hang, a wrong answer or a breakdown."""

from __future__ import annotations

import mmap
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safepool import PoolTerminated, SafePoolExecutor, _link
from safepool._batches import Journal
from safepool._wire import Board, plain, plain_in, plain_list
from tests.pool import tasks
from tests.pool.test_loans import _wait_until_lent
from tests.support import LIMIT_S, run_script, until, write_down

MakePool = Callable[..., SafePoolExecutor]


# -------------------------------------------------- what is settled in the same breath


def slow_to_answer(number: int) -> int:
    """The last of each half ends, and its worker takes long to say so."""
    if number in (9, 19):
        from safepool import _leftovers

        look = _leftovers.Leftovers.look

        def slow_look(self: Any) -> Any:
            found = look(self)
            time.sleep(0.5)
            _leftovers.Leftovers.look = look  # type: ignore[method-assign]
            return found

        _leftovers.Leftovers.look = slow_look  # type: ignore[method-assign]
        time.sleep(0.12)
    return number


def test_the_last_items_of_two_workers_are_known_before_they_answer(pool: MakePool) -> None:
    """Scenario 1: (a) an iterator waits, so both boards are read, (b) that was the rest, (c) both are resolved."""
    executor = pool(2)
    list(executor.map(abs, range(40)))
    for _ in range(3):
        assert list(executor.map(slow_to_answer, range(20))) == list(range(20))
    assert not executor._broken


@pytest.mark.parametrize("first", ["shutdown", "kill_workers", "look"])
def test_a_cancel_behind_something_that_settles_its_task(pool: MakePool, first: str) -> None:
    """Scenario 2: (a) the pool is told to cancel all, (b) a task is cancelled, (c) both are read at once."""
    for _ in range(5):
        executor = pool(1)
        futures = [executor.submit(tasks.nap, 0.05, n) for n in range(6)]
        until(futures[0].running, "the first one runs")
        watchdog, gate = executor._watchdog, threading.Event()
        watchdog.post(lambda gate=gate: gate.wait(LIMIT_S))  # type: ignore[misc]
        if first == "shutdown":
            executor.shutdown(wait=False, cancel_futures=True)
        elif first == "kill_workers":
            watchdog.post(lambda watchdog=watchdog: watchdog._events.append(_end_workers()))  # type: ignore[misc]
        threading.Thread(target=futures[-1].cancel, daemon=True).start()
        gate.set()
        until(lambda futures=futures: all(future.done() for future in futures), "all are done")  # type: ignore[misc]
        assert not executor._broken
        assert futures[-1].cancelled() or first == "kill_workers"


def _end_workers() -> Any:
    from safepool import _events

    return _events.EndWorkersRequested(time.monotonic(), True)


def outlive_sigterm() -> list[str]:
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    while not heard:
        time.sleep(0.01)
    return ["an answer"]


def test_a_future_that_has_failed_stays_so(pool: MakePool) -> None:
    """Scenario 3: (a) the workers are terminated and the task fails, (b) it answers all the same."""
    executor = pool(1)
    future = executor.submit(outlive_sigterm)
    until(future.running, "it runs")
    time.sleep(0.2)  # for its handler; if it comes too late the worker just dies
    executor.terminate_workers()
    assert isinstance(future.exception(LIMIT_S), PoolTerminated)
    executor.shutdown()
    assert isinstance(future.exception(0), PoolTerminated)


# ------------------------------------------------------------------- loans


def test_a_caller_that_is_held_up_while_others_submit(pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scenario 4: (a) a caller has a worker and is held up, (b) others are sent there, (c) the caller sends its own."""
    executor = pool(1)
    _wait_until_lent(executor)
    real, held_up = os.write, threading.Event()

    def write(fd: int, data: bytes) -> int:
        if not held_up.is_set():
            held_up.set()
            time.sleep(0.6)
        return real(fd, data)

    monkeypatch.setattr(_link._os, "write", write)
    found: list[Any] = []
    caller = threading.Thread(target=lambda: found.append(executor.submit(tasks.echo, -1)), daemon=True)
    caller.start()
    assert held_up.wait(LIMIT_S)
    others = [executor.submit(tasks.echo, n) for n in range(20)]
    caller.join(LIMIT_S)
    assert [future.result(LIMIT_S) for future in others] == list(range(20))
    assert found[0].result(LIMIT_S) == -1


# --------------------------------------------------------------- the board


def test_a_board_that_is_overwritten_while_it_is_read() -> None:
    """Scenario 5: the worker begins its next batch between two readings: then nothing is told, and nothing wrong."""
    memory = mmap.mmap(-1, Board.BYTES)
    journal = Journal(memory)
    reads = 0

    def read(size: int, at: int) -> bytes:
        nonlocal reads
        reads += 1
        if reads == 2:
            journal.begin(2)
            for value in ("other", "things"):
                write_down(journal, value)
        return memory[at : at + size]

    journal.begin(1)
    for number in range(3):
        write_down(journal, number)
    assert Board(read).finished(1, 0) is None
    assert Board(read).finished(2, 0) == (["other", "things"], True)
    journal.stop()
    assert Board(read).finished(2, 0) == (["other", "things"], False)
    assert Board(read).finished(2, 1) is None


_plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner),
)


@settings(max_examples=200)
@given(values=st.lists(_plain))
def test_a_list_of_what_was_told_one_by_one(values: list[Any]) -> None:
    """Is as if it had been told at once: what tasks came to is on the board first, and then in the answer."""
    assert plain_in(plain_list(list(map(plain, values)))) == values


def test_a_board_that_is_read_all_the_time(pool: MakePool) -> None:
    """Every value is the one of its item, however often one looks at what is not sent yet."""
    executor = pool(2)
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.0002):
            executor._watchdog.look(wait=False)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        for _ in range(10):
            assert list(executor.map(abs, range(20_000))) == list(range(20_000))
    finally:
        over.set()
        looking.join(LIMIT_S)
    assert not executor._broken


SHORT = """
import os, resource, time
from safepool import SafePoolExecutor

def work(number):
    if number == 8:
        time.sleep(0.3)
    return number

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
    with SafePoolExecutor(1) as pool:
        assert list(pool.map(work, range(100, 120))) == list(range(100, 120))
        results, opened = pool.map(work, range(12)), []
        try:
            while True:
                opened.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        found = list(results)
        for fd in opened:
            os.close(fd)
        print(found == list(range(12)))
"""


def test_a_board_is_read_when_no_descriptor_is_left(tmp_path: Path) -> None:
    """Scenario 6: (a) the program opens all the files it may, (b) an iterator waits for one item of a batch."""
    done = run_script(tmp_path / "script.py", SHORT)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_a_board_without_a_token_is_not_made_again(pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scenario 7: a descriptor is to be had for the board and none for the token, again and again: one is kept."""
    executor = pool(1)
    assert list(executor.map(tasks.echo, range(100))) == list(range(100))
    (link,) = executor._watchdog._links.by_worker.values()
    made = []

    def refuse() -> Any:
        made.append(len(link._open))
        raise OSError("no descriptor is left")

    monkeypatch.setattr(_link._os, "open_token", refuse)
    monkeypatch.setattr(link, "_token", None)
    monkeypatch.setattr(link, "_board", None)
    assert not any(link.takes_batches(2, 2) for _ in range(3))
    assert len(set(made)) == 1
