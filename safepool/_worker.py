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
import sys
from collections import deque
from itertools import count, repeat
from time import monotonic, perf_counter

from . import _batches, _os, _unpack, _wire
from ._batches import Calls, Journal
from ._log import CRITICAL, tell
from ._shapes import NamedTuple
from ._wire import Frame
from ._words import traceback_of, words_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any

    from ._leftovers import Leftovers

    #: Its number, whether its begin is told, its function's number and its arguments, or those of many; or None and the
    #: call pickled, alone or with what holds its arguments, or with None if that was lost.
    Call = tuple[int, bool, int | None, Any]
else:
    import _signal as signal

BIG = "big_data" in _os.CAPABILITIES
if BIG:
    FD_ROOM = _socket.CMSG_SPACE(4)
    CLOEXEC, LOST = _socket.MSG_CMSG_CLOEXEC, _socket.MSG_CTRUNC
LEAST_WAIT_S = 0.01
PEEK = _socket.MSG_PEEK | _socket.MSG_DONTWAIT if hasattr(_socket, "MSG_DONTWAIT") else 0
SHORTEST_S = 50e-6  # no task that took less has made a process
LOG_LIMIT_S = 1.0  # for the handlers of a log


class Setup(NamedTuple):
    """What a worker is given before its first task."""

    initializer: Callable[..., object] | None = None
    initargs: tuple[Any, ...] = ()
    workers: int = 1  # that share what may be kept for big results


def main(ends: _os.Ends, setup: Setup | bytes | None = None, leftovers: Leftovers | None = None) -> None:
    """The life of a worker.  Returns when the parent asks for it or is gone.

    ``setup`` comes by inheritance (fork, or things that only travel so, like locks), or pickled with the environment;
    if None, it comes so as the first frame.  ``leftovers``: where there is a keeper.
    """
    _own_signals()
    bulk = sys.modules.get(f"{__package__}._bulk")
    if bulk is not None:  # it was forked from a process that has it
        bulk.disown()
    link = _Link(_os.moved_up(ends), leftovers)
    _os.fill_standard()
    os.register_at_fork(after_in_child=link.disown)
    try:
        link.send(Frame(_wire.BOOTED, os.getpid()))
        if _prepare(link, setup):
            _serve(link)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone, and nobody can read an answer


#: What an error needs, and last, what functions of scripts need too.  (Some are traceback's, when it needs them.)
TO_COMPLETE = tuple(
    ["ast", "linecache", "tokenize", "traceback", f"{__package__}._payload"] + [f"{__package__}._bulk"] * BIG
)
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
    ends[0].sendall(_wire.encode(Frame(_wire.READY, int(environ == os.environ))))
    _Link(_os.Ends(ends[1], _os.End(-1), None), None).next_frame()
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
    """This worker's ends of its channel, of the pipe for its answers, and of its tickets."""

    def __init__(self, ends: _os.Ends, leftovers: Leftovers | None) -> None:
        self._ends = ends
        self._tickets = ends.tickets
        self.leftovers = leftovers
        self.write = ends.answers.write
        self._reader = _wire.FrameReader()
        self._frames: deque[tuple[int, int, float, bytes]] = deque()
        self._calls: deque[Call] = deque()
        self._drawn = 0
        self.journal = Journal(None)
        self.token: _os.End | None = None
        self._descriptors: deque[int | None] = deque()  # that came, in order; None: it is lost
        self._store: Any = None  # for big results, once there was one
        self.workers = 1
        self._read_into = self._receive if BIG else ends.channel.recv_into
        self._ticket = bytearray(_wire.TICKET_BYTES)
        self._tickets_into = [self._ticket]

    def disown(self) -> None:
        """In a child that a task forked: it must not speak for the worker, nor keep the parent waiting."""
        self._ends.close()
        if self.token is not None:
            self.token.close()
        if self.leftovers is not None:
            self.leftovers.close()
        self.write = self.journal.write = _leave_the_child  # it came back through our loop

    def send(self, frame: Frame) -> None:
        self.write(_wire.encode(frame))

    def next_frame(self) -> tuple[int, int, float, bytes]:
        while not self._frames:
            self._fill()
        return self._frames.popleft()

    def _fill(self) -> None:
        if self._store is not None:
            self._wait_and_trim()
        if not self._reader.read_from(self._read_into):
            raise EOFError
        self._frames.extend(self._reader.frames())
        if self._reader.nonsense:
            raise _wire.ProtocolError(self._reader.nonsense)

    def _receive(self, into: bytearray) -> int:
        """Bytes, and the descriptor that came with the last of them: the system ends a reading there."""
        got, more, flags, _ = self._ends.channel.recvmsg_into((into,), FD_ROOM, CLOEXEC)
        if more or flags & LOST:
            self._descriptors.append(_os.descriptor_in(more))
        return got

    def _wait_and_trim(self) -> None:
        """Return when there is something to read; give back memory when there was nothing for long."""
        channel = self._ends.channel
        while (due := self._store.trim(monotonic())) is not None:
            channel.settimeout(max(due - monotonic(), LEAST_WAIT_S))
            try:
                channel.recv(1, _socket.MSG_PEEK)
                return
            except TimeoutError:
                pass
            finally:
                channel.settimeout(None)

    def send_big(self, parts: Any) -> bytes:
        """What a task returned; the body of the frame that tells of it."""
        from . import _bulk

        if self._store is None:
            self._store = _bulk.Store(_bulk.MOST_CACHED_BYTES // self.workers)
        return _bulk.send(self._ends.channel, parts, self._store)

    def complete_call(self, call: Call) -> Call:
        """With its arguments as bytes, if the descriptor that came for them is lost.

        Scenario 1: a task has left no descriptors, and the system has dropped what it could not deliver.
        """
        number, told, function, args = call
        if function is None and type(args) is tuple and args[1] is None:
            self.send(Frame(_wire.AGAIN, number))
            while True:
                for at, frame in enumerate(self._frames):
                    if frame[:2] == (_wire.CALL, number):
                        del self._frames[at]
                        return number, told, None, frame[3]
                self._fill()
        return call

    def next_call(self, *, wait: bool) -> Call | None:
        """The next call whose ticket can be drawn; None: the worker is to exit, or (unless ``wait``) none is here."""
        calls = self._calls
        while True:
            if calls:
                call = calls.popleft()
                if self._drawn < call[0] and self._tickets is not None:
                    self._draw(call[0])
                if self._drawn == call[0] or self._tickets is None:
                    return call
            elif not self._frames:
                if not wait:
                    return None
                self._fill()
            elif self._frames[0][0] == _wire.EXIT:
                return None
            else:
                self._open(*self._frames.popleft())

    def _open(self, kind: int, number: int, _: float, body: bytes) -> None:
        if kind == _wire.BATCH:
            function, told, calls, how = _wire.batch_in(body)
            self._calls.append((number, told, function, Calls(calls, how)))
        elif kind == _wire.CALLS:
            function, told, calls = _wire.calls_in(body)
            self._calls.extend(zip(count(number), repeat(told), repeat(function), calls))
        elif kind == _wire.FUNCTION:
            _unpack.keep_function(number, body)
        elif kind == _wire.BOARD or kind == _wire.TOKEN:
            self._keep_for_batches(kind)
        elif kind == _wire.BIG_CALL:
            self._calls.append((number, _unpack.is_told(body), None, (body, self._arrived(body))))
        else:
            self._calls.append((number, _unpack.is_told(body), None, body))

    def _arrived(self, body: bytes) -> Any:
        """What came with this call.  It is closed when it is loaded, or dropped with a call that was taken back."""
        fd = self._descriptors.popleft()
        if fd is None:
            return None
        try:
            from . import _bulk
        except BaseException:  # the initializer has left the worker unable to load this
            os.close(fd)
            return None
        return _bulk.taken_in(_unpack.message_in(body), fd)

    def _keep_for_batches(self, kind: int) -> None:
        """(What did not come is done without: a death is then told of less exactly.)"""
        fd = self._descriptors.popleft()
        if fd is None:
            return
        if kind == _wire.TOKEN:
            self.token = _os.End(fd)
            return
        import mmap

        self.journal = Journal(mmap.mmap(fd, _wire.Board.BYTES))
        os.close(fd)

    def may_go_on(self, number: int) -> bool:
        """Take the token for the rest of a batch, and put it there anew.  False: the parent has it."""
        if self.token is None:
            return True
        journal = self.journal
        if _os.take_token(self.token) != _wire.token_of(number, journal.asks):
            return False
        _os.put_token(self.token, _wire.token_of(number, journal.asks + 1))
        journal.asked()
        return True

    def is_to_exit(self) -> bool:
        """Never waits."""
        try:
            if PEEK and not self._frames and self._ends.channel.recv(1, PEEK) is not None:
                self._fill()
        except BlockingIOError:
            pass
        return bool(self._frames) and self._frames[0][0] == _wire.EXIT

    def _draw(self, number: int) -> None:
        """Draw the ticket of a call.  If that is not there, the parent took the call back.

        Tickets are written before their calls and drawn in order: a higher ticket belongs to a later call.
        """
        assert self._tickets is not None
        while self._drawn < number:
            try:
                if _os.draw(self._tickets, self._tickets_into) != _wire.TICKET_BYTES:
                    raise EOFError
            except BlockingIOError:
                return
            self._drawn = _wire.ticket_in(self._ticket)


def _leave_the_child(data: bytes) -> None:
    os._exit(0)


def _prepare(link: _Link, given: Setup | bytes | None) -> bool:
    """Run the initializer.  False: it failed, and the parent knows."""
    if given is None:
        given = link.next_frame()[3]
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
        link.workers = setup.workers
        if setup.initializer is not None:
            if not _is_complete:
                complete()
            setup.initializer(*setup.initargs)
        if link.leftovers is not None:
            link.leftovers.spare()
    except BaseException as error:
        _log_unfit(error)
        link.send(Frame(_wire.UNFIT, body=_traceback(error)))
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
    while (call := link.next_call(wait=True)) is not None:
        if call[1]:
            link.send(Frame(_wire.BEGAN, call[0]))
        while call is not None:
            number = call[0]
            if type(call[3]) is Calls:
                kind, run_s, body, is_tidy = _run_batch(link, number, call[2], call[3])
            else:
                if BIG and call[2] is None:
                    call = link.complete_call(call)
                kind, run_s, body = _run(link, call)
                is_tidy = run_s < SHORTEST_S or link.leftovers is None or _tidy_up(link, number)
            del call  # nothing of a call is kept while the worker waits
            call = link.next_call(wait=False) if _is_complete and is_tidy else None
            link.write(_wire.encode_answer(kind if call is None else kind + _wire.NEXT, number, run_s, body))
            del body
            if not is_tidy:
                return  # its family ends with it
        if not _is_complete:
            complete(until=link.is_to_exit)


#: What a task came to: the kind of its frame, its run time in seconds, and the body of the frame.
_Answer = tuple[int, float, bytes]


def _run(link: _Link, call: Call) -> _Answer:
    _, _, function, args = call
    flags = 0
    kwargs: dict[str, Any] = {}
    began = perf_counter()
    try:
        if function is not None:
            fn = _unpack.function_of(function)
        else:
            fn, args, kwargs, flags = _unpack.loads_call(args)
    except BaseException as error:
        return _failure(_unreadable(error), perf_counter() - began, cause=error)
    del call
    try:
        if not flags & _unpack.CHUNK:
            result = fn(*args, **kwargs)
        else:
            result = _batches.many(fn, args, has_one=bool(flags & _unpack.ONE))
    except BaseException as error:
        answer = _failure(error, perf_counter() - began)
        BaseException.with_traceback(error, None)  # its frames hold the arguments
        return answer
    run_s = perf_counter() - began
    del fn, args, kwargs
    try:
        if type(result) in _unpack.SMALL or (flags & _unpack.CHUNK and _unpack.are_small(result)):
            return _wire.PLAIN, run_s, _wire.plain(result)
        data = _unpack.dumps_big_result(result) if BIG else _unpack.dumps_result(result)
        if type(data) is bytes:
            return _wire.RETURNED, run_s, data
        del result
        return _wire.BIG, run_s, link.send_big(data)
    except BaseException as error:
        return _failure(error, run_s)


def _run_batch(link: _Link, number: int, function: int | None, calls: Calls) -> tuple[int, float, bytes, bool]:
    """As ``_run`` and ``_tidy_up``, for many tasks."""
    assert function is not None
    try:
        fn = _unpack.function_of(function)
    except BaseException as error:
        fn = _batches.refuse(_unreadable(error))
    if link.token is not None:
        _os.put_token(link.token, _wire.token_of(number, 0))
    return _batches.run(
        link.journal,
        number,
        fn,
        calls,
        failure=lambda error: _failure(error, 0.0)[2],
        send=link.send,
        send_big=link.send_big if BIG else None,
        may_go_on=lambda: link.may_go_on(number),
        tidy_up=lambda at: link.leftovers is None or _tidy_up(link, number, at),
        shortest_s=SHORTEST_S,
    )


def _tidy_up(link: _Link, number: int, at: int = 0) -> bool:
    """End what the task left, and say what it was before the task's answer.  False: that cannot be done."""
    assert link.leftovers is not None
    try:
        left = link.leftovers.look()
    except OSError:  # the task has left no descriptors, say
        return False
    if left:
        link.send(Frame(_wire.LEFT, number, body=_wire.encode_leftovers(left, at)))
    return not link.leftovers.is_hopeless()


def _unreadable(error: BaseException) -> BaseException:
    return _unpack.TaskUnreadable(f"the call could not be unpickled in worker {os.getpid()}: {words_of(error)}")


def _failure(error: BaseException, run_s: float, cause: BaseException | None = None) -> _Answer:
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
    return _wire.RAISED, run_s, _wire.with_text(text, body)


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
