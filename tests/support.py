"""What the tests wait with: every wait has a bound, and says what it waited for."""

from __future__ import annotations

import itertools
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import psutil

from safepool import _batches, _os, _payload, _wire

LIMIT_S = 30.0  # no wait of a test is longer, unless it says so
PROMPT_S = 2.0  # what "prompt" means for the news of a death
SLACK_S = 0.5  # what a loaded machine may add to a promised time
LOOK_S = 0.005


def until(condition: Callable[[], object], what: str, limit_s: float = LIMIT_S) -> float:
    """Wait until ``condition()`` is true; how many seconds it took.  Fails after ``limit_s``, naming ``what``."""
    began = monotonic()
    while not condition():
        assert monotonic() - began < limit_s, f"not within {limit_s:g} s: {what}"
        sleep(LOOK_S)
    return monotonic() - began


def is_gone(pid: int) -> bool:
    """No process has this pid: not even a zombie."""
    return not psutil.pid_exists(pid)


def run_script(path: Path, text: str, *args: str, limit_s: float = LIMIT_S) -> subprocess.CompletedProcess[str]:
    """Run ``text`` as the script ``path``, from its folder, in an interpreter of its own; bounded."""
    path.write_text(text)
    return subprocess.run(
        [sys.executable, str(path), *args],
        cwd=path.parent,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
        stdin=subprocess.DEVNULL,
    )


class ByHand:
    """A parent that does by hand what a link does: ``ends`` are for its worker, which draws no tickets."""

    def __init__(self) -> None:
        self.channel, channel = _os.open_channel()
        self.answers, answers = _os.open_answers()
        self.channel.settimeout(LIMIT_S)
        self.ends = _os.Ends(channel, answers, None)
        self._reader = _wire.FrameReader()
        self._frames: list[_wire.Frame] = []

    def hear(self) -> _wire.Frame:
        while not self._frames:
            assert self.read(), "the worker is gone"
            self._frames += itertools.starmap(_wire.Frame, self._reader.frames())
        return self._frames.pop(0)

    def read(self) -> int:
        """What the worker says, in bytes; 0: it has closed its end."""
        assert select.select([self.answers], [], [], LIMIT_S)[0], "the worker says nothing"
        return self._reader.read_from(self.answers.read_into)

    def post(self, number: int, fn: Any, *args: Any) -> None:
        self.channel.sendall(a_call(number, fn, *args))

    def close(self) -> None:
        _os.close(self.channel)
        _os.close(self.answers)


def a_call(number: int, fn: Any, *args: Any) -> bytes:
    """As it is sent, its function before it; its begin is told."""
    payload = _payload.dumps_call(fn, args, {})
    assert payload.function is not None
    function = _wire.Frame(_wire.FUNCTION, payload.function.number, body=payload.function.data)
    call = _wire.Frame(_wire.CALL, number, body=b"".join(payload.parts(told=True)))
    return _wire.encode(function) + _wire.encode(call)


def words_and_value(answer: _wire.Frame) -> tuple[bytes, Any]:
    """What a worker sent for a task: the text for people, if it raised, and the value or the exception."""
    if answer.kind == _wire.PLAIN:
        return b"", _wire.plain_in(answer.body)
    text, body = _wire.text_and_body(answer.body) if answer.kind == _wire.RAISED else (b"", answer.body)
    return text, _payload.loads(body)


def write_down(journal: Any, value: Any) -> None:
    """As a worker does when a task of a batch came to this."""
    journal.write(_wire.plain(value))
    journal.head[_batches.ENDED] += 1
