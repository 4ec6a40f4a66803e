"""Everything that runs in the child: receive, draw a ticket, run, reply.

Guarantees:

* the answer of one task is on its way before the next one begins, so a death costs one task;
* a task runs only if its ticket is drawn, so what the parent took back never runs;
* no task can end this loop: whatever it raises travels, ``SystemExit`` and ``KeyboardInterrupt`` too.

Imports little, for every worker pays for it at its start; but all that an error needs is there before the first
task, which may leave the worker unable to open a file.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter
from typing import Any, NamedTuple

from . import _os, _payload, _wire
from ._log import CRITICAL, tell
from ._wire import Frame
from .errors import TaskUnreadable, traceback_of, words_of

LOG_LIMIT_S = 1.0  # for the handlers of a log


class Setup(NamedTuple):
    """What a worker is given before its first task."""

    initializer: Callable[..., object] | None = None
    initargs: tuple[Any, ...] = ()


def main(channel: socket.socket, tickets: socket.socket | None, setup: Setup | None = None) -> None:
    """The life of a worker.  Returns when the parent asks for it or is gone.

    ``setup`` comes by inheritance (fork, or things that only travel so, like locks); if None, it
    comes as the first frame.
    """
    _own_signals()
    link = _Link(_os.moved_up(channel), tickets and _os.moved_up(tickets))
    _os.fill_standard()
    os.register_at_fork(after_in_child=link.disown)
    link.send(Frame(_wire.BOOTED, os.getpid()))
    try:
        if _prepare(link, setup):
            _serve(link)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone, and nobody can read an answer


def _own_signals() -> None:
    # Ctrl-C reaches the whole foreground group, but stopping is the parent's decision.  A handler
    # and not SIG_IGN: ignoring would be inherited by every program that a task starts.
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, _leave_it_to_the_parent)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _leave_it_to_the_parent(number: int, frame: Any) -> None:
    pass


class _Link:
    """This worker's ends of its channel and of its tickets."""

    def __init__(self, channel: socket.socket, tickets: socket.socket | None) -> None:
        self._channel = channel
        self._tickets = tickets
        self._reader = _wire.FrameReader()
        self._frames: deque[Frame] = deque()
        self._drawn = 0
        self._pid = os.getpid()

    def disown(self) -> None:
        """In a child that a task forked: it must not speak for the worker, nor keep the parent waiting."""
        self._channel.close()
        if self._tickets is not None:
            self._tickets.close()

    def send(self, *frames: Frame) -> None:
        self._speak_for_ourselves()
        self._channel.sendall(b"".join(map(_wire.encode, frames)))

    def answer(self, answer: _Answer, begins: int) -> None:
        """Send the answer of one task, and in the same breath that the next one begins (0: none)."""
        if isinstance(answer, Frame):
            self.send(answer._replace(begins=begins))
            return
        self._speak_for_ourselves()
        number, run_s, body = answer
        self._channel.sendall(_wire.encode_returned(number, begins, run_s, body))

    def _speak_for_ourselves(self) -> None:
        if os.getpid() != self._pid:
            os._exit(0)  # the child of a task's fork came back through our loop

    def next_frame(self) -> Frame:
        while not self._frames:
            self._fill()
        return self._frames.popleft()

    def _fill(self) -> None:
        if not self._reader.read_from(self._channel):
            raise EOFError
        self._frames.extend(self._reader)

    def next_call_at_hand(self) -> Frame | None:
        """The next call, if it is here already and its ticket can be drawn; never waits."""
        while self._frames and self._frames[0].kind == _wire.CALL:
            frame = self._frames.popleft()
            if self.draw(frame.number):
                return frame
        return None

    def draw(self, number: int) -> bool:
        """Draw the ticket of a call.  False: the parent took the call back."""
        if self._tickets is None:
            return True
        # Tickets are written before their calls and drawn in order: when a call is here and its
        # ticket is not, it was taken back.  A higher ticket belongs to a later call.
        while self._drawn < number:
            try:
                data = self._tickets.recv(_wire.TICKET_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            if len(data) != _wire.TICKET_BYTES:
                raise EOFError
            self._drawn = _wire.ticket_in(data)
        return self._drawn == number


def _prepare(link: _Link, setup: Setup | None) -> bool:
    """Run the initializer.  False: it failed, and the parent knows."""
    frame = link.next_frame() if setup is None else None
    if frame is None:
        _payload.inherit_main()
    try:
        if frame is not None:
            _payload.own_main()
            environ, setup = _payload.loads(frame.body)
            if os.environ != environ:
                os.environ.clear()
                os.environ.update(environ)
        assert setup is not None
        if setup.initializer is not None:
            setup.initializer(*setup.initargs)
    except BaseException as error:
        _log_unfit(error)
        link.send(Frame(_wire.UNFIT, text=_traceback(error)))
        return False
    link.send(Frame(_wire.READY, os.getpid()))
    return True


def _log_unfit(error: BaseException) -> None:
    """As the stdlib does, here in the worker; but the parent is told even if no handler ever comes back.

    Scenario 1: stderr is a pipe that is full and nobody reads, or a handler of the user's raises.
    """
    args = CRITICAL, "Exception in initializer:"
    thread = threading.Thread(target=tell, args=args, kwargs={"error": error}, daemon=True)
    with suppress(RuntimeError):
        thread.start()
        thread.join(LOG_LIMIT_S)


def _serve(link: _Link) -> None:
    while True:
        frame: Frame | None = link.next_frame()
        assert frame is not None
        if frame.kind == _wire.EXIT:
            return
        if not link.draw(frame.number):
            continue
        link.send(Frame(_wire.BEGAN, frame.number))
        while frame is not None:
            answer = _run(frame)
            del frame  # nothing of a call is kept while the worker waits
            frame = link.next_call_at_hand()
            link.answer(answer, 0 if frame is None else frame.number)
            del answer


# What a task came to: (number, run time in seconds, pickled result), or the frame of its failure.
_Answer = tuple[int, float, bytes] | Frame


def _run(frame: Frame) -> _Answer:
    began = perf_counter()
    number = frame.number
    try:
        task = _payload.loads_call(frame.body)
    except BaseException as error:
        why = f"the call could not be unpickled in worker {os.getpid()}: {words_of(error)}"
        return _failure(number, TaskUnreadable(why, pid=os.getpid()), perf_counter() - began, cause=error)
    del frame
    try:
        result = [task.fn(*one) for one in task.args] if task.is_chunk else task.fn(*task.args, **task.kwargs)
    except BaseException as error:
        answer = _failure(number, error, perf_counter() - began)
        BaseException.with_traceback(error, None)  # its frames hold the arguments
        return answer
    run_s = perf_counter() - began
    del task
    try:
        return number, run_s, _payload.dumps_result(result)
    except BaseException as error:
        return _failure(number, error, run_s)


def _failure(number: int, error: BaseException, run_s: float, cause: BaseException | None = None) -> Frame:
    """The answer for a task that raised: text that always arrives, and the exception if it pickles."""
    if isinstance(error, MemoryError):
        traceback.clear_frames(error.__traceback__)  # they hold what the memory is full of
    text = _traceback(error if cause is None else cause)
    try:
        body = _payload.dumps_result(error)
    except BaseException as unpicklable:
        text = _traceback(unpicklable)
        try:
            body = _payload.dumps_result(unpicklable)
        except BaseException:
            body = b""
    return Frame(_wire.RAISED, number, 0, run_s, text, body)


def _traceback(error: BaseException) -> bytes:
    return traceback_of(error).encode(errors="backslashreplace")[-_wire.MOST_TEXT :]
