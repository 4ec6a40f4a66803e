"""Who is ended is ours and nobody else's: not the neighbour in a task, not a program that lives, not the spared."""

from __future__ import annotations

import multiprocessing
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import Any

import psutil
import pytest

from safepool import CAPABILITIES, SafePoolExecutor, _tags
from tests.support import LIMIT_S, is_gone, run_script, until

pytestmark = pytest.mark.skipif("keeper" not in CAPABILITIES, reason="there is no keeper here")

Make = Callable[..., SafePoolExecutor]
STAYS_S = 0.3  # it is looked at for so long, if it must stay

PROGRAM = """
import sys, time
from safepool import SafePoolExecutor
if __name__ == "__main__":
    with SafePoolExecutor(1) as pool:
        pool.submit(time.sleep, float(sys.argv[1])).result(20)
"""


def run_programs(path: str) -> list[int]:
    """Two programs with pools, one of which ends while the other's task runs, beside a pool of this task's own."""
    Path(path).write_text(PROGRAM)
    with SafePoolExecutor(1) as own:
        future = own.submit(sleep, 2)
        programs = [subprocess.Popen([sys.executable, path, seconds]) for seconds in ("0.3", "2")]
        codes = [program.wait(LIMIT_S) for program in programs]
        future.result(LIMIT_S)
    return codes


def test_programs_of_one_task_do_not_end_each_others_workers(pool: Make, tmp_path: Path) -> None:
    """Each has a keeper with a number of its own, though all are within the family of one worker."""
    assert pool(1).submit(run_programs, str(tmp_path / "program.py")).result(LIMIT_S) == [0, 0]


def _in_child(seconds: float, answers: Any) -> None:
    with SafePoolExecutor(1) as own:
        answers.put(own.submit(_nap, seconds).result(LIMIT_S))


def _nap(seconds: float) -> float:
    sleep(seconds)
    return seconds


def with_children() -> list[float]:
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    children = [fork.Process(target=_in_child, args=(seconds, answers)) for seconds in (0.3, 1.5)]
    with SafePoolExecutor(1) as own:
        future = own.submit(_nap, 1.5)
        for child in children:
            child.start()
        found = [answers.get(timeout=LIMIT_S) for _ in children]
        for child in children:
            child.join(LIMIT_S)
        return [*found, future.result(LIMIT_S)]


def test_children_of_one_task_do_not_end_each_others_workers(pool: Make) -> None:
    """The same with multiprocessing's children, which are forked while this task's own pool is launching."""
    assert pool(1).submit(with_children).result(LIMIT_S) == [0.3, 1.5, 1.5]


FORKER = """
import multiprocessing, os, signal, subprocess, sys, time
from safepool import SafePoolExecutor, _keep

if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    pool = SafePoolExecutor(1, fork)
    future = pool.submit(time.sleep, 4)
    time.sleep(0.5)
    os.kill(_keep.keeper_pid(), signal.SIGKILL)
    time.sleep(0.1)
    other = "from safepool import SafePoolExecutor as S; p = S(1); assert p.submit(abs, -1).result(20) == 1;"
    subprocess.run([sys.executable, "-c", f"{other} import time; time.sleep(1)"], check=True, timeout=20)
    done = subprocess.run([sys.executable, "-m", "safepool", "clean", "--end", "kill"], timeout=20)
    assert done.returncode == 0
    with SafePoolExecutor(1, fork) as second:
        assert second.submit(abs, -2).result(20) == 2
    assert future.result(20) is None
    orphan = pool.submit(subprocess.Popen, ["sleep", "60"], start_new_session=True)
    assert orphan.exception(20) is not None  # (a Popen does not travel)
    assert [left.ended for left in orphan.leftovers] == [True], orphan.leftovers
"""


def test_workers_that_a_program_forked_outlive_its_keeper(tmp_path: Path) -> None:
    """Neither another program, nor ``safepool clean``, nor the program's next keeper ends them: it lives itself."""
    environ = pytest.MonkeyPatch()
    with environ.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        done = run_script(tmp_path / "program.py", FORKER, limit_s=60)
    assert done.returncode == 0, done.stderr
    assert "was killed together" not in done.stderr


def test_a_forked_worker_ends_with_its_program_whatever_it_wears(tmp_path: Path) -> None:
    """In a task that leaves something on purpose the worker itself wears that mark; it is not meant."""
    text = """
import multiprocessing, os, subprocess, sys, time, safepool
def stay(path):
    with safepool.leave_running():
        with open(path + ".part", "w") as file: file.write(str(os.getpid()))
        os.rename(path + ".part", path)
        while True: time.sleep(1)
if __name__ == "__main__":
    pool = safepool.SafePoolExecutor(1, multiprocessing.get_context("fork"))
    future = pool.submit(stay, sys.argv[1])
    time.sleep(60)
"""
    script, path = tmp_path / "program.py", tmp_path / "pid"
    script.write_text(text)
    with subprocess.Popen([sys.executable, str(script), str(path)]) as program:
        try:
            until(path.exists, "the task runs")
            sleep(0.2)  # the keeper may still be booting: not what this test is about
        finally:
            program.kill()
    until(lambda: is_gone(int(path.read_text())), "the end of the worker", 5.0)


def start_server(path: str) -> None:
    """An initializer: it starts a server that starts a process per connection, so to speak."""
    code = (
        "import os, subprocess, sys, time\n"
        "if os.fork(): os._exit(0)\n"
        "os.setsid()\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"open({path!r} + '.part', 'w').write(str(child.pid)); os.rename({path!r} + '.part', {path!r})\n"
        "time.sleep(60)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LIMIT_S)
    until(Path(path).exists, "the server runs")


def start_something() -> None:
    subprocess.Popen(["sleep", "60"], start_new_session=True)


def test_what_the_initializer_started_may_start_more(pool: Make, context: Any, tmp_path: Path) -> None:
    """A task's own leftovers are ended; children of the initializer's daemon are not, until the worker ends."""
    path = tmp_path / "child"
    executor = pool(1, context, initializer=start_server, initargs=(str(path),))
    future = executor.submit(start_something)
    future.result(LIMIT_S)
    assert [left.ended for left in future.leftovers] == [True]
    child = psutil.Process(int(path.read_text()))
    sleep(STAYS_S)
    assert child.status() != psutil.STATUS_ZOMBIE
    executor.shutdown()
    until(lambda: is_gone(child.pid), "the end of what the initializer started")


def start_orphan() -> None:
    subprocess.run(["sh", "-c", "setsid sleep 60 >/dev/null 2>&1 &"], check=True, timeout=LIMIT_S)


def test_an_orphan_is_reported_once(pool: Make, context: Any) -> None:
    """With leftovers="report" it goes on, and a later task has nothing to do with it."""
    executor = pool(1, context, leftovers="report")
    first = executor.submit(start_orphan)
    first.result(LIMIT_S)
    second = executor.submit(start_nothing)
    second.result(LIMIT_S)
    assert len(first.leftovers) == 1
    assert second.leftovers == ()


def start_nothing() -> None:
    subprocess.run(["true"], check=True, timeout=LIMIT_S)


def use_up_descriptors() -> str:
    """Leave a process, and no descriptor to look for it with."""
    subprocess.Popen(["sleep", "60"])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    return "finished"


def test_a_task_that_leaves_no_descriptors_is_finished_all_the_same(pool: Make, context: Any) -> None:
    """Its answer comes; its worker, which cannot tell what was left, ends, and what was left with it."""
    executor = pool(1, context)
    assert executor.submit(use_up_descriptors).result(LIMIT_S) == "finished"
    assert executor.submit(pow, 2, 5).result(LIMIT_S) == 32


UNTAGGED = """
import os, resource, subprocess, sys, time
from safepool import SafePoolExecutor
resource.setrlimit(10, (1000, 1000))  # a program that somebody has limited: there are no tags to be had

def start():
    subprocess.Popen(["sleep", "60"], start_new_session=True)
    time.sleep(0.5)

if __name__ == "__main__":
    other = SafePoolExecutor(2)
    running = other.submit(time.sleep, 2)
    bystander = subprocess.Popen(["sleep", "60"])
    with SafePoolExecutor(1, initializer=start) as pool:
        future = pool.submit(int)
        for _ in range(3):
            assert other.submit(abs, -3).result(20) == 3
        assert future.result(20) == 0
    assert running.result(20) is None
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait(10)
"""


def test_without_tags_nobody_is_ended_who_should_not_be(tmp_path: Path) -> None:
    """Then all workers are of one family, as far as can be told; strangers are of none."""
    done = run_script(tmp_path / "program.py", UNTAGGED, limit_s=60)
    assert done.returncode == 0, done.stderr


def test_the_mark_of_what_is_left_on_purpose_is_no_tag() -> None:
    """A daemon that was left so may use pools itself: they have no number, and touch nobody by it."""
    keeper = _tags.FIRST + (7 << 34)
    assert _tags.fresh(b"", os.getpid(), (_tags.LEFT_ON_PURPOSE, keeper)) is None
