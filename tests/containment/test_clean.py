"""``safepool clean`` ends what is ours and was left by everybody, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from safepool import CAPABILITIES
from tests.support import LIMIT_S, is_gone, until

pytestmark = pytest.mark.skipif("keeper" not in CAPABILITIES, reason="there is no keeper here")

USER = """
import os, subprocess, sys, time
from safepool import SafePoolExecutor, _keep

def leave():
    command = [sys.executable, "-c", "import os, time; os.setsid(); print(os.getpid(), flush=True); time.sleep(60)"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env={})
    print("left", child.stdout.readline().decode().strip(), flush=True)
    time.sleep(60)

pool = SafePoolExecutor(1)
future = pool.submit(leave)
while _keep.keeper_pid() is None or future.worker_pid is None:
    time.sleep(0.01)
print("keeper", _keep.keeper_pid(), flush=True)
future.result()
"""


def _clean(environ: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "safepool", "clean", *words]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("level", ["terminate", "kill"])
def test_clean_ends_what_user_and_keeper_have_left(tmp_path: Path, level: str) -> None:
    """Both were killed at once: a dry run names the orphan and spares it, and ``--end`` ends it, not a bystander."""
    environ = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    user = subprocess.Popen([sys.executable, "-c", USER], env=environ, stdout=subprocess.PIPE, text=True)
    try:
        assert user.stdout is not None
        told = dict(user.stdout.readline().split() for _ in range(2))
        orphan = int(told["left"])
        assert "nothing is left" in _clean(environ).stdout  # the keeper lives: nothing is touched
        user.send_signal(signal.SIGSTOP)  # it may not clean up itself
        os.kill(int(told["keeper"]), signal.SIGKILL)
        user.kill()
        user.wait(LIMIT_S)
        assert str(orphan) in _clean(environ).stdout
        assert not is_gone(orphan)
        done = _clean(environ, "--end", level)
        assert done.returncode == 0, done.stdout + done.stderr
        until(lambda: is_gone(orphan), "the end of the orphan")
        assert bystander.poll() is None
        assert "nothing is left" in _clean(environ).stdout
    finally:
        for process in (user, bystander):
            process.kill()
            process.wait(LIMIT_S)
        if user.stdout is not None:
            user.stdout.close()
