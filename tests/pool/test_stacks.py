"""Who is stopped at a limit says first where it was, if the pool asks that; and anybody can be asked at any time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safepool import CAPABILITIES, SafePoolExecutor, TaskTimeout, _stacks
from tests.pool.stack_tasks import (
    asleep_for_long,
    busy_in_c,
    busy_in_python,
    deaf_to_all_signals,
    held_up,
    sleep_then_die,
    stopped,
)
from tests.support import LIMIT_S, SLACK_S, until

pytestmark = pytest.mark.skipif("keeper" not in CAPABILITIES, reason="workers write their stacks into a file in memory")

TIMEOUT_S = 0.3
Make = Callable[..., SafePoolExecutor]


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is asked may take as long as a loaded machine needs."""
    monkeypatch.setattr(_stacks, "ANSWER_LIMIT_S", LIMIT_S)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("task", [asleep_for_long, busy_in_python, busy_in_c])
def test_a_timeout_says_where_its_task_was(pool: Make, context: Any, task: Callable[[], None]) -> None:
    """On the error, as a note, and on the future; whatever the task does, and however its worker was started."""
    future = pool(1, context, stacks=True).options(timeout=TIMEOUT_S).submit(task)
    error = future.exception(LIMIT_S)
    assert isinstance(error, TaskTimeout)
    (note,) = error.__notes__
    assert f"in {task.__name__}" in note
    assert f"worker process {error.pid}" in note
    assert future.stacks in note


@pytest.mark.parametrize("task", [stopped, deaf_to_all_signals])
def test_who_cannot_answer_is_killed_all_the_same(pool: Make, task: Callable[[], None]) -> None:
    """50 ms later than without being asked, and nothing is said of where it was."""
    executor = pool(1, stacks=True)
    executor.submit(int).result(LIMIT_S)
    began = time.monotonic()
    future = executor.options(timeout=TIMEOUT_S).submit(task)
    error = future.exception(LIMIT_S)
    assert time.monotonic() - began < TIMEOUT_S + 0.05 + SLACK_S
    assert isinstance(error, TaskTimeout)
    assert not hasattr(error, "__notes__")
    assert future.stacks == ""


@pytest.mark.usefixtures("patient")
def test_a_later_attempt_does_not_tell_of_an_earlier_one(pool: Make, tmp_path: Path) -> None:
    """The first attempt is stopped where it sleeps; the second dies where nobody could ask it."""
    future = pool(1, stacks=True).options(timeout=TIMEOUT_S, retry=1).submit(sleep_then_die, str(tmp_path / "once"))
    error = future.exception(LIMIT_S)
    assert [attempt.cause for attempt in future.attempts] == ["timeout", "death"]
    first = future.attempts[0].error
    assert first is not None
    assert "in sleep_then_die" in first.__notes__[0]
    assert future.stacks == ""
    assert not any("was doing" in note for note in getattr(error, "__notes__", ()))  # (the attempts are one)


def test_dump_stacks_asks_everybody_and_disturbs_nobody(pool: Make, context: Any, tmp_path: Path) -> None:
    """Twice, each time anew; then the tasks end as ever."""
    executor = pool(2, context, stacks=True)
    futures = [executor.submit(held_up, str(tmp_path)) for _ in range(2)]
    until(lambda: len([*tmp_path.iterdir()]) == 2, "both run")
    for _ in range(2):
        found = executor.dump_stacks(LIMIT_S)
        assert found.keys() == {future.worker_pid for future in futures}
        assert all(text.count("in held_up") == 1 for text in found.values()), found
    (tmp_path / "go").touch()
    assert [future.result(LIMIT_S) for future in futures] == ["went on"] * 2


def test_a_pool_that_was_not_told_to_does_not_ask(pool: Make) -> None:
    """No note at a timeout, and a clear refusal of ``dump_stacks``."""
    executor = pool(1)
    error = executor.options(timeout=TIMEOUT_S).submit(asleep_for_long).exception(LIMIT_S)
    assert isinstance(error, TaskTimeout)
    assert not hasattr(error, "__notes__")
    with pytest.raises(RuntimeError, match="stacks=True"):
        executor.dump_stacks()
    with pytest.raises(TypeError, match="stacks"):
        SafePoolExecutor(1, stacks="yes")  # type: ignore[arg-type]
