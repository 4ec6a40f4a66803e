"""The fixtures of the fault tests: as everywhere, but two of the ways to start workers are for the long run only."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults import contexts


@pytest.fixture(params=contexts.ALL)
def context(request: pytest.FixtureRequest) -> Any:
    """How a pool starts its workers."""
    return contexts.context_of(request.param)


@pytest.fixture(params=contexts.RETIRING)
def retiring_context(request: pytest.FixtureRequest) -> Any:
    """The same, where ``max_tasks_per_child`` is allowed."""
    return contexts.context_of(request.param)
