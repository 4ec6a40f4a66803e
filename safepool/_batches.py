"""In a worker: many calls under one ticket, of which each is a task of its own in all but the way home.

What each came to is on the board, which the parent can read, before the next one begins: so none that is finished is
lost or run again, whatever ends the worker.

After each that took long (``SLOW_S``), and if the parent wants the rest, the worker asks for the token, which it has
put there at the start: it takes it and puts it there anew, and without it returns the rest. So the parent may give
the rest to others: it takes the token if it has seen one and the same call run for so long that it knows which one it
is, and that the token is asked for after it.

Scenario 2: (a) a task has ended, and the parent sees it, (b) the worker is held up, because it looks for what the
task has left, say, (c) it runs the next one, which is quick, and the one after that; but the parent has seen one and
the same count for so long, and has given that one to another worker. So no time lies between what is measured of one
task and of the next: then of twice ``SLOW_S`` with one count, once at least is of one task. And who takes a token
looks at how often it was asked for: one that was put there since is of a later task.
"""

from __future__ import annotations

from functools import partial
from marshal import dumps
from time import perf_counter

from . import _unpack, _wire
from ._shapes import NamedTuple
from ._unpack import CHUNK, ONE
from ._wire import Board, Frame

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from mmap import mmap
    from typing import Any

SLOW_S = 0.002
NUMBER, PARTS, RUNS, ENDED, ASKS, WANTED = range(6)  # of the head of a board: see ``_wire.Board``


class Calls(NamedTuple):
    """``how``: ``ONE``, each has one argument, and ``arguments`` are these; ``CHUNK``: those of many make one task."""

    arguments: list[Any]
    how: int


class Journal:
    """What is written to the board: see ``_wire.Board``.  ``run`` writes what each task came to, then its count.

    ``write(told)`` raises ``ValueError`` if there is no room; then nothing has happened.
    """

    __slots__ = ("_memory", "_number", "_parts", "asks", "head", "write")

    def __init__(self, memory: mmap | None) -> None:
        """``memory``: None if there is no board; then what is written is lost."""
        self._memory = memory
        self.write: Callable[[bytes], object] = len if memory is None else memory.write
        self.head: Any = [0] * 6 if memory is None else memoryview(memory)[: Board.HEAD.size].cast("Q")
        self._number = self._parts = 0
        self.asks = 0  # for the token of this batch

    def begin(self, number: int) -> None:
        """A batch."""
        self._number = number
        self._parts = -1
        self.asks = 0
        self.turn()

    def turn(self) -> None:
        """A part was sent: what follows is of the next one."""
        self._parts += 1
        # Scenario 1: (a) the parent reads the head, (b) this begins another batch, (c) the parent reads what its
        # tasks came to, for those of the old one.  So each field is one store, the number comes last, and the
        # parent looks at it again.
        head = self.head
        head[NUMBER] = head[ENDED] = 0
        head[PARTS], head[RUNS], head[ASKS] = self._parts, 1, self.asks
        head[NUMBER] = self._number
        if self._memory is not None:
            self._memory.seek(Board.HEAD.size)

    def asked(self) -> None:
        """For the token, which is there anew."""
        self.asks += 1
        self.head[ASKS] = self.asks

    def is_wanted(self) -> bool:
        """Does the parent want the rest of this batch?"""
        return bool(self.head[WANTED] == self._number)

    def stop(self) -> None:
        """No other task of the batch is begun."""
        self.head[RUNS] = 0


def run(
    journal: Journal,
    number: int,
    fn: Callable[..., Any],
    calls: Calls,
    *,
    failure: Callable[[BaseException], bytes],
    send: Callable[[Frame], None],
    send_big: Callable[[Any], bytes] | None,
    tidy_up: Callable[[int], bool],
    may_go_on: Callable[[], bool],
    shortest_s: float,
) -> tuple[int, float, bytes, bool]:
    """Run them; the last answer, as kind, run time in seconds and body, and whether it was tidy (else: no more is run).

    ``send_big`` what is big of a result, if that can be done; what is told of it then ends a part.
    ``tidy_up(at)`` after each task that took ``shortest_s`` and may have left something; False: it cannot be done.
    ``may_go_on()`` after each that took long: is the rest of the batch still ours?
    """
    arguments, how = calls
    has_one, is_chunk = bool(how & (ONE | CHUNK)), bool(how & CHUNK)
    if is_chunk:
        fn = partial(many, fn, has_one=bool(how & ONE))
    told: list[bytes] = []  # of each a plain value; or, if it is none, (did it return, what is pickled)
    small, version = _unpack.SMALL, _wire.VERSION
    pickled = _unpack.dumps_result if send_big is None else _unpack.dumps_big_result
    head, ended = journal.head, 0
    part = _wire.PART
    began = before = perf_counter()
    journal.begin(number)  # (after that: see Scenario 2)
    for args in arguments:
        try:
            outcome = fn(args) if has_one else fn(*args)
            if type(outcome) not in small and not (is_chunk and _unpack.are_small(outcome)):
                outcome = pickled(outcome)
                if type(outcome) is not bytes:
                    outcome, part = send_big(outcome), _wire.BIG_PART  # type: ignore[misc]
                outcome = True, outcome
        except BaseException as error:
            outcome = False, failure(error)
            BaseException.with_traceback(error, None)  # its frames hold the arguments
        told.append(dumps(outcome, version))  # (what ``_wire.plain`` does: a call less for each task)
        is_tidy = perf_counter() - before < shortest_s or tidy_up(ended)
        is_part = part == _wire.BIG_PART
        if not is_part:
            try:
                journal.write(told[-1])  # (looked up each time: see ``_Link.disown``)
            except ValueError:
                is_part = True
            else:
                ended += 1
                head[ENDED] = ended
        if is_part:
            send(Frame(part, number, perf_counter() - began, _wire.plain_list(told)))
            told = []
            ended = 0
            part = _wire.PART
            journal.turn()
            began = perf_counter()
        if not is_tidy:
            journal.stop()
            return _wire.PART, perf_counter() - began, _wire.plain_list(told), False
        now = perf_counter()
        run_s, before = now - before, now
        if run_s >= shortest_s and (run_s >= SLOW_S or journal.is_wanted()) and not may_go_on():
            journal.stop()
            break
    return _wire.PLAIN, perf_counter() - began, _wire.plain_list(told), True


def many(fn: Callable[..., Any], arguments: list[Any], *, has_one: bool) -> list[Any]:
    """A chunk.  (``map`` would take a StopIteration of ``fn`` for its own end.)"""
    return [fn(one) for one in arguments] if has_one else [fn(*args) for args in arguments]


def refuse(error: BaseException) -> Callable[..., Any]:
    """In the place of a function that cannot be had."""

    def fn(*args: Any) -> Any:
        raise error

    return fn
