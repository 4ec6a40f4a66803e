"""The simulation is worth something: it kills every seeded fault."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from safepool._core import Core
from tests.core.machine import machine
from tests.core.mutants import MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_simulation_kills(mutant: type[Core]) -> None:
    """Each seeded fault breaks an invariant, an edge of the tables or the replay within the given histories.

    The hardest are found after some hundred histories; which histories those are depends on the version of
    hypothesis and on the modules that are loaded.  A fault that is found ends the search.
    """
    with pytest.raises((AssertionError, LookupError, RuntimeError)):
        run_state_machine_as_test(
            machine(mutant),
            settings=settings(
                max_examples=6000,
                stateful_step_count=50,
                derandomize=True,
                report_multiple_bugs=False,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )


def test_there_are_enough_mutants() -> None:
    """At least twelve different faults are seeded."""
    assert len(set(MUTANTS)) >= 12
