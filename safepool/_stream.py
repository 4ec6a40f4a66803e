"""The items of one ``map``, or its chunks: to the pool each is a task, but they travel, and come home, by the hundred.

What an item came to is kept as its worker told it: a plain value itself; else a pair, whether it returned and what is
pickled; or a future, if it never came to an answer.
"""

from __future__ import annotations

import itertools
import threading
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED
from time import monotonic

from ._link import Answer
from ._together import Batch
from ._unpack import CHUNK, absent
from ._wire import text_and_body
from .errors import Unfinished
from .future import LOOK_AFTER_S, Kind, SafeFuture

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
    from typing import Any

    from .future import Home

#: The numbers of the items of a stream follow one another, and are no other task's.
BLOCK = 1 << 32
FIRST_ITEM = BLOCK << 16
FIRST_LOOK_S = 0.05  # then longer and longer, up to ``LOOK_AFTER_S``
_blocks = itertools.count(FIRST_ITEM // BLOCK)


class Item(SafeFuture):
    """One item, when something is to be said of it."""

    __slots__ = ()
    noun = "item"

    def __str__(self) -> str:
        return f"{self.noun} {self._task % BLOCK} of map over {self.name}"


class Stream:
    """``results`` holds what each item came to, or ``absent``.  Only the watchdog changes it, but for ``taken``."""

    __slots__ = (
        "_awaited", "_failure", "_has_failed", "_home", "_kind", "_payload", "calls", "first", "how", "is_shuffled",
        "is_unwanted", "last", "left", "results", "texts",
    )  # fmt: skip

    def __init__(self, home: Home, kind: Kind, calls: list[Any], how: int, *, is_observed: bool = False) -> None:
        """``calls``: the arguments of each; ``how``: ``ONE``, its only argument; ``CHUNK``: those of many make one.

        A chunk of a ``range`` is one.
        """
        self.calls = calls
        self.how = how
        self.first = next(_blocks) * BLOCK
        self.last = self.first + len(calls) - 1
        self.left = len(calls)  # to be settled
        self.results: list[Any] = [absent] * len(calls)
        self.is_unwanted = False
        self.texts: dict[int, bytes] | None = {} if is_observed else None  # of what items raised, until it is told
        self.is_shuffled = False  # some were taken back from a worker: the queue may have them in another order
        self._failure: tuple[object, BaseException] | None = None  # the last one, and its error
        self._has_failed = False  # some never came to an answer
        self._awaited: tuple[int, threading.Lock] | None = None
        self._home = home
        self._kind = kind
        self._payload = None

    # --------------------------------------------------------- the user's side

    def outcomes(self, end: float | None) -> Iterator[Any]:
        """The values in order, chunks opened; raises what an item raised, and ``Unfinished`` when ``end`` has come."""
        settled = self._settled(end)
        return flat(settled) if self.how & CHUNK else settled

    def _settled(self, end: float | None) -> Generator[Any]:
        """Of a chunk: what gives its values."""
        results, is_chunked = self.results, bool(self.how & CHUNK)
        value: Any = None
        try:
            for at, found in enumerate(results):  # (it sees what is stored meanwhile: the list stays as long as it is)
                value = found if found is not absent else self._wait_for(at, end)
                # Nothing here holds a result while the user works with it.
                results[at] = None
                kind = type(value)
                if kind is not tuple and kind is not Item:
                    yield value
                elif is_chunked:
                    value = self._opened(at, value)
                    yield emptied(value)
                else:
                    value = [self._opened(at, value)]
                    yield value.pop()
        finally:
            if is_chunked and type(value) is list:
                value.clear()  # ``flat`` was closed within a chunk
            self.is_unwanted = True
            if self.left:
                self._home.cancel_range(self.first, self.last)

    def _wait_for(self, at: int, end: float | None) -> Any:
        slice_s = FIRST_LOOK_S
        while True:
            slice_s = slice_s if end is None else min(slice_s, end - monotonic())
            sleeper = threading.Lock()
            sleeper.acquire(blocking=False)
            self._awaited = at, sleeper
            # (Looked at after that: who stores a result looks for a sleeper after it.)
            if self.results[at] is absent and slice_s > 0:
                sleeper.acquire(timeout=slice_s)
            self._awaited = None
            if self.results[at] is not absent:
                return self.results[at]
            # It may have ended, and its worker tells only when the batch has: the next ones may take long.
            self._home.look(wait=slice_s <= 0)
            if self.results[at] is not absent:
                return self.results[at]
            if slice_s <= 0:
                item = self.item(self.first + at)
                raise Unfinished(f"{item} is not done: it is {self._home.state_of(item._task)}", unfinished=[item])
            self._home.check()
            slice_s = min(2 * slice_s, LOOK_AFTER_S)

    def _opened(self, at: int, outcome: tuple[bool, bytes] | Item) -> Any:
        if isinstance(outcome, Item):
            return outcome.result(0)
        returned, body = outcome
        item = self.item(self.first + at)
        text, body = (b"", body) if returned else text_and_body(body)
        item._answer = Answer(returned, text, body)
        item._state = FINISHED
        return item.result(0)

    # --------------------------------------------------- the watchdog's side of it

    def item(self, task: int) -> Item:
        item = Item(self._home, task, self._kind)
        if self.how & CHUNK:
            item.noun = "chunk"
        return item

    def store(self, at: int, outcomes: list[Any]) -> None:
        """What items from ``at`` on came to; not of those that have failed before."""
        results = self.results
        if self._has_failed:
            olds = results[at : at + len(outcomes)]
            outcomes = [old if type(old) is Item else new for old, new in zip(olds, outcomes)]
            self.left -= sum(type(new) is not Item for new in outcomes)
        else:
            self.left -= len(outcomes)
        results[at : at + len(outcomes)] = outcomes
        self._wake()

    def error_of(self, task: int, failure: object, make: Callable[[Item], BaseException]) -> BaseException:
        """One for all items that end by one and the same failure: there may be a million."""
        if self._failure is None or self._failure[0] is not failure:
            self._failure = failure, make(self.item(task))
        return self._failure[1]

    def fail(self, task: int, error: BaseException) -> None:
        item = self.item(task)
        item.failed(error)
        self._end(task, item)

    def cancel(self, task: int) -> None:
        if self.is_unwanted:  # nobody will look: there may be a million
            self._has_failed = True
            self.left -= self.results[task - self.first] is absent
            self.results[task - self.first] = None
            return
        item = self.item(task)
        item._end(CANCELLED_AND_NOTIFIED)
        self._end(task, item)

    def _end(self, task: int, item: Item) -> None:
        self._has_failed = True
        if self.results[task - self.first] is absent:
            self.results[task - self.first] = item
            self.left -= 1
            self._wake()

    def failed(self, error: BaseException) -> None:
        """All that is not settled."""
        for task in range(self.first, self.last + 1):
            self.fail(task, error)

    def _wake(self) -> None:
        awaited = self._awaited
        if awaited is not None and self.results[awaited[0]] is not absent:
            self._awaited = None
            awaited[1].release()

    def __repr__(self) -> str:
        return f"<Stream of {len(self.results)} items of {self._kind.name}: {self.left} left>"


class Items(Batch):
    """Some of a stream, that follow one another."""

    __slots__ = ("stream",)

    def __init__(self, stream: Stream, start: int, stop: int) -> None:
        super().__init__(stream._kind, stream.how, start, stop)
        self.stream = stream

    @property
    def _payload(self) -> list[Any]:
        calls = self.stream.calls
        chosen = calls[self.start : self.stop]
        return chosen if type(calls[0]) is not range else list(map(list, chosen))

    def _numbers(self, start: int, stop: int) -> Sequence[int]:
        return range(self.stream.first + start, self.stream.first + stop)

    def _store(self, start: int, outcomes: list[Any], pid: int) -> list[int]:
        texts, raised = self.stream.texts, list[int]()
        if texts is not None:
            for task, outcome in enumerate(outcomes, self.stream.first + start):
                if type(outcome) is tuple and not outcome[0]:
                    texts[task] = text_and_body(outcome[1])[0]
                    raised.append(task)
        self.stream.store(start, outcomes)
        return raised


class _Flat(itertools.chain):  # type: ignore[type-arg]
    """A class of our own has room for ``close``."""


class _Source:
    """Chunks for ``_Flat``, which drops its source at the first error that comes from there.

    Scenario 1: (a) a thread waits for a chunk, (b) another one asks for the next value, and is told that the generator
    runs already, (c) the first one finds nothing after its chunk.  So that is raised where a value should be.
    """

    def __init__(self, chunks: Generator[Iterable[Any]]) -> None:
        self._chunks: Any = chunks

    def __iter__(self) -> _Source:
        return self

    def __next__(self) -> Iterable[Any]:
        try:
            return next(self._chunks)
        except ValueError as error:
            if self._chunks.gi_frame is None:
                raise  # that of a task
            return map(_raise, (error,))


def _raise(error: BaseException) -> None:
    raise error


def flat(chunks: Generator[Iterable[Any]]) -> Iterator[Any]:
    """What is in them, as fast as can be; can be closed, too.  If that is within a chunk, ``chunks`` ends that."""
    found: Any = _Flat.from_iterable(_Source(chunks))
    found.close = chunks.close
    return found  # type: ignore[no-any-return]


def emptied(values: list[Any]) -> Iterator[Any]:
    """Each in turn; nothing here holds one while the user works with it."""
    values.reverse()
    while values:
        yield values.pop()


def batches_of(stream: Stream, tasks: Sequence[int], together: int) -> list[Items]:
    """Of items that follow one another."""
    first, stop = tasks[0] - stream.first, tasks[-1] - stream.first + 1
    return [Items(stream, at, min(at + together, stop)) for at in range(first, stop, together)]
