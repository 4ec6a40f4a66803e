"""What the tests wait with: every wait has a bound, and says what it waited for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

import psutil

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
