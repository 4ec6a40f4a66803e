"""A measurement that hangs, dies or leaves processes costs its own cell, and nothing of it stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import pytest

from benchmarks import children
from benchmarks.__main__ import measure_row
from benchmarks.children import FAILED, HUNG, NOT_OFFERED, Outcome
from tests.support import LIMIT_S, is_gone, until

Play = Callable[..., Outcome]

HEAD = "import os, subprocess, sys, time\nfrom pathlib import Path\nfrom benchmarks import children\n"
#: Starts a process in a session of its own, which has lost its parent and holds the output.
LEAVE = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        Path("left").write_text(str(os.getpid()))
        time.sleep(1000)
    os._exit(0)
os.wait()
while not Path("left").exists() or not Path("left").read_text():
    time.sleep(0.01)
"""


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Plays a program as a measurement."""
    monkeypatch.chdir(tmp_path)

    def run(program: str, limit_s: float = LIMIT_S) -> Outcome:
        (tmp_path / "program_under_test.py").write_text(HEAD + program)
        return children.play("program_under_test", [], limit_s)

    return run


def test_what_it_tells_arrives(play: Play) -> None:
    """Whatever else it prints."""
    assert play("print('words')\nchildren.tell({'a': 1.5})") == Outcome({"a": 1.5})


def test_what_is_not_offered_is_said(play: Play) -> None:
    assert play("children.decline('no limits')") == Outcome(None, NOT_OFFERED, "no limits")


def test_one_that_hangs_is_ended_at_its_limit(play: Play) -> None:
    began = monotonic()
    assert play("time.sleep(1000)", 1.0) == Outcome(None, HUNG, "not done within 1 s")
    assert monotonic() - began < LIMIT_S / 2


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("raise ValueError('odd')", "exit code 1: "),
        ("os.kill(os.getpid(), 9)", "exit code -9: "),
        ("", "exit code 0: "),
    ],
)
def test_one_that_fails_says_why(play: Play, program: str, why: str) -> None:
    """An error, a death, and an end without a word."""
    told, trouble, said = play(program)
    assert (told, trouble) == (None, FAILED)
    assert said.startswith(why)
    assert "odd" not in program or said.endswith("ValueError: odd")


@pytest.mark.parametrize("end", ["children.tell(1)", "os._exit(3)", "time.sleep(1000)"])
def test_what_it_leaves_is_ended(play: Play, tmp_path: Path, end: str) -> None:
    """Even in a session of its own and without a parent; and it holds up nobody who reads the output."""
    began = monotonic()
    play(f"{LEAVE}\n{end}", 5.0)
    assert monotonic() - began < LIMIT_S / 2
    pid = int((tmp_path / "left").read_text())
    assert is_gone(pid) or Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_who_is_asked_to_end_ends_what_plays(tmp_path: Path) -> None:
    """A limit of CI's comes as SIGTERM, and what plays is in a session of its own."""
    (tmp_path / "sleeper.py").write_text(f"{HEAD}Path('pid').write_text(str(os.getpid()))\ntime.sleep(1000)")
    program = f"{HEAD}children.heed_sigterm()\nchildren.play('sleeper', [], {LIMIT_S})"
    environ = {**os.environ, "PYTHONPATH": children.python_path()}
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environ) as process:
        try:
            pid_file = tmp_path / "pid"
            until(lambda: pid_file.exists() and pid_file.read_text(), "it plays")
            process.terminate()
            assert process.wait(LIMIT_S) == 128 + signal.SIGTERM
        finally:
            process.kill()
    assert is_gone(int(pid_file.read_text()))


def test_a_spoilt_run_is_not_repeated_and_spoils_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pools take turns, and the one that hung has no figures."""
    played: list[str] = []

    def play(row: str, pool: str) -> Outcome:
        played.append(pool)
        return Outcome(None, HUNG, "not done within 1 s") if pool == "loky" else Outcome({"per_s": 1.0})

    monkeypatch.setattr("benchmarks.__main__.play", play)
    found = measure_row("noop", ["safepool", "loky", "stock"], 3)
    assert played == ["safepool", "loky", "stock", "stock", "safepool", "stock", "safepool"]
    assert found["loky"] == {"runs": [], "trouble": HUNG, "why": "not done within 1 s"}
    assert [len(found[pool]["runs"]) for pool in ("safepool", "stock")] == [3, 3]


def test_it_runs_here(play: Play) -> None:
    """On the interpreter of these tests, with the benchmarks of this checkout."""
    assert play("children.tell([sys.executable, children.__file__])").told == [sys.executable, children.__file__]
