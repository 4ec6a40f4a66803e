"""Many futures through one pool while workers die, tasks are cancelled and the pool closes: each resolves once."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.stress import Stress


def run(count: int, context: Any) -> None:
    stress = Stress(count, 4, context, seed=count)
    stress.run()
    assert not stress.faults
    assert stress.resolved >= count
    assert {"answered", "cancelled", "ValueError"} <= set(stress.kinds)


def test_some_thousands() -> None:
    """Every future is called done exactly once, with its own answer or an error that is its own."""
    run(20_000, None)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_thousand(context: Any) -> None:
    """The same for longer, with each way to start workers."""
    run(100_000, context)
