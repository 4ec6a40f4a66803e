"""Runs CPython's own tests of its process pool with ours in its place: a script, for one class of tests at a time.

    python suite.py list                      the names of the classes, as JSON
    python suite.py NAME heal|break           runs one; JSON of {method: verdict}

The tests are those of the ``test`` package on ``sys.path``.  A verdict is "passed", "skipped" or the last line of what
went wrong.
"""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import importlib
import json
import os
import sys
import unittest
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
PACKAGE = "test.test_concurrent_futures"
PARTS = ("test_process_pool", "test_deadlock", "test_shutdown", "test_as_completed", "test_wait", "test_init")
#: These ask the parts of the stdlib's machinery that ours has not, by replacing them.
OF_THE_MACHINERY = ("_ThreadWakeup", "_ExecutorManagerThread")
PATIENCE_S = (10.0, 20.0)  # test.support's idea of a short and a long time

# Scripts that the tests start are to meet the same pool.
PRELUDE = "import multiprocessing, sys; sys.path[:0] = {folders!r}; import suite; suite.take_the_place({mode!r})\n"


def take_the_place(mode: str) -> type:
    """Put our pool, under the stdlib's name, where the tests look for the stdlib's."""
    from safepool import SafePoolExecutor

    class ProcessPoolExecutor(SafePoolExecutor):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, on_worker_death=mode, **kwargs)

    for module in (concurrent.futures, concurrent.futures.process):
        module.ProcessPoolExecutor = ProcessPoolExecutor
    return ProcessPoolExecutor


def cases(ours: type) -> dict[str, type[unittest.TestCase]]:
    """The classes of tests that are about process pools, by name."""
    from test import support

    support.SHORT_TIMEOUT, support.LONG_TIMEOUT = PATIENCE_S
    package = importlib.import_module(PACKAGE)
    in_parts = hasattr(package, "__path__")  # from 3.12 on
    modules = [importlib.import_module(f"{PACKAGE}.{part}") for part in PARTS] if in_parts else [package]
    found = {}
    for module in modules:
        for name, case in vars(module).items():
            if not (isinstance(case, type) and issubclass(case, unittest.TestCase)):
                continue
            is_ours = getattr(case, "executor_type", None) is ours and getattr(case, "ctx", None)
            if case.__module__ == module.__name__ and (is_ours or name == "FailingInitializerResourcesTest"):
                found[name] = case
    return found


def lead_scripts_to_us(mode: str) -> None:
    from test.support import script_helper

    run = script_helper.assert_python_ok
    prelude = PRELUDE.format(folders=[str(HERE.parent), *os.environ["PYTHONPATH"].split(os.pathsep)], mode=mode)

    def assert_python_ok(*args: str, **environment: Any) -> Any:
        led = (prelude + word if before == "-c" else word for before, word in zip(("", *args), args))
        return run(*led, **environment)

    for module in tuple(sys.modules.values()):
        if getattr(module, "assert_python_ok", None) is run:
            module.assert_python_ok = assert_python_ok


class Verdicts(unittest.TestResult):
    """What came of each test; written down at once, for the next may hang."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, str] = {}

    def tell(self, test: Any, verdict: str) -> None:
        name = getattr(test, "_testMethodName", None) or str(test)
        if self.told.get(name, "passed") == "passed":
            self.told[name] = verdict
            print(json.dumps({name: verdict}), flush=True)

    def addSuccess(self, test: Any) -> None:
        self.tell(test, "passed")

    def addSkip(self, test: Any, reason: str) -> None:
        self.tell(test, f"skipped: {reason}")

    def addError(self, test: Any, err: Any) -> None:
        self.tell(test, self._exc_info_to_string(err, test).strip()[-2000:])

    addFailure = addError


def asks_the_machinery(case: type, method: str) -> bool:
    import inspect

    try:
        source = inspect.getsource(getattr(case, method))
    except (OSError, TypeError):
        return False
    return any(word in source for word in OF_THE_MACHINERY)


def main(name: str, mode: str = "heal") -> None:
    ours = take_the_place(mode)
    found = cases(ours)
    if name == "list":
        print(json.dumps(sorted(found)))
        return
    lead_scripts_to_us(mode)
    case = found[name]
    # A test that the stdlib skips for itself, because it hangs, looks for the class by this name.
    concurrent.futures.ProcessPoolExecutor = type("Other", (ours,), {})
    suite = unittest.TestSuite(
        case(method)
        for method in unittest.defaultTestLoader.getTestCaseNames(case)
        if not asks_the_machinery(case, method)
    )
    suite.run(Verdicts())


if __name__ == "__main__":
    main(*sys.argv[1:])
