"""``patch`` puts our pool wherever a program holds the standard library's, and undoes exactly that."""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import importlib.util
import json
import os
import pickle
import random
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from concurrent.futures import Future
from fractions import Fraction
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import tenacity

import safepool
from safepool import SafePoolExecutor, TaskTimeout, patching
from tests.pool import tasks
from tests.support import LIMIT_S, run_script

STOCK = (
    concurrent.futures.process.ProcessPoolExecutor,
    concurrent.futures.as_completed,
    concurrent.futures.wait,
)
IMPORTS = (
    "from concurrent.futures import ProcessPoolExecutor as Pool, as_completed as done_ones, wait as wait_for_all\n"
)


@pytest.fixture
def module() -> Iterator[Any]:
    """Makes modules that import the standard library's names, each under names of its own."""
    made: list[str] = []

    def make(name: str) -> types.ModuleType:
        found = types.ModuleType(name)
        sys.modules[name] = found
        made.append(name)
        exec(IMPORTS, vars(found))
        return found

    yield make
    for name in made:
        del sys.modules[name]


def holds(module: Any) -> tuple[Any, Any, Any]:
    return module.Pool, module.done_ones, module.wait_for_all


def everything() -> dict[str, list[tuple[str, int]]]:
    """Each name of each module and what it stands for, in order."""
    return {
        name: [(key, id(value)) for key, value in vars(module).items()]
        for name, module in tuple(sys.modules.items())
        if isinstance(module, types.ModuleType) and name.partition(".")[0] not in ("safepool", "tests", "hypothesis")
    }


def test_early_and_late_importers_have_ours_and_get_theirs_back(module: Any) -> None:
    """Under whatever name a module holds the pool and its helpers, before the patch or since."""
    early = module("early_importer")
    with safepool.patch(summary=False) as patched:
        late = module("late_importer")
        for holder in (early, late):
            assert holds(holder)[0] is patched.executor
            assert not set(holds(holder)) & set(STOCK)
        assert concurrent.futures.ProcessPoolExecutor is patched.executor
        with early.Pool(2) as pool:
            futures = [pool.submit(pow, 2, n) for n in range(5)]
            assert isinstance(pool, SafePoolExecutor)
            assert sorted(f.result() for f in late.done_ones(futures, timeout=LIMIT_S)) == [1, 2, 4, 8, 16]
            assert late.wait_for_all(futures, LIMIT_S).done == set(futures)
    assert holds(early) == holds(late) == STOCK
    assert concurrent.futures.ProcessPoolExecutor is STOCK[0]


def test_it_is_undone_in_any_order_of_nesting(module: Any) -> None:
    """Whoever is undone, what is seen is the uppermost of the others."""
    early = module("early_importer")
    for order in ((0, 1, 2), (1, 0, 2), (2, 0, 1), (1, 2, 0)):
        before = everything()
        patches = [safepool.patch(summary=False, timeout=10 + n) for n in range(3)]
        active = [*patches]
        for n in order:
            assert early.Pool is concurrent.futures.ProcessPoolExecutor is active[-1].executor
            patches[n].undo()
            patches[n].undo()
            active.remove(patches[n])
        assert holds(early) == STOCK
        assert everything() == before


def test_patches_of_many_threads_leave_what_was_there(module: Any) -> None:
    """Threads that patch, import and undo as they like: when all are done every module is what it was."""
    early = module("early_importer")
    before = everything()
    trouble: list[BaseException] = []

    def play(seed: int) -> None:
        chance = random.Random(seed)
        held: list[Any] = []
        try:
            for turn in range(10):
                held.append(safepool.patch(summary=False))
                late = module(f"late_importer_{seed}_{turn}")
                assert not set(holds(late)) & set(STOCK)
                while len(held) > chance.randrange(3):
                    held.pop(chance.randrange(len(held))).undo()
            while held:
                held.pop().undo()
        except BaseException as error:
            trouble.append(error)

    threads = [threading.Thread(target=play, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert not trouble
    assert concurrent.futures.ProcessPoolExecutor is STOCK[0]
    holders = [early, *(found for name, found in tuple(sys.modules.items()) if name.startswith("late_importer_"))]
    assert {holds(holder) for holder in holders} == {STOCK}
    after = everything()
    assert {name: after[name] for name in before} == before


def test_a_fresh_interpreter_is_what_it_was(tmp_path: Path) -> None:
    """``concurrent.futures`` loads its classes when it is asked: that they were not there is restored too."""
    text = """
import concurrent.futures, sys, json
import safepool.patching
with safepool.patch():  # (what it imports becomes attributes of packages)
    pass
assert "ProcessPoolExecutor" not in vars(concurrent.futures)
before = {name: [(k, id(v)) for k, v in vars(m).items()] for name, m in sys.modules.items() if name[:8] != "safepool"}
for nested in range(3):
    with safepool.patch(), safepool.patch(timeout=3):
        from concurrent.futures import ProcessPoolExecutor
        assert ProcessPoolExecutor.__mro__[1].__name__ == "SafePoolExecutor"
del before["__main__"], before["__mp_main__"]
for name, was in before.items():
    assert [(k, id(v)) for k, v in vars(sys.modules[name]).items()] == was, name
assert "ProcessPoolExecutor" not in vars(concurrent.futures)
assert concurrent.futures.ProcessPoolExecutor.__mro__[1].__name__ == "Executor"
print("the same")
"""
    done = run_script(tmp_path / "script.py", text)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the same\n", "")


def test_what_the_program_does_meanwhile_is_its_own(module: Any) -> None:
    """A name that it binds anew stays; what it imported from safepool itself is never replaced."""
    holder = module("early_importer")
    holder.ours = SafePoolExecutor, safepool.as_completed
    holder.Mine = SafePoolExecutor
    patched = safepool.patch(summary=False)
    holder.Pool = holder.done_ones = "its own"
    patched.undo()
    assert holder.Pool == holder.done_ones == "its own"
    assert holder.Mine is SafePoolExecutor


def test_lazy_modules_are_not_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that loads itself when it is touched is not touched."""
    spec = importlib.util.find_spec("this")
    assert spec is not None
    assert spec.loader is not None
    spec.loader = importlib.util.LazyLoader(spec.loader)
    lazy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "this", lazy)
    spec.loader.exec_module(lazy)
    with safepool.patch(summary=False):
        pass
    assert "s" not in object.__getattribute__(lazy, "__dict__")


def test_the_policy_applies_to_every_pool() -> None:
    """Limits, retries and the start method, which the program has no words for, or others."""
    spawned = safepool.patch(summary=False, timeout=0.3, start_method="spawn")
    with spawned, concurrent.futures.ProcessPoolExecutor(1) as pool:
        assert pool._mp_context.get_start_method() == "spawn"
        late, prompt = pool.submit(tasks.nap, tasks.LIMIT_S), pool.submit(abs, -1)
        assert isinstance(late.exception(LIMIT_S), TaskTimeout)
        assert prompt.result(LIMIT_S) == 1
    with safepool.patch(summary=False, retry=2), concurrent.futures.ProcessPoolExecutor(1) as pool:
        failing = pool.submit(int, "no number")
        assert isinstance(failing.exception(LIMIT_S), ValueError)
        assert len(failing.attempts) == 3


@pytest.mark.parametrize(
    ("policy", "error"),
    [
        ({"timeout": -1}, ValueError),
        ({"patience": 3}, TypeError),
        ({"max_workers": 3}, TypeError),
        ({"start_method": "telepathy"}, ValueError),
        ({"summary": 3}, TypeError),
        ({"summary": "/no/such/folder/x"}, FileNotFoundError),
    ],
)
def test_a_wrong_policy_is_told_at_the_call_and_patches_nothing(policy: dict[str, Any], error: type) -> None:
    """Not by the first pool of a program that knows nothing of it."""
    with pytest.raises(error):
        safepool.patch(**{"summary": False, **policy})
    assert concurrent.futures.ProcessPoolExecutor is STOCK[0]


def test_the_stand_ins_never_raise_what_nobody_asked_for() -> None:
    """A pool that stalls: its tasks fail, each on its future, and ``as_completed`` yields them all."""
    with safepool.patch(summary=False, stall_timeout=0.4), concurrent.futures.ProcessPoolExecutor(2) as pool:
        futures = [pool.submit(tasks.nap, tasks.LIMIT_S) for _ in range(3)] + [pool.submit(abs, -1)]
        assert set(concurrent.futures.as_completed(futures)) == set(futures)
        errors = [future.exception() for future in futures]
        assert [getattr(error, "limit", None) for error in errors] == ["stall_timeout"] * 3 + [None]
        assert concurrent.futures.wait(futures).not_done == set()
        with pytest.raises(TimeoutError):
            tuple(concurrent.futures.as_completed([Future()], timeout=0.01))


def test_the_class_can_be_pickled_by_the_name_that_it_stands_in_for() -> None:
    """Where it is unpickled it is whatever is there: ours here, the standard library's in a process without a patch."""
    with safepool.patch(summary=False) as patched:
        there = pickle.dumps(patched.executor)
        assert pickle.loads(there) is patched.executor
    assert pickle.loads(there) is STOCK[0]


PROGRAM = """
import sys, os, concurrent.futures, safepool
safepool.patch(timeout=0.5, retry=safepool.Retry(attempts=2, on=("error",)), summary=SUMMARY)
def work(n):
    if n == 1: raise ValueError("a bad agent")
    if n == 2: os._exit(0)
    if n == 3:
        while True: pass
    return n
with concurrent.futures.ProcessPoolExecutor(2) as pool:
    for future in concurrent.futures.as_completed([pool.submit(work, n) for n in range(10)]):
        try: future.result()
        except Exception: pass
print("all well")
"""


def test_a_program_that_swallows_everything_is_told_on_at_its_end(tmp_path: Path) -> None:
    """It exits with 0; the summary on stderr, and in the file, has every task that failed by its name."""
    where = tmp_path / "summary.json"
    done = run_script(tmp_path / "script.py", PROGRAM.replace("SUMMARY", repr(str(where))))
    assert (done.returncode, done.stdout) == (0, "all well\n")
    told = json.loads(where.read_text())
    seconds, failures = told.pop("seconds_lost"), told.pop("failures")
    assert told == {
        "pools": 1, "done": 7, "failed": 3, "cancelled": 0, "retried": 1, "killed": 1, "workers_lost": 1,
    }  # fmt: skip
    assert 0.4 < seconds < 5
    assert [failure["task"] for failure in sorted(failures, key=str)] == [
        "task 2 (work)", "task 3 (work)", "task 4 (work)",
    ]  # fmt: skip
    words = " ".join(failure["why"] for failure in failures)
    assert "ValueError('a bad agent')" in words
    assert "EXIT(0)" in words
    assert "timeout of 0.5 s" in words
    lines = done.stderr.splitlines()
    assert lines[0].startswith("safepool: 7 tasks done, 3 failed, 0 cancelled; 1 attempts retried, 1 killed, 1 workers")
    assert len(lines) == 4


def test_nothing_is_told_where_there_is_nothing_to_tell(tmp_path: Path) -> None:
    """No pool was made; and a child that the program forked is not the program."""
    text = "import os, sys, safepool; safepool.patch()\nif os.fork() == 0: sys.exit()\nos.wait()"
    done = run_script(tmp_path / "script.py", text)
    assert (done.returncode, done.stderr) == (0, "")
    text = PROGRAM.replace("SUMMARY", "True") + "if os.fork() == 0: sys.exit()\nos.wait()"
    done = run_script(tmp_path / "script.py", text)
    assert done.stderr.count("tasks done") == 1


def test_a_stderr_that_nobody_reads_does_not_hold_the_exit(tmp_path: Path) -> None:
    """The summary of a program whose stderr is a full pipe is lost, and the program ends."""
    path = tmp_path / "script.py"
    fill = "os.set_blocking(2, False)\ntry:\n    while os.write(2, b'x' * 4096): pass\nexcept OSError: pass\n"
    path.write_text(PROGRAM.replace("SUMMARY", "True") + fill + "os.set_blocking(2, True)\n")
    read, write = os.pipe()
    try:
        with subprocess.Popen([sys.executable, str(path)], stdout=subprocess.DEVNULL, stderr=write) as process:
            assert process.wait(LIMIT_S) == 0
    finally:
        os.close(read)
        os.close(write)


def test_the_summary_can_be_asked_for_at_any_time() -> None:
    """Of the pools that were made under this patch, also when it is undone."""
    with safepool.patch(summary=False) as patched, concurrent.futures.ProcessPoolExecutor(1) as pool:
        gone, running = pool.submit(tasks.nap, tasks.LIMIT_S), pool.submit(abs, -3)
        while not gone.running():
            sleep(0.01)
        gone.kill()
        assert running.result(LIMIT_S) == 3
    end = monotonic() + LIMIT_S
    while patched.summary()["cancelled"] != 1 and monotonic() < end:
        sleep(0.01)
    told = patched.summary()
    assert (told["done"], told["cancelled"], told["killed"], told["failed"], told["workers_lost"]) == (1, 1, 1, 0, 0)
    assert told["seconds_lost"] > 0


def test_the_stand_ins_take_what_the_stdlibs_take() -> None:
    """Any number as a timeout, a wrong ``return_when`` if nothing is to be waited for, futures that come later."""
    done: Future[int] = Future()
    done.set_result(1)
    with safepool.patch(summary=False):
        for timeout in (True, False, Fraction(-1, 2), -3):
            assert list(concurrent.futures.as_completed([done], timeout=timeout)) == [done]
            assert concurrent.futures.wait([done], timeout=timeout).done == {done}
        assert concurrent.futures.wait([done], return_when="bogus").done == {done}
        with pytest.raises(TimeoutError):
            list(concurrent.futures.as_completed([Future()], timeout=Fraction(1, 50)))
        futures: list[Future[int]] = []
        found = concurrent.futures.as_completed(futures)
        futures.append(done)
        assert list(found) == [done]


def test_pools_from_before_are_what_they_were() -> None:
    """``isinstance`` with the name that a program has holds for the standard library's, and for other patches'."""
    stock = STOCK[0](1)
    with safepool.patch(summary=False):
        outer = concurrent.futures.ProcessPoolExecutor(1)
        with safepool.patch(summary=False):

            class Special(concurrent.futures.ProcessPoolExecutor):
                pass

            assert isinstance(stock, concurrent.futures.ProcessPoolExecutor)
            assert isinstance(outer, concurrent.futures.ProcessPoolExecutor)
            assert not isinstance(outer, Special)
            assert issubclass(Special, STOCK[0])
            assert not isinstance(3, concurrent.futures.ProcessPoolExecutor)
    for pool in (stock, outer):
        pool.shutdown()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("ValueError('bad value\\nsee the docs')", "ValueError: bad value"),
        ("noted()", "KeyError: 'x'"),
        ("ExceptionGroup('several', [ValueError(1), TypeError(2)])", "ExceptionGroup: several (2 sub-exceptions)"),
        ("ZeroDivisionError()", "ZeroDivisionError"),
    ],
)
def test_the_summary_names_the_error(tmp_path: Path, error: str, told: str) -> None:
    """Its type and the first line of its message, however its traceback goes on."""
    text = f"""
import safepool, concurrent.futures
def noted():
    error = KeyError("x")
    error.add_note("while loading part 7")
    return error
def fail():
    raise {error}
with safepool.patch(summary="told.json"), concurrent.futures.ProcessPoolExecutor(1) as pool:
    pool.submit(fail).exception()
"""
    assert run_script(tmp_path / "script.py", text).returncode == 0
    (failure,) = json.loads((tmp_path / "told.json").read_text())["failures"]
    assert failure["why"] == told


def test_the_summary_counts_what_cannot_be_sent_and_what_a_broken_pool_fails() -> None:
    """Calls that cannot be pickled; and all that wait when an initializer fails, each with the reason."""
    with safepool.patch(summary=False) as patched:
        with concurrent.futures.ProcessPoolExecutor(1) as pool:
            assert isinstance(pool.submit(abs, threading.Lock()).exception(LIMIT_S), TypeError)
        with concurrent.futures.ProcessPoolExecutor(1, initializer=int, initargs=("no number",)) as pool:
            futures = [pool.submit(abs, n) for n in range(3)]
            assert all(future.exception(LIMIT_S) for future in futures)
    told = patched.summary()
    assert (told["done"], told["failed"]) == (0, 4)
    whys = [failure["why"] for failure in told["failures"]]
    assert "cannot pickle" in whys[0]
    assert all("initializer" in why for why in whys[1:])


def test_a_retry_policy_that_looks_at_results_loses_no_time() -> None:
    """tenacity is asked about each result; only what is tried again was for nothing."""
    retry = tenacity.Retrying(retry=tenacity.retry_if_exception_type(ValueError), stop=tenacity.stop_after_attempt(2))
    with safepool.patch(summary=False, retry=retry) as patched, concurrent.futures.ProcessPoolExecutor(1) as pool:
        assert pool.submit(tasks.nap, 0.3, "done").result(LIMIT_S) == "done"
    assert (patched.summary()["done"], patched.summary()["seconds_lost"]) == (1, 0)


def test_patches_leave_nothing_at_the_exit() -> None:
    """One that was undone, and under which no pool was made, has nothing to tell."""
    safepool.patch().undo()
    for _ in range(20):
        safepool.patch().undo()
    assert patching._to_tell == []


def test_initargs_may_be_any_iterable() -> None:
    """As with the stock pool, one that can be gone through once."""
    with safepool.patch(summary=False):
        pool = concurrent.futures.ProcessPoolExecutor(1, initializer=int, initargs=iter(["12"]))
        with pool:
            assert pool.submit(abs, -1).result(LIMIT_S) == 1


def test_a_closed_stderr_does_not_send_the_summary_to_stdout(tmp_path: Path) -> None:
    """``sys.stderr`` is None there, and ``print`` would take it for stdout."""
    path = tmp_path / "script.py"
    path.write_text(PROGRAM.replace("SUMMARY", "True"))
    command = ["sh", "-c", f"{sys.executable} {path} 2>&-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.returncode, done.stdout) == (0, "all well\n")
