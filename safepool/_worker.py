"""Everything that runs in the child: receive, draw a ticket, run, reply.

Guarantees:

* the answer of one task is on its way before the next one begins, so a death costs one task;
* a task runs only if its ticket is drawn, so what the parent took back never runs;
* no task can end this loop: whatever it raises travels, ``SystemExit`` and ``KeyboardInterrupt`` too;
* what a task leaves behind is ended (or reported, see ``_leftovers``) before its answer is sent.

Imports only what every task needs, for the first result of a program waits for it.  What an error needs is loaded
by ``complete``, before a second task runs: the first may leave the worker unable to open a file.
"""

from __future__ import annotations

import _socket
import os
from collections import deque
from time import perf_counter

from . import _os, _unpack, _wire
from ._log import CRITICAL, tell
from ._shapes import NamedTuple
from ._wire import Frame
from ._words import traceback_of, words_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from _socket import socket
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any

    from ._leftovers import Leftovers
else:
    import _signal as signal

PEEK = _socket.MSG_PEEK | _socket.MSG_DONTWAIT if hasattr(_socket, "MSG_DONTWAIT") else 0
LOG_LIMIT_S = 1.0  # for the handlers of a log


class Setup(NamedTuple):
    """What a worker is given before its first task."""

    initializer: Callable[..., object] | None = None
    initargs: tuple[Any, ...] = ()


def main(
    channel: socket, tickets: socket | None, setup: Setup | bytes | None = None, leftovers: Leftovers | None = None
) -> None:
    """The life of a worker.  Returns when the parent asks for it or is gone.

    ``setup`` comes by inheritance (fork, or things that only travel so, like locks), or pickled with the environment;
    if None, it comes so as the first frame.  ``leftovers``: where there is a keeper.
    """
    _own_signals()
    link = _Link(_os.moved_up(channel), tickets and _os.moved_up(tickets), leftovers)
    _os.fill_standard()
    os.register_at_fork(after_in_child=link.disown)
    try:
        link.send(Frame(_wire.BOOTED, os.getpid()))
        if _prepare(link, setup):
            _serve(link)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone, and nobody can read an answer


#: What an error needs, and last, what functions of scripts need too.  (Some are traceback's, when it needs them.)
TO_COMPLETE = ("ast", "linecache", "tokenize", "traceback", f"{__package__}._payload", f"{__package__}.errors")
BY_VALUE = "cloudpickle"


def complete(*, by_value: bool = False, until: Callable[[], bool] = bool) -> None:
    """Load what an error needs, and (``by_value``) what functions of scripts need too.  Raises nothing.

    The zygote does so when its first worker is on its way; a worker that was forked before, after its first task,
    ``until`` it is wanted no more.
    """
    global _is_complete
    _is_complete = True  # even if it fails: it will again
    for name in (*TO_COMPLETE, BY_VALUE) if by_value else TO_COMPLETE:
        if until():
            return
        try:  # noqa: SIM105
            __import__(name)
        except BaseException:
            pass


_is_complete = False


def rehearse() -> None:
    """See ``_newborn.rehearse``: a setup is read, and a frame is sent and read."""
    environ, _ = _unpack.loads(_unpack.dumps_plain((dict(os.environ), ())))
    ends = _socket.socketpair()
    here, there = (_Link(end, None, None) for end in ends)
    here.send(Frame(_wire.READY, int(environ == os.environ)))
    there.next_frame()
    for end in ends:
        end.close()


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

    def __init__(self, channel: socket, tickets: socket | None, leftovers: Leftovers | None) -> None:
        self._channel = channel
        self._tickets = tickets
        self.leftovers = leftovers
        self._reader = _wire.FrameReader()
        self._frames: deque[Frame] = deque()
        self._drawn = 0
        self._pid = os.getpid()

    def disown(self) -> None:
        """In a child that a task forked: it must not speak for the worker, nor keep the parent waiting."""
        self._channel.close()
        if self._tickets is not None:
            self._tickets.close()
        if self.leftovers is not None:
            self.leftovers.close()

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

    def is_to_exit(self) -> bool:
        """Never waits."""
        try:
            if PEEK and not self._frames and self._channel.recv(1, PEEK) is not None:
                self._fill()
        except BlockingIOError:
            pass
        return bool(self._frames) and self._frames[0].kind == _wire.EXIT

    def draw(self, number: int) -> bool:
        """Draw the ticket of a call.  False: the parent took the call back."""
        if self._tickets is None:
            return True
        # Tickets are written before their calls and drawn in order: when a call is here and its
        # ticket is not, it was taken back.  A higher ticket belongs to a later call.
        while self._drawn < number:
            try:
                data = self._tickets.recv(_wire.TICKET_BYTES, _socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            if len(data) != _wire.TICKET_BYTES:
                raise EOFError
            self._drawn = _wire.ticket_in(data)
        return self._drawn == number


def _prepare(link: _Link, given: Setup | bytes | None) -> bool:
    """Run the initializer.  False: it failed, and the parent knows."""
    if given is None:
        given = link.next_frame().body
    setup: Setup
    if not isinstance(given, bytes):
        _unpack.inherit_main()
        setup = given
    try:
        if isinstance(given, bytes):
            _unpack.own_main()
            environ, setup = _unpack.loads(given)
            if os.environ != environ:
                os.environ.clear()
                os.environ.update(environ)
        if setup.initializer is not None:
            if not _is_complete:
                complete()
            setup.initializer(*setup.initargs)
        if link.leftovers is not None:
            link.leftovers.spare()
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
    try:
        import threading

        thread = threading.Thread(target=tell, args=args, kwargs={"error": error}, daemon=True)
        thread.start()
        thread.join(LOG_LIMIT_S)
    except (ImportError, OSError, RuntimeError):
        pass


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
            is_tidy = link.leftovers is None or _tidy_up(link, answer)
            del frame  # nothing of a call is kept while the worker waits
            frame = link.next_call_at_hand() if _is_complete and is_tidy else None
            link.answer(answer, 0 if frame is None else frame.number)
            del answer
            if not is_tidy:
                return  # its family ends with it
        if not _is_complete:
            complete(until=link.is_to_exit)


# What a task came to: (number, run time in seconds, pickled result), or the frame of its failure.
_Answer = tuple[int, float, bytes] | Frame


def _run(frame: Frame) -> _Answer:
    began = perf_counter()
    number = frame.number
    try:
        fn, args, kwargs, is_chunk = _unpack.loads_call(frame.body)
    except BaseException as error:
        return _failure(number, _unreadable(error), perf_counter() - began, cause=error)
    del frame
    try:
        result = [fn(*one) for one in args] if is_chunk else fn(*args, **kwargs)
    except BaseException as error:
        answer = _failure(number, error, perf_counter() - began)
        BaseException.with_traceback(error, None)  # its frames hold the arguments
        return answer
    run_s = perf_counter() - began
    del fn, args, kwargs
    try:
        return number, run_s, _unpack.dumps_result(result)
    except BaseException as error:
        return _failure(number, error, run_s)


def _tidy_up(link: _Link, answer: _Answer) -> bool:
    """End what the task left, and say what it was before the task's answer.  False: that cannot be done."""
    assert link.leftovers is not None
    number, run_s = (answer.number, answer.run_s) if isinstance(answer, Frame) else answer[:2]
    try:
        left = link.leftovers.look(run_s)
    except OSError:  # the task has left no descriptors, say
        return False
    if left:
        link.send(Frame(_wire.LEFT, number, body=_wire.encode_leftovers(left)))
    return not link.leftovers.is_hopeless()


def _unreadable(error: BaseException) -> BaseException:
    try:
        from .errors import TaskUnreadable
    except BaseException:  # it is the first call, and has left the worker unable to load this
        return error
    why = f"the call could not be unpickled in worker {os.getpid()}: {words_of(error)}"
    return TaskUnreadable(why, pid=os.getpid())


def _failure(number: int, error: BaseException, run_s: float, cause: BaseException | None = None) -> Frame:
    """The answer for a task that raised: text that always arrives, and the exception if it pickles."""
    if isinstance(error, MemoryError):
        _clear_frames(error.__traceback__)  # they hold what the memory is full of
    text = _traceback(error if cause is None else cause)
    try:
        body = _unpack.dumps_result(error)
    except BaseException as unpicklable:
        text = _traceback(unpicklable)
        try:
            body = _unpack.dumps_result(unpicklable)
        except BaseException:
            body = b""
    return Frame(_wire.RAISED, number, 0, run_s, text, body)


def _traceback(error: BaseException) -> bytes:
    return traceback_of(error).encode(errors="backslashreplace")[-_wire.MOST_TEXT :]


def _clear_frames(at: TracebackType | None) -> None:
    """As traceback's, which may not be there yet, and now there is no memory to load it."""
    while at is not None:
        try:  # noqa: SIM105
            at.tb_frame.clear()
        except RuntimeError:
            pass  # it is still running
        at = at.tb_next
