"""A worker in uninterruptible sleep cannot be killed by anybody: nothing waits for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import run_script

TOOLS = ("mkfs.ext4", "fsfreeze", "mount", "umount")
FREEZE_S = 20.0
IMAGE_BYTES = 8 << 20
SCRIPT = """
import os, subprocess, sys, time
from safepool import SafePoolExecutor, TaskTimeout

def write():
    with open(sys.argv[1] + "/file", "w") as file:
        file.write("x" * 10000)
        file.flush()
        os.fsync(file.fileno())

def state(pid):
    return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]

if __name__ == "__main__":
    pool = SafePoolExecutor(1)
    pool.submit(int).result(20)
    subprocess.run(["fsfreeze", "-f", sys.argv[1]], check=True, timeout=10)
    try:
        began = time.monotonic()
        future = pool.options(timeout=1).submit(write)
        assert isinstance(future.exception(20), TaskTimeout)
        assert state(future.worker_pid) == "D", "it is not what this test is about"
        assert pool.submit(abs, -3).result(5) == 3, "its seat was not taken"
        assert time.monotonic() - began < 10
        began = time.monotonic()
        pool.shutdown()
        assert time.monotonic() - began < 1, "shutdown waited for it"
    finally:
        subprocess.run(["fsfreeze", "-u", sys.argv[1]], check=True, timeout=10)
    for _ in range(500):
        if not os.path.exists(f"/proc/{future.worker_pid}"):
            break
        time.sleep(0.01)
    else:
        raise AssertionError("it was not ended when it could be")
"""


@pytest.fixture
def file_system(tmp_path: Path) -> Iterator[Path]:
    """One of its own, that may be frozen."""
    if sys.platform != "linux" or os.geteuid() != 0 or not all(map(shutil.which, TOOLS)):
        pytest.skip("only root can mount and freeze a file system, with its tools")
    image, folder = tmp_path / "image", tmp_path / "mounted"
    folder.mkdir()
    image.write_bytes(bytes(IMAGE_BYTES))
    for command in (["mkfs.ext4", "-q", str(image)], ["mount", "-o", "loop", str(image), str(folder)]):
        done = subprocess.run(command, capture_output=True, timeout=FREEZE_S)
        if done.returncode:
            pytest.skip(f"{command[0]}: {done.stderr.decode()}")
    try:
        yield folder
    finally:
        subprocess.run(["fsfreeze", "-u", str(folder)], capture_output=True, timeout=FREEZE_S)
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, timeout=FREEZE_S)


def test_its_future_fails_and_its_seat_is_taken(file_system: Path, tmp_path: Path) -> None:
    """A write to a frozen file system: SIGKILL has no effect until it is thawed; then the worker ends."""
    done = run_script(tmp_path / "program.py", SCRIPT, str(file_system), limit_s=60)
    assert done.returncode == 0, done.stderr
    assert "given up and replaced" in done.stderr
