"""``safepool clean``, and the next program, end what is ours and was left by everybody, and nothing else."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from safepool import CAPABILITIES, _registry, _sweeping, _tags
from tests.support import LIMIT_S, is_gone, until

pytestmark = pytest.mark.skipif("keeper" not in CAPABILITIES, reason="there is no keeper here")

# A task that leaves a daemon, and then does not end; both pids go to files, whole or not at all.
USER = """
import os, subprocess, sys, time
from safepool import SafePoolExecutor, _keep

def tell(name, pid):
    with open(f"{name}.part", "w") as file:
        file.write(str(pid))
    os.rename(f"{name}.part", name)

def leave():
    command = [sys.executable, "-c", "import os, time; os.setsid(); time.sleep(60)"]
    tell("orphan", subprocess.Popen(command, env={}).pid)
    time.sleep(60)

future = SafePoolExecutor(1).submit(leave)
for _ in range(1000):
    if _keep.keeper_pid() is not None:
        break
    time.sleep(0.01)
tell("keeper", _keep.keeper_pid())
future.exception(60)
"""
NEXT = """
import logging, time
from safepool import SafePoolExecutor
logging.basicConfig(format="%(message)s")
with SafePoolExecutor(1) as pool:
    assert pool.submit(abs, -1).result(20) == 1
    time.sleep(float({seconds!r}))
"""


# The modules are loaded while the files can be read for certain.
CLEAN_AS_USER = """
import ctypes, os, sys
from safepool import _cleaning
os.setgroups([])
os.setresgid({user}, {user}, {user})
os.setresuid({user}, {user}, {user})
ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE: as any program that a user starts, it may read of itself
sys.exit(not _cleaning.clean("kill", sys.stdout))
"""
NOBODY = 65534


class Program(NamedTuple):
    """One that is about to be killed with its keeper."""

    user: subprocess.Popen[bytes]
    keeper: int
    orphan: int
    folder: Path
    environ: dict[str, str]

    def kill(self) -> None:
        """Both at once: neither may clean up after the other."""
        self.user.send_signal(signal.SIGSTOP)
        os.kill(self.keeper, signal.SIGKILL)
        self.user.kill()
        self.user.wait(LIMIT_S)
        until(lambda: is_gone(self.keeper), "the end of the keeper")

    def clean(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "safepool", "clean", *words]
        return subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=LIMIT_S)

    def files(self) -> list[Path]:
        return [*self.folder.glob("safepool/*")]


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    environ = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    user = subprocess.Popen([sys.executable, "-c", USER], env=environ, cwd=tmp_path)
    try:
        keeper, orphan = tmp_path / "keeper", tmp_path / "orphan"
        until(lambda: keeper.exists() and orphan.exists(), "the program has left something")
        yield Program(user, int(keeper.read_text()), int(orphan.read_text()), tmp_path, environ)
    finally:
        user.kill()
        user.wait(LIMIT_S)


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """With the command line of the orphan."""
    process = subprocess.Popen([sys.executable, "-c", "import os, time; os.setsid(); time.sleep(60)"])
    yield process
    process.kill()
    process.wait(LIMIT_S)


@pytest.mark.parametrize("level", ["terminate", "kill"])
def test_clean_ends_what_user_and_keeper_have_left(
    program: Program, bystander: subprocess.Popen[bytes], level: str
) -> None:
    """A dry run names the orphan and spares it, ``--end`` ends it; a living program and a bystander are not touched."""
    assert "nothing is left" in program.clean().stdout
    assert not is_gone(program.orphan)
    program.kill()
    assert str(program.orphan) in program.clean().stdout
    assert not is_gone(program.orphan)
    done = program.clean("--end", level)
    assert done.returncode == 0, done.stdout + done.stderr
    until(lambda: is_gone(program.orphan), "the end of the orphan")
    assert bystander.poll() is None
    assert "nothing is left" in program.clean().stdout
    assert program.files() == []


def test_the_next_program_ends_what_user_and_keeper_have_left(
    program: Program, bystander: subprocess.Popen[bytes]
) -> None:
    """While the first program lives nothing of it is touched; when it was killed the next one names what it ends."""
    while_it_lives = _run_next(program, seconds=1.0)
    assert while_it_lives.stderr == ""
    assert not is_gone(program.orphan)
    program.kill()
    afterwards = _run_next(program, seconds=2.0)
    until(lambda: is_gone(program.orphan), "the end of the orphan")
    assert f"process {program.user.pid} " in afterwards.stderr
    assert f"{program.orphan} (" in afterwards.stderr
    assert bystander.poll() is None
    assert program.files() == []


def _run_next(program: Program, seconds: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", NEXT.format(seconds=seconds)]
    done = subprocess.run(command, env=program.environ, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that any user can reach; pytest's own are its user's."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def test_what_belongs_to_another_user_is_named_and_not_passed_over(open_folder: Path) -> None:
    """An ordinary user's clean may not signal what became root's: it says so, by pid, and that it is not done."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a process that an ordinary user may not signal")
    number = _tags.FIRST + (77 << 34)
    text = f"import resource, time; resource.setrlimit(10, ({number}, {number})); time.sleep(60)"
    registry = open_folder / "safepool"
    registry.mkdir()
    with subprocess.Popen([sys.executable, "-c", text]) as stranger:
        try:
            until(lambda: _sweeping.is_member(number, stranger.pid), "it wears the tag")
            facts = {**_registry.facts_of(os.getpid()), "tag": number, "boot": _registry._boot(), "user started": 1}
            (registry / f"{number:x}").write_text("".join(f"{name}: {value}\n" for name, value in facts.items()))
            for path in (open_folder, registry, registry / f"{number:x}"):
                os.chown(path, NOBODY, NOBODY)
            code = CLEAN_AS_USER.format(user=NOBODY)
            environ = {**os.environ, "XDG_RUNTIME_DIR": str(open_folder)}
            done = subprocess.run(
                [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=LIMIT_S
            )
            assert f"{stranger.pid} " in done.stdout, done.stdout + done.stderr
            assert "it is user 0's" in done.stdout
            assert done.returncode == 1
            assert stranger.poll() is None
        finally:
            stranger.kill()
