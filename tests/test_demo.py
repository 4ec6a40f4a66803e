"""The demo tells the truth about both pools, ends in time, and leaves nothing however it ends."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep

import psutil
import pytest

DEMO = (sys.executable, "-m", "safepool", "demo")
LIMIT_S = 60.0
GONE_S = 10.0
MARK = "SAFEPOOL_TEST_MARK"


class Run:
    """A demo whose processes can be told by a variable in their environment."""

    def __init__(self, mark: str, process: subprocess.Popen[str]) -> None:
        self._mark = mark
        self.process = process

    def family(self) -> list[psutil.Process]:
        """The processes of this run that are alive."""
        return [process for process in psutil.process_iter() if self._is_of_it(process)]

    def _is_of_it(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARK) == self._mark
        except (psutil.Error, OSError):  # a stranger's, or dead: a zombie has no environment
            return False

    def is_gone(self) -> bool:
        end = monotonic() + GONE_S
        while self.family() and monotonic() < end:
            sleep(0.05)
        return not self.family()

    def read_until(self, word: str) -> None:
        assert self.process.stdout is not None
        assert any(word in line for line in self.process.stdout)

    def finish(self) -> tuple[int, str]:
        """Its exit status, and what it said that was not read yet."""
        text, _ = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, text


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """A demo that was just started, in an empty directory."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    # What ignores SIGINT, as a job in the background of a script does, passes that on.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            DEMO, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
        )
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        run = Run(mark, process)
        yield run
        for member in run.family():
            member.kill()
    assert not list(tmp_path.iterdir())


def test_it_tells_what_became_of_both_pools(demo: Run) -> None:
    """Ours does 756 of 756; of the stock pool it says a hang that adds up, or that there was none."""
    status, text = demo.finish()

    assert status == 0, text
    assert "safepool did 756 of 756 in " in text
    hang = re.search(r"hung: (\d+) of 756 done, (\d+) running, (\d+) pending, (\d+) workers alive", text)
    if hang is None:
        assert re.search(r"The stock pool of Python \S+ did 756 of 756 in .* it did not hang this time", text), text
    else:
        done, running, pending, _ = map(int, hang.groups())
        assert done < 756
        assert done + running + pending == 756
    assert "\x1b" not in text, "control sequences are for terminals"
    assert "leaked" not in text
    assert demo.is_gone()


def test_ctrl_c_ends_it_quietly(demo: Run) -> None:
    """SIGINT while both pools work: status 130, no traceback, no process."""
    demo.read_until("working")
    demo.process.send_signal(signal.SIGINT)
    status, text = demo.finish()

    assert status == 130
    assert "Traceback" not in text
    assert demo.is_gone()


def test_a_closed_pipe_ends_it_quietly(tmp_path: Path) -> None:
    """A reader that has seen enough: status 1 and not a word on stderr."""
    with subprocess.Popen(DEMO, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        process.stdout = None
        _, words = process.communicate(timeout=LIMIT_S)

    assert process.returncode == 1
    assert not words


def test_its_programs_end_when_it_is_killed(demo: Run) -> None:
    """SIGKILL of the demo, which can clean nothing up any more: its programs see it and end."""
    demo.read_until("working")
    demo.process.kill()

    assert demo.is_gone()


@pytest.mark.parametrize("words", [[], ["nonsense"], ["demo", "more"]])
def test_wrong_usage_is_status_2(words: list[str]) -> None:
    """No subcommand, an unknown one, an argument too many."""
    outcome = subprocess.run(
        [sys.executable, "-m", "safepool", *words], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )

    assert outcome.returncode == 2
    assert "usage: safepool" in outcome.stderr
