"""Incident 001 cannot happen: workers that retire are replaced, and every task is answered."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable
from concurrent.futures import wait
from typing import Any

import pytest

from safepool import SafePoolExecutor
from tests.pool.tasks import echo, size
from tests.support import LIMIT_S

TASKS, WORKERS, TASKS_PER_WORKER = 756, 32, 10
ARGUMENT = bytes(10_000)
INCIDENT_LIMIT_S = 90.0  # 76 workers, each a new interpreter under "spawn"

MakePool = Callable[..., SafePoolExecutor]


def test_every_world_of_the_tournament_is_played(pool: MakePool, retiring_context: Any) -> None:
    """756 tasks on 32 workers that retire after ten each give 756 right answers."""
    executor = pool(WORKERS, retiring_context, max_tasks_per_child=TASKS_PER_WORKER)
    futures = [executor.submit(size, index, ARGUMENT) for index in range(TASKS)]
    assert not wait(futures, INCIDENT_LIMIT_S).not_done
    assert [future.result(LIMIT_S) for future in futures] == [(index, len(ARGUMENT)) for index in range(TASKS)]
    executor.shutdown(wait=False)


def test_fork_refuses_workers_that_retire() -> None:
    """``max_tasks_per_child`` with the "fork" start method is refused in the words of the standard library."""
    with pytest.raises(ValueError, match="max_tasks_per_child is incompatible with the 'fork' multiprocessing start"):
        SafePoolExecutor(WORKERS, multiprocessing.get_context("fork"), max_tasks_per_child=TASKS_PER_WORKER)


def triples(seed: int, count: int) -> list[tuple[int, int, int]]:
    """(workers, tasks per worker, tasks): the smallest ones first, then drawn ones."""
    draw = random.Random(seed)
    fixed = [(1, 1, 2), (1, 2, 1), (2, 1, 3), (2, 2, 3), (1, 1, 12), (4, 1, 30)]
    drawn = [(draw.randint(1, 4), draw.randint(1, 4), draw.randint(0, 30)) for _ in range(count - len(fixed))]
    return fixed + drawn


def check(pool: MakePool, context: Any, workers: int, tasks_per_child: int, tasks: int) -> None:
    executor = pool(workers, context, max_tasks_per_child=tasks_per_child)
    futures = [executor.submit(echo, index) for index in range(tasks)]
    assert [future.result(LIMIT_S) for future in futures] == list(range(tasks)), (workers, tasks_per_child, tasks)
    # When all is idle, or retiring, one more task finds a worker too.
    assert executor.submit(echo, "one more").result(LIMIT_S) == "one more", (workers, tasks_per_child, tasks)
    assert len(executor._processes) <= workers
    executor.kill_workers()


def test_any_number_of_workers_turns_over(pool: MakePool) -> None:
    """Forty pools of drawn sizes answer all their tasks, and one more."""
    for triple in triples(seed=1, count=40):
        check(pool, None, *triple)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_any_number_of_workers_turns_over_for_long(pool: MakePool, retiring_context: Any) -> None:
    """Two hundred pools of drawn sizes answer all their tasks under every start method that allows it."""
    for triple in triples(seed=2, count=200):
        check(pool, retiring_context, *triple)
