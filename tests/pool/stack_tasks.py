"""What is stopped in the tests of stacks: here, for a limit runs while a worker imports this, and not pytest."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path


def asleep_for_long() -> None:
    time.sleep(60)


def busy_in_python() -> None:
    while True:
        pass


def busy_in_c() -> None:
    re.match(r"(a+)+$", "a" * 40 + "b")


def stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def deaf_to_all_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
    time.sleep(60)


def held_up(folder: str) -> str:
    Path(folder, str(os.getpid())).touch()
    while not Path(folder, "go").exists():
        time.sleep(0.01)
    return "went on"


def sleep_then_die(path: str) -> None:
    if Path(path).exists():
        os._exit(7)
    Path(path).touch()
    time.sleep(60)
