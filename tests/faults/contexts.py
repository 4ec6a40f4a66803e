"""The ways to start workers, for fixtures of these tests: two of them always, the others in the long run only."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest

_SLOW = pytest.mark.slow
ALL = ("default", "fork", pytest.param("spawn", marks=_SLOW), pytest.param("forkserver", marks=_SLOW))
RETIRING = ("default", pytest.param("spawn", marks=_SLOW), pytest.param("forkserver", marks=_SLOW))


def context_of(name: str) -> Any:
    """What a pool takes as ``mp_context`` for this name."""
    return None if name == "default" else multiprocessing.get_context(name)
