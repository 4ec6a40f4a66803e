"""The core keeps its invariants in any history that hypothesis can think of."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.core.machine import machine


def test_the_invariants_hold_in_every_history() -> None:
    """Whatever users, workers and time do, each task is settled once, and always once the faults stop."""
    run_state_machine_as_test(
        machine(),
        settings=settings(
            max_examples=250,
            stateful_step_count=50,
            report_multiple_bugs=False,
            phases=[Phase.generate],  # shrinking takes minutes; the violation tells the last steps
            suppress_health_check=list(HealthCheck),
        ),
    )
