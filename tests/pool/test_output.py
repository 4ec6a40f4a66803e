"""Nobody has to read what a program prints: a full pipe blocks who writes to it, never the pool."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.conftest import CONTEXTS
from tests.support import LIMIT_S

FLOOD = """
import multiprocessing, os, sys
from safepool import SafePoolExecutor

def flood():
    for _ in range(500):
        print("x" * 100_000)

context = None if sys.argv[1] == "default" else multiprocessing.get_context(sys.argv[1])
executor = SafePoolExecutor(2, context)
stuck, limited = executor.submit(flood), executor.options(timeout=1).submit(flood)
while not (stuck.running() and limited.running()):
    pass
print("this stays in the buffer of the program, whose pipe is full")
sys.stderr.write(f"{type(limited.exception(20)).__name__}\\n")
sys.stderr.write(f"{executor.submit(pow, 2, 3).result(20)}\\n")
sys.stderr.write(f"{stuck.running()}\\n")
executor.kill_workers()
executor.shutdown()
sys.stderr.write(f"{type(stuck.exception(0)).__name__}\\n")
os._exit(0)
"""


def family(pid: int) -> list[psutil.Process]:
    """A program and all its descendants; nothing if it is over."""
    with suppress(psutil.NoSuchProcess):
        program = psutil.Process(pid)
        return [program, *program.children(recursive=True)]
    return []


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_full_pipe_stops_only_who_writes(tmp_path: Path, name: str) -> None:
    """Fifty megabytes that nobody reads, and words of the program's own behind them: limits, seats and the end hold."""
    script = tmp_path / "script.py"
    script.write_text(FLOOD)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    environment["TMPDIR"] = str(tmp_path)  # os._exit leaves multiprocessing's directories; it must not flush stdout
    with subprocess.Popen(
        [sys.executable, str(script), name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as program:
        try:
            assert program.stderr is not None
            assert program.wait(LIMIT_S) == 0
            assert program.stderr.read().decode().split() == ["TaskTimeout", "8", "True", "PoolTerminated"]
        finally:
            for process in family(program.pid):
                process.kill()
