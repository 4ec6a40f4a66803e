"""Ten programs of other people's, unedited: under ``safepool run`` each finds what it finds on its own pool.

Those that are installed here are run with the interpreter of the tests; all of them in an environment of their own,
which is made here (two minutes; it needs a package index), or named in ``SAFEPOOL_PROGRAMS_ENV``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.client_programs import PROGRAMS
from benchmarks.clients import play

CONSTRAINTS = Path(__file__).parent / "constraints-programs.txt"
PROJECT = CONSTRAINTS.parent.parent.parent
NEEDS = {"sklearn": "scikit-learn", "asyncio": "pip", "map": "pip"}
INSTALL_S = 600.0
HERE = ("black", "tqdm", "asyncio", "map")


@pytest.mark.parametrize("name", HERE)
def test_a_program_that_is_here_finds_the_same(name: str) -> None:
    """The fast ones, in every run of the tests."""
    if name not in ("asyncio", "map") and find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    own, _ = play(sys.executable, name, ours=False)
    ours, _ = play(sys.executable, name, ours=True)
    assert own == ours
    assert len(ours) > 100


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of an environment with all of them."""
    if (prepared := os.environ.get("SAFEPOOL_PROGRAMS_ENV")) is not None:
        return prepared
    folder = tmp_path_factory.mktemp("programs") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=INSTALL_S)
    found = str(folder / "bin" / "python")
    wanted = [NEEDS.get(name, name) for name in PROGRAMS]
    pip = [found, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", str(CONSTRAINTS)]
    subprocess.run([*pip, "dask[array]", *wanted, str(PROJECT)], check=True, timeout=INSTALL_S)
    return found


@pytest.mark.client
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_finds_the_same(python: str, name: str) -> None:
    """Whatever pool it makes, in whatever way."""
    own, _ = play(python, name, ours=False)
    ours, _ = play(python, name, ours=True)
    assert own == ours
    assert len(ours) > 30
