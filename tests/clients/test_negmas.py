"""A real program's law: the tournament that freezes on the standard pool finishes on ours, score for score.

The programs are negmas 0.11.3 with scml 0.7.7, and negmas 0.16.0 with scml 0.8.4, which runs on Pebble's pool; each in
an environment of its own that is made here (a minute or two; it needs a package index).  Environment variables:

* ``SAFEPOOL_CLIENT_PYTHON``: the Python 3.12 to make it with; else pyenv's, else ``python3.12`` on the PATH;
* ``SAFEPOOL_CLIENT_ENV``, ``SAFEPOOL_NEW_CLIENT_ENV``: the Python of an environment that has them already.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

pytestmark = [pytest.mark.client, pytest.mark.timeout(1500)]

HERE = Path(__file__).parent
PROJECT = HERE.parent.parent
SHARED = Path("/dev/shm")
SCRIPT = HERE / "tournament.py"
OLD = "SAFEPOOL_CLIENT_ENV"
NEW = "SAFEPOOL_NEW_CLIENT_ENV"
CLIENTS = {
    OLD: ("constraints-negmas.txt", "negmas==0.11.3", "scml==0.7.7"),
    NEW: ("constraints-negmas-new.txt", "negmas==0.16.0", "scml==0.8.4"),
}
MARK = "SAFEPOOL_CLIENT_RUN"  # every process of a run inherits it, in whatever session or group it is
WORLDS, WORKERS, RECYCLE = 30, 8, 2
THEIRS = runpy.run_path(str(SCRIPT))
GAVE_UP, PLAYERS = THEIRS["GAVE_UP"], THEIRS["PLAYERS"]

ASK_S = 60.0  # for a Python to say its version
VENV_S = 120.0
INSTALL_S = 600.0
PLAY_S = 300.0
GIVE_UP_S = 90.0  # a world takes a second; a worker imports for three
LEAVE_S = 10.0  # for the processes of a run to be gone after it
TOLD = 3000  # characters of output in a message


# ---------------------------------------------------------------- the environment


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Filled as they are needed."""
    return {}


@pytest.fixture
def client_python(environments: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of an environment with the old negmas and scml, and what safepool needs."""
    return _environment(OLD, environments, tmp_path_factory)


@pytest.fixture(params=[OLD, NEW], ids=["old", "new"])
def either_python(
    request: pytest.FixtureRequest, environments: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The same, or with the new ones."""
    return _environment(request.param, environments, tmp_path_factory)


def _environment(which: str, made: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    if (prepared := os.environ.get(which)) is not None:
        if not shutil.which(prepared):
            pytest.fail(f"{which} must be the Python of an environment; {prepared!r} is no program")
        return prepared
    if which not in made:
        base = _python_3_12()
        if base is None:
            pytest.skip("no Python 3.12 found for negmas; name one in SAFEPOOL_CLIENT_PYTHON")
        folder = tmp_path_factory.mktemp("client") / "venv"
        _succeed([base, "-m", "venv", str(folder)], VENV_S)
        made[which] = str(folder / "bin" / "python")
        pip = [made[which], "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        constraints, *wanted = CLIENTS[which]
        _succeed([*pip, "--constraint", str(HERE / constraints), *wanted, str(PROJECT)], INSTALL_S)
    return made[which]


def _python_3_12() -> str | None:
    if named := os.environ.get("SAFEPOOL_CLIENT_PYTHON"):
        candidates = [named]
    else:
        candidates = [str(path) for path in sorted(Path.home().glob(".pyenv/versions/3.12.*/bin/python3.12"))]
        candidates.append("python3.12")
    return next(filter(_works, candidates), None)


def _works(python: str) -> bool:
    """A shim on the PATH may be there and lead nowhere."""
    try:
        subprocess.run([python, "-c", "import venv, ensurepip"], check=True, capture_output=True, timeout=ASK_S)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def _succeed(command: list[str], limit_s: float) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    said = (done.stdout + done.stderr)[-TOLD:]
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{said}"


# -------------------------------------------------------------------- one tournament


class Played(NamedTuple):
    """What is left of a run: exit code, output, score table (None: none was written), processes not gone."""

    exitcode: int
    output: str
    report: dict[str, Any] | None
    left: list[str]


def play(python: str, folder: Path, pool: str, *more: str) -> Played:
    """Run ``tournament.py``.  Never waits for more than its limits, and leaves no process behind."""
    out, log, mark = folder / f"{pool}.json", folder / f"{pool}.log", uuid.uuid4().hex
    command = [python, str(SCRIPT), "--pool", pool, "--out", str(out)]
    command += ["--worlds", str(WORLDS), "--workers", str(WORKERS), "--recycle", str(RECYCLE)]
    command += ["--give-up", str(GIVE_UP_S), *more]
    environ = {**os.environ, MARK: mark, "PYTHONHASHSEED": "0"}
    environ.pop("PYTHONPATH", None)
    if OLD in environ or NEW in environ:
        environ["PYTHONPATH"] = str(PROJECT)  # a prepared environment may have no safepool, or an old one
    try:
        # To a file: a pipe would be held open by whatever the run leaves behind.
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environ, cwd=folder
            )
            try:
                exitcode = process.wait(PLAY_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(LEAVE_S)
                pytest.fail(f"the {pool} run did not end within {PLAY_S:g} s:\n{_tail(log)}")
        left = [_describe(process) for process in _left(mark)]
    finally:
        for stray in _of(mark):
            with suppress(psutil.NoSuchProcess):  # it ended by itself
                stray.kill()
    report = json.loads(out.read_text(encoding="utf-8")) if out.exists() else None
    return Played(exitcode, _tail(log), report, left)


def _left(mark: str) -> list[psutil.Process]:
    """The processes of a run that are not gone in time."""
    end = time.monotonic() + LEAVE_S
    while (left := _of(mark)) and time.monotonic() < end:
        psutil.wait_procs(left, timeout=0.2)
    return left


def _of(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found.append(process)
        except (psutil.Error, OSError):
            pass  # somebody else's, a zombie, or gone by now
    return found


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid}: {' '.join(process.cmdline())}"
    except psutil.Error:
        return f"{process.pid}: gone by now"


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-TOLD:]


# -------------------------------------------------------------------------- the tests


def test_with_our_pool_all_worlds_are_played_and_the_scores_are_those_of_a_serial_run(
    client_python: str, tmp_path: Path
) -> None:
    """With ``patch()``, and workers replaced after every two worlds, the tournament ends as if played serially."""
    serial = play(client_python, tmp_path, "serial")
    assert serial.exitcode == 0, serial.output
    ours = play(client_python, tmp_path, "safepool")
    assert ours.exitcode == 0, ours.output
    assert serial.report is not None
    assert ours.report is not None
    assert ours.report["futures"] == ["safepool.future.SafeFuture"], "it must have been our pool"
    assert (serial.report["worlds"], ours.report["worlds"]) == (WORLDS, WORLDS)
    assert len(serial.report["scores"]) == WORLDS * PLAYERS
    assert ours.report["scores"] == serial.report["scores"]
    # Means, of scores in the order in which the worlds ended: the last digit may differ.
    totals = [dict(report["totals"]) for report in (ours.report, serial.report)]
    assert totals[0] == pytest.approx(totals[1], rel=1e-12)
    assert (serial.left, ours.left) == ([], []), "no process outlives its run"


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The score tables of serial runs, by environment: each is played once."""
    return {}


FEW = ("--worlds", "12", "--workers", "2")


@pytest.mark.parametrize("fault", THEIRS["FAULTS"])
def test_under_a_fault_every_other_world_is_as_if_nothing_had_happened(
    either_python: str, serial: dict[str, Any], tmp_path: Path, fault: str
) -> None:
    """Each world is done or failed by name; the scores of those that are done are the serial run's; nothing is left."""
    if either_python not in serial:
        alone = play(either_python, tmp_path, "serial", *FEW)
        assert alone.report is not None, alone.output
        serial[either_python] = alone.report["scores"]
    ours = play(either_python, tmp_path, "safepool", *FEW, "--fault", fault)
    assert ours.report is not None, ours.output
    told = json.loads((tmp_path / "safepool.summary").read_text())
    there = {world for world, _, _ in ours.report["scores"]}
    missing = set(range(12)) - there
    assert ours.exitcode == (1 if missing else 0)
    assert ours.report["scores"] == [row for row in serial[either_python] if row[0] in there]
    # (A worker that is killed between two worlds takes none with it.)
    assert len(missing) == told["failed"] == len(told["failures"]) <= (2 if fault == "kill all" else 1)
    assert told["done"] == 12 - len(missing)
    if fault not in ("kill one", "kill all"):
        assert missing == {THEIRS["BAD_WORLD"]}
        words = {"exit": "EXIT(0)", "stuck": "longer than its timeout", "print": "longer than its timeout"}
        assert words[fault] in told["failures"][0]["why"]
    assert ours.left == [], "no process outlives its run"


@pytest.fixture
def stock_semaphores() -> Iterator[None]:
    """Those that the standard library's pool leaves behind when its program is ended while it hangs."""
    there = set(SHARED.glob("sem.mp-*"))
    yield
    for path in set(SHARED.glob("sem.mp-*")) - there:
        path.unlink(missing_ok=True)


@pytest.mark.usefixtures("stock_semaphores")
def test_with_the_standard_pool_the_same_tournament_hangs_and_the_script_says_so(
    client_python: str, tmp_path: Path
) -> None:
    """On the standard pool futures stay running when no worker is left; the script gives up and cleans up."""
    stock = play(client_python, tmp_path, "stock")
    assert stock.exitcode == GAVE_UP, f"{stock.exitcode=}\n{stock.output}"
    assert stock.report is None
    counts = re.search(r"Done=(\d+) Running=(\d+) Pending=(\d+)", stock.output)
    assert counts, stock.output
    done, running, pending = map(int, counts.groups())
    assert done + running + pending == WORLDS
    # Usually 16 (8 workers x 2 worlds) and 9 (the depth of its call queue).
    assert 0 < done < WORLDS, counts.group()
    assert running > 0, counts.group()
    assert stock.left == [], "no process outlives its run"
