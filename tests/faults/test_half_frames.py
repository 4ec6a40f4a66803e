"""A frame that is cut off, or no frame at all, costs one task at most: nobody waits for the other half."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from safepool import SafePoolExecutor, TaskTimeout, WorkerDied, _os, _payload, _seats, _wire
from safepool._launch import ContextWorker, Launcher, WorkerProcess, launcher_of
from safepool._wire import Frame
from safepool._worker import Setup
from tests.faults import tasks
from tests.pool import tasks as plain
from tests.pool.test_deaths import error_of, is_usable
from tests.support import LIMIT_S, PROMPT_S, SLACK_S, ByHand, a_call, until

MakePool = Callable[..., SafePoolExecutor]
Play = Callable[["Stage"], object]

NOTICED_S = PROMPT_S + 4 * SLACK_S  # a channel that speaks nonsense is found out by then
RETURNED = _wire.encode_answer(_wire.RETURNED, 1, 0.001, _payload.dumps_result("the answer"))
BEGAN = _wire.encode(Frame(_wire.BEGAN, 1))


# ------------------------------------------------- the parent meets a bad worker


class Stage:
    """What an actor in the part of a worker has."""

    def __init__(self, ends: _os.Ends) -> None:
        self.channel, self.answers, self._tickets, *_ = ends
        self._reader = _wire.FrameReader()
        self._frames: list[Frame] = []

    def say(self, *words: bytes) -> None:
        self.answers.write(b"".join(words))

    def say_hello(self) -> None:
        pid = os.getpid()
        self.say(_wire.encode(Frame(_wire.BOOTED, pid)), _wire.encode(Frame(_wire.READY, pid)))

    def take_call(self) -> int:
        """Draw the ticket of the next call; its number."""
        while True:
            while not self._frames:
                if not self._reader.read_from(self.channel.recv_into):
                    os._exit(0)
                self._frames += itertools.starmap(Frame, self._reader.frames())
            frame = self._frames.pop(0)
            if frame.kind in (_wire.CALL, _wire.CALLS):
                assert self._tickets is not None
                _os.draw(self._tickets, [bytearray(_wire.TICKET_BYTES)])
                return frame.number


class Troupe:
    """A launcher whose first worker is an actor; the later ones are real."""

    def __init__(self, play: Play, real: Launcher) -> None:
        self._play = play
        self._real = real
        self.launches = 0

    def launch(self, ends: _os.Ends, setup: Setup) -> WorkerProcess:
        self.launches += 1
        if self.launches > 1:
            return self._real.launch(ends, setup)
        process = multiprocessing.get_context("fork").Process(target=self._act, args=(ends,), daemon=True)
        process.start()
        return ContextWorker(process)

    def _act(self, ends: _os.Ends) -> None:
        with suppress(OSError):
            self._play(Stage(ends))
        os._exit(5)


@pytest.fixture
def cast(pool: MakePool) -> Callable[..., SafePoolExecutor]:
    """A pool of one worker, the first one played by an actor."""

    def make(play: Play, **options: Any) -> SafePoolExecutor:
        executor = pool(1, **options)
        executor._watchdog._launcher = Troupe(play, executor._watchdog._launcher)
        return executor

    return make


def wait_long(stage: Stage) -> None:
    time.sleep(LIMIT_S)


def test_a_worker_that_never_speaks_is_replaced(cast: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent, or stuck within its first word: another worker takes its seat."""
    monkeypatch.setattr(_seats, "BOOT_LIMIT_S", 0.5)
    hello = _wire.encode(Frame(_wire.BOOTED, 1))
    for words in (b"", hello[:1], hello[:-1]):

        def play(stage: Stage, words: bytes = words) -> None:
            stage.say(words)
            wait_long(stage)

        executor = cast(play)
        assert executor.submit(plain.echo, 1).result(LIMIT_S) == 1


def test_a_worker_that_dies_within_its_first_words(cast: Any) -> None:
    """Cut off at any place of its greeting: another one does the work."""
    words = _wire.encode(Frame(_wire.BOOTED, 1)) + _wire.encode(Frame(_wire.READY, 1))
    for cut in sorted({0, 1, len(words) // 2 - 1, len(words) // 2, *random.Random(1).sample(range(len(words)), 4)}):
        executor = cast(lambda stage, cut=cut: stage.say(words[:cut]))
        assert [executor.submit(plain.echo, n).result(LIMIT_S) for n in range(3)] == [0, 1, 2]
        executor.shutdown()


def test_an_answer_that_is_cut_off(cast: Any) -> None:
    """Dead at any place within its answer: that task fails, the others are done by the next worker."""
    cuts = {1, 40, 41, 42, len(RETURNED) - 1, *random.Random(2).sample(range(1, len(RETURNED)), 4)}
    for cut in sorted(cuts):

        def play(stage: Stage, cut: int = cut) -> None:
            stage.say_hello()
            stage.take_call()
            stage.say(BEGAN, RETURNED[:cut])

        executor = cast(play)
        victim, *others = [executor.submit(plain.echo, n) for n in range(4)]
        error = error_of(victim)
        assert type(error) is WorkerDied
        assert error.exitcode == 5
        assert [future.result(LIMIT_S) for future in others] == [1, 2, 3]
        executor.shutdown()


def test_a_whole_answer_counts_whatever_follows(cast: Any) -> None:
    """Answered and then dead, with half of another frame behind it: the answer stands."""

    def play(stage: Stage) -> None:
        stage.say_hello()
        stage.take_call()
        stage.say(BEGAN, RETURNED, BEGAN[:7])

    executor = cast(play)
    futures = [executor.submit(plain.echo, n) for n in range(4)]
    assert [future.result(LIMIT_S) for future in futures] == ["the answer", 1, 2, 3]


def test_a_start_that_is_cut_off(cast: Any) -> None:
    """Dead within the word that a task begins, its ticket drawn or not: the task fails or is done by another."""
    for drawn in (True, False):

        def play(stage: Stage, drawn: bool = drawn) -> None:
            stage.say_hello()
            if drawn:
                stage.take_call()
            else:
                stage.channel.recv(1)
            stage.say(BEGAN[:9])

        executor = cast(play)
        first, *others = [executor.submit(plain.echo, n) for n in range(4)]
        if drawn:
            assert type(error_of(first)) is WorkerDied
        else:
            assert first.result(LIMIT_S) == 0
        assert [future.result(LIMIT_S) for future in others] == [1, 2, 3]
        executor.shutdown()


def test_half_an_answer_and_then_silence(cast: Any) -> None:
    """A worker that stops within its answer is over at the limit of its task."""

    def play(stage: Stage) -> None:
        stage.say_hello()
        stage.take_call()
        stage.say(BEGAN, RETURNED[:-3])
        wait_long(stage)

    executor = cast(play, timeout=1.0)
    victim, *others = [executor.submit(plain.echo, n) for n in range(4)]
    assert type(error_of(victim)) is TaskTimeout
    assert [future.result(LIMIT_S) for future in others] == [1, 2, 3]


LIES = {
    "noise": lambda: random.Random(3).randbytes(500),
    "text": lambda: b"Traceback (most recent call last):\n" * 3,
    "zeros": lambda: bytes(500),
    "an answer to nothing": lambda: _wire.encode_answer(_wire.RETURNED, 77, 0.0, b""),
    "an answer twice": lambda: RETURNED + RETURNED,
    "too much text": lambda: _wire.encode(
        Frame(_wire.RAISED, 1, body=_wire.with_text(bytes(_wire.MOST_TEXT + 1), b""))
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_worker_that_speaks_nonsense_is_replaced(cast: Any, lie: str) -> None:
    """What is no frame, or answers nobody, ends the worker at once, and costs the task that it had."""

    def play(stage: Stage) -> None:
        stage.say_hello()
        stage.take_call()
        stage.say(BEGAN, LIES[lie]())
        wait_long(stage)

    executor = cast(play)
    first, *others = [executor.submit(plain.echo, n) for n in range(4)]
    error = first.exception(NOTICED_S)
    assert type(error) is WorkerDied or (error is None and first.result(0) == "the answer")
    assert [future.result(LIMIT_S) for future in others] == [1, 2, 3]


def test_nonsense_before_the_first_task(cast: Any) -> None:
    """A worker that greets with noise is replaced before it gets anything."""

    def play(stage: Stage) -> None:
        stage.say(random.Random(4).randbytes(500))
        wait_long(stage)

    executor = cast(play)
    assert [executor.submit(plain.echo, n).result(NOTICED_S) for n in range(3)] == [0, 1, 2]


def test_a_worker_that_lives_on_and_can_say_no_more(cast: Any) -> None:
    """A pipe for answers that is closed by a process that stays is a death, and the process is ended."""

    def play(stage: Stage) -> None:
        stage.say_hello()
        stage.take_call()
        stage.say(BEGAN)
        stage.answers.close()
        wait_long(stage)

    executor = cast(play)
    victim, *others = [executor.submit(plain.echo, n) for n in range(4)]
    assert type(victim.exception(NOTICED_S)) is WorkerDied
    assert [future.result(LIMIT_S) for future in others] == [1, 2, 3]


# ------------------------------------------------- real workers, bad tasks

STRAY = [b"abc", b"x" * 200, b"\n", b"\r", b"\x0b", b"\x0c", b"\x0e", b"\x0f", b"\x10", b"\r\n", b"\x01\x02", bytes(41)]


@pytest.mark.parametrize("data", STRAY, ids=repr)
def test_a_task_that_writes_to_its_workers_channel(pool: MakePool, data: bytes) -> None:
    """Some stray bytes, one included, end the worker and cost that task; no task waits for what they announce."""
    executor = pool(1)
    assert is_usable(executor)
    victim = executor.submit(tasks.scribble, data)
    behind = [executor.submit(plain.echo, n) for n in range(4)]
    error = victim.exception(NOTICED_S)
    assert type(error) is WorkerDied or (error is None and victim.result(0) == "scribbled")
    assert not wait(behind, LIMIT_S).not_done
    lost = [future for future in behind if future.exception(0) is not None]
    assert len(lost) <= (error is None)
    assert is_usable(executor)


@pytest.mark.parametrize("by", ["null", "pipe", "socket"])
def test_a_task_that_puts_something_else_in_the_channels_place(pool: MakePool, context: Any, by: str) -> None:
    """Whatever a task dups over the descriptors of its worker, only that task is lost."""
    executor = pool(1, context)
    victim = executor.submit(tasks.replace_descriptors, by)
    behind = [executor.submit(plain.echo, n) for n in range(4)]
    assert type(victim.exception(NOTICED_S)) is WorkerDied
    assert [future.result(LIMIT_S) for future in behind] == list(range(4))


def test_a_task_that_shuts_the_channel(pool: MakePool, context: Any) -> None:
    """The same if it shuts the sockets down."""
    executor = pool(1, context)
    victim = executor.submit(tasks.shut_descriptors)
    behind = [executor.submit(plain.echo, n) for n in range(4)]
    assert type(victim.exception(NOTICED_S)) is WorkerDied
    assert [future.result(LIMIT_S) for future in behind] == list(range(4))


# ------------------------------------------------- the worker meets a bad parent


@contextmanager
def a_worker(setup: Setup) -> Iterator[tuple[WorkerProcess, ByHand]]:
    """A real worker that is ready, and its parent."""
    parent = ByHand()
    process = launcher_of(None, "half").launch(parent.ends, setup)
    parent.ends.close()
    try:
        parent.channel.sendall(process.greeting)
        assert [parent.hear().kind for _ in range(2)] == [_wire.BOOTED, _wire.READY]
        yield process, parent
    finally:
        process.kill(hard=True)
        until(process.is_dead, "its death")
        process.release()
        parent.close()
        del process


@pytest.mark.parametrize("place", ["header", "data", "end"])
def test_a_worker_whose_parent_goes_within_a_call(place: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Cut off at any place of a call, the worker leaves: quietly, and without running anything."""
    call = a_call(1, plain.size, 1, bytes(300_000))
    dice = random.Random(place)
    cut = {"header": dice.randrange(1, 40), "data": dice.randrange(60, len(call)), "end": len(call) - 1}[place]
    with a_worker(Setup()) as (process, parent):
        parent.channel.sendall(call[:cut])
        parent.channel.shutdown(socket.SHUT_WR)
        until(lambda: process.exitcode() is not None, "it leaves, and that is known")
        assert process.exitcode() == 0
        assert parent.read() == 0
    assert capfd.readouterr().err == ""


def test_a_worker_that_is_sent_nonsense_ends(capfd: pytest.CaptureFixture[str]) -> None:
    """A worker that cannot understand its parent does not wait for ever, and does not run anything."""
    with a_worker(Setup()) as (process, parent):
        parent.channel.sendall(random.Random(5).randbytes(500))
        until(lambda: process.exitcode() is not None, "it ends, and that is known")
        assert process.exitcode() not in (None, -signal.SIGSEGV)
        assert parent.read() == 0
    capfd.readouterr()
