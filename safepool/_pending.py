"""Who waits for which task, and what they are told: futures, and items of streams, behind one face.

Which of the two a task is, only this file asks.  Only the watchdog calls it, or whoever finds that its thread is gone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._evidence import error_of
from ._log import WARNING
from ._side import tell_aside
from ._stream import FIRST_ITEM, Stream, batches_of
from ._together import Batch, gathered
from .errors import Attempt, with_attempts
from .future import SafeFuture, answer_all, claim
from .leaving import Leftover

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ._events import Failure
    from ._link import Link
    from ._packets import Left

#: So many calls at once, and not before, are worth what a worker's first batch takes: descriptors, shared memory.
WORTH_A_BOARD = 100

#: What is submitted: one task, or many.
Work = SafeFuture | Stream


class Pending:
    """What is not settled.  ``futures``: of each task its own, but for items of streams."""

    def __init__(self) -> None:
        self.futures: dict[int, SafeFuture] = {}
        self._streams: list[Stream] = []
        self._told_leftovers: set[str] = set()

    def add_stream(self, stream: Stream) -> None:
        self._streams.append(stream)

    def one(self, task: int) -> SafeFuture | None:
        """Its future, or what stands for an item; None: that is forgotten, for all of its stream are settled."""
        stream = self._stream_of(task)
        return self.futures.get(task) if stream is None else stream.item(task)

    def taken_text(self, task: int) -> bytes:
        """Of what it raised, as its worker told it."""
        stream = self._stream_of(task)
        if stream is not None:
            return stream.texts.pop(task, b"") if stream.texts is not None else b""
        future = self.futures.get(task)
        answer = None if future is None else future.last_answer()
        return b"" if answer is None else answer.text

    # ------------------------------------------------------------ on the way

    def claim(
        self, tasks: tuple[int, ...], link: Link | None, together: int
    ) -> tuple[list[SafeFuture | Batch], tuple[int, ...]]:
        """What is to be sent of these, to that worker; and those that nobody wants any more.

        ``together``: how many may have one ticket, if the worker takes batches.
        """
        claimed: list[SafeFuture | Batch] = []
        least = 2 if self._streams else WORTH_A_BOARD
        if together > 1 and (len(tasks) == 1 or link is None or not link.takes_batches(len(tasks), least)):
            together = 1
        going = 0
        for stream, some in self._by_stream(tasks) if self._streams else ((None, tasks),):
            if stream is None:
                futures = claim([self.futures[task] for task in some])
                going += len(futures)
                claimed += futures if together == 1 else gathered(futures, together)
            elif not stream.is_unwanted:
                going += len(some)
                claimed += batches_of(stream, some, together)
        if going == len(tasks):
            return claimed, ()
        # Scenario 1: (a) the core sends a task, (b) its user cancels it, (c) it is claimed here.
        # The future says cancelled, so it must not go out.
        sent = {task for future in claimed for task in future.tasks()}
        return claimed, tuple(task for task in tasks if task not in sent)

    def _by_stream(self, tasks: tuple[int, ...]) -> Iterator[tuple[Stream | None, tuple[int, ...]]]:
        """In runs: of futures (None), or of items of one stream that follow one another."""
        at = 0
        while at < len(tasks):
            stream = self._stream_of(tasks[at])
            end = at + 1
            if stream is not None:
                end = min(len(tasks), at + stream.last + 1 - tasks[at])
                if stream.is_shuffled or tasks[end - 1] - tasks[at] != end - 1 - at:
                    due = range(tasks[at], tasks[at] + end - at)
                    end = next((at + n for n, task in enumerate(due) if tasks[at + n] != task), end)
            else:
                while end < len(tasks) and tasks[end] in self.futures:
                    end += 1
            yield stream, tasks[at:end]
            at = end

    def _stream_of(self, task: int) -> Stream | None:
        for stream in self._streams:
            if stream.first <= task <= stream.last:
                return stream
        return None

    def began(self, task: int, pid: int | None) -> None:
        future = self.futures.get(task)
        if future is None:
            return  # an item of a stream, which nobody asks whether it runs
        future.begin(pid)
        if future._kind.options.retry is None and type(future._payload) is not tuple:
            future._payload = None  # it will never be sent again

    def requeue(self, tasks: Iterable[int]) -> None:
        for task in tasks:
            future = self.futures.get(task)
            if future is None:
                stream = self._stream_of(task)
                if stream is not None:
                    stream.is_shuffled = True
                continue
            if future._record is not None:
                future._record.answer = future._record.error = None
            future.stacks = ""
            future.requeue()

    def note_leftovers(self, task: int, left: Sequence[Left], *, tell: bool = True) -> None:
        future = self.one(task)
        if future is None or not left:
            return
        future.leftovers += tuple(Leftover(pid, command, str(future), gone) for pid, command, gone in left)
        fresh = {command for _, command, _ in left} - self._told_leftovers
        if tell and fresh:  # a run of many tasks says the same of each
            self._told_leftovers |= fresh
            ended = "and were ended" if all(gone for *_, gone in left) else "that still run"
            listed = ", ".join(f"{pid} ({command})" for pid, command, _ in left)
            tell_aside(WARNING, "safepool: %s left processes behind %s: %s", str(future), ended, listed)

    # ------------------------------------------------------------ at the end

    def resolve(self, tasks: tuple[int, ...]) -> None:
        """By what their workers sent, which is with them already."""
        futures = self.futures
        if max(tasks) >= FIRST_ITEM:
            # (Items know it since their answer came; the last of their stream may have come since, and it is gone.)
            tasks = tuple([task for task in tasks if task < FIRST_ITEM]) if futures else ()
        self._forget_streams()
        ended = [futures[task] for task in tasks]
        answered = []
        for future in ended:
            record = None if future._kind.is_plain else future._record
            if record is not None and record.error is not None:
                future.failed(_with_its_attempts(future, record.error))
                continue
            if record is not None and record.answer is not None:
                future._answer = record.answer
            answered.append(future)
        answer_all(answered)
        for task in tasks:
            del futures[task]  # not before its future knows: a breakdown fails what is in here

    def fail(self, task: int, failure: Failure, pid: int | None) -> None:
        """``pid``: of the worker that ``failure`` names."""
        stream = self._stream_of(task)
        if stream is not None:
            if failure.kind == "cancelled":
                stream.cancel(task)
            else:
                error = stream.error_of(task, failure, lambda item: _final_error(item, failure, pid))
                stream.fail(task, error)
            self._forget_streams()
            return
        if task >= FIRST_ITEM:
            return  # its stream has all it wanted
        future = self.futures[task]
        record = future._record
        if failure.ran_s and future._pid is None:
            future._pid = pid  # it died, or was ended, before anybody had asked whether it has begun
        if failure.kind == "cancelled":
            future.cancelled_by_pool()
        elif record is not None and record.error is not None and failure.kind in ("death", "timeout"):
            future.failed(_with_its_attempts(future, record.error))  # the one its retry policy saw
        else:
            future.failed(_final_error(future, failure, pid))
        del self.futures[task]

    def cancel(self, tasks: Iterable[int]) -> None:
        for task in tasks:
            stream = self._stream_of(task)
            if stream is not None:
                stream.cancel(task)
            elif task < FIRST_ITEM:
                self.futures[task].cancelled_by_pool()
                del self.futures[task]
        self._forget_streams()

    def _forget_streams(self) -> None:
        """Those of which all items are settled."""
        if self._streams:
            self._streams = [stream for stream in self._streams if stream.left]

    def fail_all(self, error: BaseException, posted: Sequence[object]) -> None:
        """And what is among ``posted``."""
        futures, self.futures = self.futures, {}
        futures.update((item._task, item) for item in posted if isinstance(item, SafeFuture))
        for future in futures.values():
            future.failed(error)
        for stream in (*self._streams, *(item for item in posted if isinstance(item, Stream))):
            stream.failed(error)
        self._streams = []


def refuse(work: Work, failure: Failure, pid: int | None) -> None:
    """What the core was never told of."""
    one = work.item(work.first) if isinstance(work, Stream) else work
    work.failed(error_of(failure, one, work._kind.options, pid))


def _final_error(future: SafeFuture, failure: Failure, pid: int | None) -> BaseException:
    options = future._kind.options
    error = error_of(failure, future, options, pid)
    if options.retry is not None and failure.kind in ("death", "poison", "timeout"):
        # An attempt that its policy was not asked about.
        cause = "timeout" if failure.kind == "timeout" else "death"
        future.attempts += (Attempt(len(future.attempts) + 1, cause, pid, error),)
    return _with_its_attempts(future, error)


def _with_its_attempts(future: SafeFuture, error: BaseException) -> BaseException:
    # If it is final they are on it; and only then can it be the user's, whose methods must not be called here.
    is_final = future._record is not None and future._record.is_final
    return error if is_final or not future.attempts else with_attempts(error, future.attempts)
