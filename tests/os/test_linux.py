"""What is asked of Linux about processes: with and without the files that some kernels do not have."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support import LIMIT_S

if sys.platform != "linux":
    pytest.skip("this is about Linux", allow_module_level=True)

from safepool._os import linux


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait(LIMIT_S)


def test_children_are_found_without_the_file_that_lists_them(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel without CONFIG_PROC_CHILDREN: every process is asked for its parent."""
    listed = linux.children()
    assert child.pid in listed
    read, exists = linux._read, os.path.exists

    def without_children(path: str, most: int = 1 << 16) -> bytes:
        if path.endswith("/children"):
            raise FileNotFoundError(path)
        return read(path, most)

    monkeypatch.setattr(linux, "_read", without_children)
    monkeypatch.setattr(os.path, "exists", lambda path: not str(path).endswith("/children") and exists(path))
    assert sorted(linux.children()) == sorted(listed)


def test_a_process_is_named_by_its_pid_and_its_start(child: subprocess.Popen[bytes]) -> None:
    """Parent, start and tag of one that lives; nothing of one that is gone."""
    assert linux.parent_of(child.pid) == os.getpid()
    started, mine = linux.started_at(child.pid), linux.started_at(os.getpid())
    assert started is not None
    assert mine is not None
    assert started >= mine
    assert linux.tag_of(child.pid) == resource.prlimit(child.pid, 10)
    child.kill()
    child.wait(LIMIT_S)
    assert linux.parent_of(child.pid) is linux.started_at(child.pid) is linux.tag_of(child.pid) is None


def test_a_signal_goes_only_to_whom_is_still_meant(child: subprocess.Popen[bytes]) -> None:
    """The question is asked again when the process is held on to; a dead one is no error."""
    assert linux.signal_if(child.pid, lambda: False, signal.SIGKILL)
    assert child.poll() is None
    assert linux.signal_if(child.pid, lambda: True, signal.SIGTERM)
    assert child.wait(LIMIT_S) == -signal.SIGTERM
    assert linux.signal_if(child.pid, lambda: True)
