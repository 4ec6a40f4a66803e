"""However a program with pools ends, it does so in bounded time, with its own exit code, and leaves nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import psutil
import pytest

from tests.conftest import CONTEXTS
from tests.support import LIMIT_S, is_gone, until

EXIT_S = 12.0  # no end of these programs may take longer

HEAD = """
import atexit, multiprocessing, os, signal, sys, threading, time
from safepool import SafePoolExecutor

name, pids = sys.argv[1:]
context = None if name == "default" else multiprocessing.get_context(name)


def running(*futures):
    while not all(future.running() for future in futures):
        time.sleep(0.005)


def remember(*executors):
    with open(pids, "a") as file:
        for executor in executors:
            print(*executor._processes, file=file)


executor = SafePoolExecutor(2, context)
assert executor.submit(pow, 2, 3).result(20) == 8
remember(executor)
"""

# What the program does then; its exit code; words of its stdout; words of its stderr, None: empty.
ENDS: dict[str, tuple[str, int, str, str | None]] = {
    "idle": ("", 0, "", None),
    "idle, sys.exit": ("sys.exit(3)", 3, "", None),
    "idle, message": ("sys.exit('bye')", 1, "", "bye"),
    "busy": ("[executor.submit(print, n) for n in range(9)]; sys.exit(3)", 3, "8", None),
    "busy, not waited for": (
        "[executor.submit(print, n) for n in range(9)]; executor.shutdown(wait=False); sys.exit(3)", 3, "8", None,
    ),
    "stuck, with a timeout": ("executor.options(timeout=0.5).submit(time.sleep, 600); sys.exit(3)", 3, "", None),
    "stuck, with a deadline": (
        "[executor.options(deadline=0.5).submit(time.sleep, 600) for _ in range(9)]; sys.exit(3)", 3, "", None,
    ),
    "stuck, killed": (
        "futures = [executor.submit(time.sleep, 600) for _ in range(5)]; executor.kill_workers(); sys.exit(3)",
        3, "", None,
    ),
    "stuck, exception": (
        "future = executor.submit(time.sleep, 600); running(future); raise ValueError('mine')", 1, "", "mine",
    ),
    "stuck, exception and a hook": (
        "sys.excepthook = lambda *_: print('hooked', file=sys.stderr)\n"
        "future = executor.submit(time.sleep, 600); running(future); raise ValueError('mine')", 1, "", "hooked",
    ),
    "stuck initializer, with a deadline": (
        "SafePoolExecutor(1, context, time.sleep, (600,)).options(deadline=0.5).submit(pow, 2, 3); sys.exit(3)",
        3, "", None,
    ),
    "broken": (
        "pool = SafePoolExecutor(1, context, os._exit, (1,))\n"
        "print(type(pool.submit(pow, 2, 3).exception(20)).__name__); sys.exit(3)", 3, "WorkerStartError", None,
    ),
    "dying workers": (
        "[executor.submit(os._exit, 1) for _ in range(6)]\n"
        "[executor.submit(print, n, flush=True) for n in range(9)]; sys.exit(3)",
        3, "8", None,
    ),
    "retries": (
        "from safepool import Retry\n"
        "executor.options(retry=Retry(attempts=3, wait=0.2)).submit(os._exit, 1); sys.exit(3)", 3, "", None,
    ),
    "os._exit": ("running(executor.submit(time.sleep, 0.5)); os._exit(3)", 3, "", None),
    "SIGTERM": ("running(executor.submit(time.sleep, 0.5)); os.kill(os.getpid(), 15)", -signal.SIGTERM, "", None),
    "SIGTERM, handled": (
        "signal.signal(15, lambda *_: sys.exit(3)); running(executor.submit(time.sleep, 0.5))\n"
        "os.kill(os.getpid(), 15); time.sleep(60)", 3, "", None,
    ),
    "a thread of the user's works on": (
        "future = executor.submit(time.sleep, 0.3)\n"
        "threading.Thread(target=lambda: print(future.result(20))).start(); sys.exit(3)", 3, "None", None,
    ),
    "a daemon thread submits": (
        "def work():\n    with SafePoolExecutor(1, context) as pool:\n        while True:\n"
        "            try:\n                pool.submit(pow, 2, 3).result()\n"
        "            except RuntimeError:\n                break\n"
        "threading.Thread(target=work, daemon=True).start(); time.sleep(0.3); sys.exit(3)", 3, "", None,
    ),
    "a daemon thread waits": (
        "future = executor.submit(time.sleep, 0.5)\n"
        "threading.Thread(target=future.result, daemon=True).start(); sys.exit(3)", 3, "", None,
    ),
    "atexit shuts down": ("atexit.register(executor.shutdown); executor.submit(print, 'done'); sys.exit(3)",
                          3, "done", None),
    "atexit kills": ("atexit.register(executor.kill_workers); executor.submit(print, 'done'); sys.exit(3)",
                     3, "done", None),
    "atexit makes a pool": (
        "def late():\n    try:\n        SafePoolExecutor(1, context).submit(pow, 2, 3).result(10)\n"
        "    except RuntimeError as error:\n        print(error)\n"
        "atexit.register(late); sys.exit(3)", 3, "cannot schedule new futures", None,
    ),
    "a callback prints": (
        "executor.submit(time.sleep, 0.2).add_done_callback(lambda _: print('called')); sys.exit(3)", 3, "called", None,
    ),
    "a callback submits": (
        "def again(_):\n    try:\n        executor.submit(pow, 2, 3)\n    except RuntimeError as error:\n"
        "        print(error)\n"
        "executor.submit(time.sleep, 0.3).add_done_callback(again); sys.exit(3)", 3, "interpreter shutdown", None,
    ),
    "many pools": (
        "pools = [SafePoolExecutor(1, context) for _ in range(5)]\n"
        "[pool.submit(print, n) for n, pool in enumerate(pools)]; sys.exit(3)", 3, "4", None,
    ),
    "in a cycle": (
        "class Owner: pass\nowner = Owner(); owner.pool = executor; owner.self = owner\n"
        "executor.submit(print, 'done'); del owner, executor; sys.exit(3)", 3, "done", None,
    ),
    "a map half read": ("items = executor.map(abs, range(100)); next(items); sys.exit(3)", 3, "", None),
    "an unread error": ("executor.submit(divmod, 1, 0); sys.exit(3)", 3, "", None),
}  # fmt: skip


LONG = {
    "idle, sys.exit",
    "idle, message",
    "busy, not waited for",
    "stuck, exception",
    "retries",
    "os._exit",
    "SIGTERM, handled",
    "a daemon thread waits",
    "atexit kills",
    "many pools",
    "in a cycle",
    "a map half read",
    "an unread error",
}


@pytest.fixture
def own_folder() -> Iterator[Path]:
    """For the temporary files of programs that cannot tidy up; with a short name, for sockets."""
    folder = Path(tempfile.mkdtemp())
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def run_to_its_end(folder: Path, own_folder: Path, way: str, name: str) -> None:
    act, code, words, complaint = ENDS[way]
    script, pids = folder / "script.py", folder / "pids"
    script.write_text(HEAD + act + "\n")
    began = monotonic()
    done = subprocess.run(
        [sys.executable, str(script), name, str(pids)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(own_folder)},
    )
    assert monotonic() - began < EXIT_S
    assert done.returncode == code, done.stderr
    assert words in done.stdout
    if complaint is None:
        assert done.stderr == ""
    else:
        assert complaint in done.stderr
        assert done.stderr.count("Traceback") <= 1
        assert "safepool" not in done.stderr
    until(lambda: all(is_gone(int(pid)) for pid in pids.read_text().split()), "its workers are gone")
    until(lambda: not servers(own_folder), "its fork server is gone")


def servers(own_folder: Path) -> list[psutil.Process]:
    """The helper processes of a program whose temporary files are in ``own_folder``."""
    found = []
    for process in psutil.process_iter():
        try:
            if "forkserver" in " ".join(process.cmdline()) and process.environ().get("TMPDIR") == str(own_folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow) if way in LONG else way for way in ENDS])
def test_the_end_of_a_program(tmp_path: Path, own_folder: Path, way: str) -> None:
    """Its exit code is kept, what it has to finish is finished, stderr is its own, and no process stays."""
    run_to_its_end(tmp_path, own_folder, way, "default")


@pytest.mark.parametrize("name", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", ["busy", "SIGTERM"])
def test_the_end_of_a_program_under_every_start_method(tmp_path: Path, own_folder: Path, way: str, name: str) -> None:
    """The same for the other ways to start workers."""
    run_to_its_end(tmp_path, own_folder, way, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONTEXTS if name != "default"])
@pytest.mark.parametrize("way", ENDS)
def test_every_end_under_every_start_method(tmp_path: Path, own_folder: Path, way: str, name: str) -> None:
    """All of them."""
    run_to_its_end(tmp_path, own_folder, way, name)
