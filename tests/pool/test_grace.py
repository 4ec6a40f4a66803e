"""Who is stopped may clean up, if the pool says for how long; and then it is over."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safepool import SafePoolExecutor, TaskTimeout
from tests.support import LIMIT_S, SLACK_S, until

TIMEOUT_S, GRACE_S = 0.4, 0.6
Make = Callable[..., SafePoolExecutor]


def clean_up_and_go(folder: str) -> None:
    def clean_up(number: int, frame: object) -> None:
        Path(folder, "cleaned").touch()
        raise SystemExit

    signal.signal(signal.SIGTERM, clean_up)
    Path(folder, "begun").touch()
    time.sleep(60)


def get_ready() -> None:
    """Its worker has this module then, which takes longer to load on some machines than the limits here are."""


def take_no_notice(folder: str) -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: Path(folder, "asked").touch())
    end = time.monotonic() + 60
    while time.monotonic() < end:
        time.sleep(0.01)


def test_a_task_over_its_limit_has_its_grace(pool: Make, context: Any, tmp_path: Path) -> None:
    """SIGTERM comes first, and the outcome is the limit's, not what the task made of the signal."""
    executor = pool(1, context, grace=10.0)
    future = executor.options(timeout=1.0).submit(clean_up_and_go, str(tmp_path))
    began = time.monotonic()
    assert isinstance(future.exception(LIMIT_S), TaskTimeout)
    assert (tmp_path / "cleaned").exists()
    assert time.monotonic() - began < 1.0 + 10.0  # it went, so nobody waited for the end of its grace
    assert executor.submit(pow, 2, 5).result(LIMIT_S) == 32


def test_who_takes_no_notice_is_killed_after_it(pool: Make, tmp_path: Path) -> None:
    """Limit and grace, and not much more."""
    executor = pool(1, grace=GRACE_S)
    executor.submit(get_ready).result(LIMIT_S)
    began = time.monotonic()
    future = executor.options(timeout=TIMEOUT_S).submit(take_no_notice, str(tmp_path))
    assert isinstance(future.exception(LIMIT_S), TaskTimeout)
    assert TIMEOUT_S + GRACE_S <= time.monotonic() - began < TIMEOUT_S + GRACE_S + SLACK_S
    assert (tmp_path / "asked").exists()


def test_kill_has_the_same_grace(pool: Make, tmp_path: Path) -> None:
    """``future.kill()`` stops a task as a limit does."""
    future = pool(1, grace=10.0).submit(clean_up_and_go, str(tmp_path))
    until((tmp_path / "begun").exists, "the task runs")
    future.kill()
    until(future.done, "its end")
    until((tmp_path / "cleaned").exists, "its cleaning up")


def test_without_it_there_is_no_sigterm(pool: Make, tmp_path: Path) -> None:
    """The default: limits are exact, whatever handlers a task has."""
    future = pool(1).options(timeout=TIMEOUT_S).submit(clean_up_and_go, str(tmp_path))
    assert isinstance(future.exception(LIMIT_S), TaskTimeout)
    assert not (tmp_path / "cleaned").exists()


@pytest.mark.parametrize("wrong", [-1, float("inf"), "1", True, float("nan")])
def test_wrong_graces_are_refused(wrong: Any) -> None:
    """Where they are given."""
    with pytest.raises((TypeError, ValueError), match="grace"):
        SafePoolExecutor(1, grace=wrong)
