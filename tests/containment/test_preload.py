"""Modules are imported once, before workers are forked, where that is safe; and pools in a namespace of their own."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from safepool import CAPABILITIES, SafePoolExecutor
from tests.support import run_script

pytestmark = pytest.mark.skipif("keeper" not in CAPABILITIES, reason="there is no keeper here")

# Tells how often each module was imported: a line in a file, by every process that does it.
IMPORTED = "import os\nwith open({log!r}, 'a') as log: log.write(f'{{__name__}} {{os.getpid()}}\\n')\n"
MODULES = {
    "tame": "",
    "with_thread": "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n",
    "with_file": "kept = open(os.devnull)\n",
    "with_process": "import subprocess\nkept = subprocess.Popen(['sleep', '20'])\n",
    "raising": "raise OSError('no licence')\n",
}
SCRIPT = """
import logging, os, sys
logging.basicConfig(format="%(message)s")
sys.path.insert(0, {folder!r})
from safepool import SafePoolExecutor

def use(name):
    module = __import__(name)
    return os.getpid(), threads()

def threads():
    return len(os.listdir("/proc/self/task"))

if __name__ == "__main__":
    for _ in range(2):
        with SafePoolExecutor(1, preload={preload!r}, max_tasks_per_child=1) as pool:
            found = [pool.submit(use, {name!r}).result(30) for _ in range(2)]
            assert len({{pid for pid, _ in found}}) == 2
            assert {{threads for _, threads in found}} <= {{1, 2}}, found
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A program whose pools preload something; ``stdout`` is filled with the imports that were made."""

    def run(name: str, preload: list[str]) -> subprocess.CompletedProcess[str]:
        log = tmp_path / "log"
        for module, body in MODULES.items():
            (tmp_path / f"{module}.py").write_text(IMPORTED.format(log=str(log)) + body)
        log.write_text("")
        script = SCRIPT.format(folder=str(tmp_path), preload=preload, name=name)
        done = run_script(tmp_path / "program.py", script, limit_s=60)
        assert done.returncode == 0, done.stderr
        done.stdout = log.read_text()
        return done

    return run


def test_a_tame_module_is_imported_once_for_all_workers(run: Run) -> None:
    """Four workers of two pools, one import, by a process that is none of them."""
    done = run("tame", ["tame"])
    assert done.stdout.split()[::2] == ["tame"]
    assert done.stderr == ""


def test_without_preload_every_worker_imports(run: Run) -> None:
    """(So the test above can fail.)"""
    assert run("tame", []).stdout.split()[::2] == ["tame"] * 4


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("with_thread", "started a thread"),
        ("with_file", "opened a file"),
        ("with_process", "started a process"),
        ("raising", "no licence"),
        ("missing", "No module named"),
    ],
)
def test_what_cannot_be_forked_is_told_once_and_workers_import_for_themselves(run: Run, name: str, why: str) -> None:
    """A thread would be missing in the workers, a file be shared by them: they are forked without the module."""
    done = run("tame", [name])
    assert done.stderr.count(why) == 1, done.stderr
    assert repr(name) in done.stderr
    assert [line for line in done.stdout.split()[::2] if line == "tame"] == ["tame"] * 4


MANY = """
import sys
sys.path.insert(0, sys.argv[1])
from safepool import SafePoolExecutor

if __name__ == "__main__":
    pools = [SafePoolExecutor(1, preload=[f"slow_{n}"]) for n in range(7)]
    futures = [pool.submit(abs, -n) for n, pool in enumerate(pools)]
    assert [future.result(30) for future in futures] == [*range(7)]
    for pool in pools:
        pool.shutdown()
"""


def test_more_preloads_at_once_than_are_kept(tmp_path: Path) -> None:
    """What is being imported is not let go of, and what there is no room for is imported by the workers."""
    for n in range(7):
        (tmp_path / f"slow_{n}.py").write_text("import time\ntime.sleep(0.5)\n")
    done = run_script(tmp_path / "program.py", MANY, str(tmp_path), limit_s=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


NUMPY = """
import os
from safepool import SafePoolExecutor

def look(_):
    import sys
    was_there = "numpy" in sys.modules
    import numpy
    square = numpy.ones((300, 300)) @ numpy.ones((300, 300))
    return was_there, os.getpid(), float(square[0, 0]), float(numpy.random.random())

if __name__ == "__main__":
    with SafePoolExecutor(2, preload=["numpy"], max_tasks_per_child=1) as pool:
        found = [*pool.map(look, range(6))]
    assert all(was_there for was_there, *_ in found), found
    assert {square for _, _, square, _ in found} == {300.0}
    assert len({number for *_, number in found}) == 6, "workers share their random numbers"
"""


def test_numpy_is_preloaded_although_its_library_has_threads(tmp_path: Path) -> None:
    """OpenBLAS ends its threads when it is forked, and starts them again; each worker has random numbers of its own."""
    pytest.importorskip("numpy")
    done = run_script(tmp_path / "program.py", NUMPY, limit_s=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


ISOLATED = """
import os, subprocess, sys, time
from safepool import SafePoolExecutor

def daemon():
    command = [sys.executable, "-c", "import os, time; os.setsid(); time.sleep(60)"]
    return os.getpid(), len([name for name in os.listdir("/proc") if name.isdigit()]), subprocess.Popen(command).pid

if __name__ == "__main__":
    try:
        pool = SafePoolExecutor(1, isolation="namespace", leftovers="leave")
    except RuntimeError as error:
        print("refused", error)
        sys.exit(0)
    inside, processes, _ = pool.submit(daemon).result(30)
    assert inside != pool.submit(int).result(30)
    (outside,) = pool._processes
    assert inside != outside and processes <= 6, (inside, outside, processes)
    print("isolated", *[line.split()[1] for line in open(f"/proc/{outside}/status") if line.startswith("NSpid")])
    pool.shutdown()
"""


def test_a_namespace_has_its_own_pids_and_takes_everything_with_it(tmp_path: Path) -> None:
    """Tasks see their own family only; where no namespace can be had the pool is refused, with the reason."""
    done = run_script(tmp_path / "program.py", ISOLATED, limit_s=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith(("isolated ", "refused "))
    if done.stdout.startswith("refused"):
        assert "cannot be had" in done.stdout
        pytest.skip(done.stdout)


@pytest.mark.parametrize("wrong", ["numpy", 3, [3], [""]])
def test_wrong_preloads_are_refused_where_they_are_given(wrong: object) -> None:
    """A str is a sequence too, and never what is meant."""
    with pytest.raises((TypeError, ValueError), match="preload"):
        SafePoolExecutor(1, preload=wrong)  # type: ignore[arg-type]
