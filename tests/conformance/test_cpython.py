"""CPython's own tests of its process pool pass with ours in its place, but for the one that is against healing."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest

SUITE = Path(__file__).with_name("suite.py")
ROOT = SUITE.parent.parent.parent
LIMIT_S = 100.0  # for one class of tests
AT_ONCE = 4
#: A folder like lib/python3.10/test, for an interpreter that ships no tests of its own.
BORROWED = "SAFEPOOL_CPYTHON_TESTS"
#: ``submit`` is to raise for ever after one death: "break" is for those who want it, "heal" is why we are here.
AGAINST_HEALING = {"test_killed_child"}


@cache
def _tests_of_cpython() -> tuple[Path | None, str]:
    """The folder to borrow tests from (None: this interpreter has them), or why there are none."""
    if _has_own():
        return None, ""
    where = [Path(os.environ[BORROWED])] if BORROWED in os.environ else []
    if sys.version_info < (3, 12):  # what came later is foreign to them
        where += sorted((Path.home() / ".pyenv" / "versions").glob("3.10.*/lib/python3.10/test"))
    for folder in where:
        if list(folder.glob("test_concurrent_futures*")):
            return folder, ""
    return None, f"Python {sys.version.split()[0]} ships no tests; {BORROWED}=.../lib/python3.10/test names others"


def _has_own() -> bool:
    try:
        return importlib.util.find_spec("test.test_concurrent_futures") is not None
    except ImportError:
        return False


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where the child finds the tests: with borrowed ones, a package of links to our own and to those."""
    folder, missing = _tests_of_cpython()
    if missing:
        pytest.skip(missing)
    paths = [str(ROOT)]
    if folder is not None:
        package = tmp_path_factory.mktemp("borrowed") / "test"
        package.mkdir()
        for entry in (Path(os.__file__).parent / "test").iterdir():
            if entry.name != "__pycache__":
                (package / entry.name).symlink_to(entry)
        for entry in folder.glob("test_concurrent_futures*"):
            (package / entry.name).symlink_to(entry)
        paths.insert(0, str(package.parent))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _run(environment: dict[str, str], *args: str) -> list[dict[str, str]]:
    """What the child printed, line by line."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SUITE), *args],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    # The tests print the time they took in front.
    return [json.loads(found[0]) for line in done.stdout.splitlines() if (found := re.search(r"[{\[].*", line))]


def _classes() -> list[str]:
    """The names of the classes of tests; fixed here, so that a class that is not found is a failure and no silence."""
    kinds = ["AsCompletedTest", "ExecutorDeadlockTest", "FailingInitializerTest", "InitializerTest"]
    kinds += ["ProcessPoolExecutorTest", "ProcessPoolShutdownTest", "WaitTest"]
    return [f"ProcessPool{method}{kind}" for method in ("Fork", "Spawn", "Forkserver") for kind in kinds]


@pytest.fixture(scope="module")
def verdicts(environment: dict[str, str], request: pytest.FixtureRequest) -> dict[tuple[str, str], Any]:
    """(class, mode) -> {method: verdict}, or the error that came instead.

    The tests spend their time asleep, so a few run at once; all before the first audit, which would see them.
    """
    wanted = [asked for item in request.session.items if (asked := _asked_by(item)) is not None]

    def tell(name: str, mode: str) -> Any:
        try:
            return {method: verdict for line in _run(environment, name, mode) for method, verdict in line.items()}
        except (AssertionError, subprocess.TimeoutExpired) as error:
            return error

    with ThreadPoolExecutor(AT_ONCE) as threads:
        return dict(zip(wanted, threads.map(lambda asked: tell(*asked), wanted)))


def _asked_by(item: pytest.Item) -> tuple[str, str] | None:
    params = getattr(getattr(item, "callspec", None), "params", {})
    return (params["name"], params["mode"]) if item.path == Path(__file__) and "mode" in params else None


def _classes() -> list[str]:
    """The names of the classes of tests; fixed here, so that a class that is not found is a failure and no silence."""
    kinds = ["AsCompletedTest", "ExecutorDeadlockTest", "FailingInitializerTest", "InitializerTest"]
    kinds += ["ProcessPoolExecutorTest", "ProcessPoolShutdownTest", "WaitTest"]
    return [f"ProcessPool{method}{kind}" for method in ("Fork", "Spawn", "Forkserver") for kind in kinds]


ALL = [(name, "heal") for name in _classes()]
# Where a death matters; the rest of "break" is for ``nox -s slow``.
ALL += [
    pytest.param(name, "break", marks=[] if "PoolExecutorTest" in name or "Deadlock" in name else pytest.mark.slow)
    for name in _classes()
]


@pytest.mark.timeout(10 * LIMIT_S)
@pytest.mark.parametrize(("name", "mode"), ALL)
def test_as_the_pool_of_the_standard_library(verdicts: Any, name: str, mode: str) -> None:
    """Every test of the class passes; of a pool that heals all but the one that wants it to stay broken."""
    _check(verdicts[name, mode], mode)


def _check(told: Any, mode: str) -> None:
    if isinstance(told, Exception):
        raise told
    expected = AGAINST_HEALING if mode == "heal" else set()
    failed = {method for method, verdict in told.items() if verdict != "passed" and not verdict.startswith("skipped")}
    assert "passed" in told.values(), told
    assert failed == expected & set(told), "\n".join(told[method] for method in sorted(failed - expected)) or told


def test_an_initializer_that_fails_leaks_nothing(environment: dict[str, str]) -> None:
    """The tracker of shared resources has nothing to say at its end."""
    if "FailingInitializerResourcesTest" not in _run(environment, "list")[0]:
        pytest.skip("this version of the tests does not ask")
    _check(_run(environment, "FailingInitializerResourcesTest", "heal")[0], "heal")


def test_no_class_of_tests_is_forgotten(environment: dict[str, str]) -> None:
    """What the tests have for process pools is what is run here."""
    assert set(_run(environment, "list")[0]) - {"FailingInitializerResourcesTest"} == set(_classes())
