"""Which tasks were run, and how often: noted by workers in a file that the ``log`` fixture names."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

_log: int | None = None  # in a worker: where it notes what it runs


def note(number: int) -> None:
    global _log
    if _log is None:
        _log = os.open(os.environ["SAFEPOOL_TEST_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(_log, b"%-15d\n" % number)


def noted() -> Counter[int]:
    path = Path(os.environ["SAFEPOOL_TEST_LOG"])
    return Counter(map(int, path.read_text().split() if path.exists() else ()))


@pytest.fixture(autouse=True)
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEPOOL_TEST_LOG", str(tmp_path / "log"))
