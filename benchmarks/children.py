"""A measurement plays in a process of its own under a hard limit, and whatever that has started is ended after it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NamedTuple, NoReturn

import psutil

MARK = "BENCHMARK_CELL"  # in the environment of such a process and of all that it starts
END_S = 5.0  # for everything that is killed to be gone
LOOK_S = 0.01
TOLD = 2000  # characters of what a process that failed said last
HUNG, FAILED, NOT_OFFERED = "hung", "failed", "n/a"


class Outcome(NamedTuple):
    """What a process told, or why it told nothing: ``HUNG``, ``FAILED`` or ``NOT_OFFERED``, and the evidence."""

    told: Any
    trouble: str = ""
    why: str = ""


def play(module: str, words: Sequence[str], limit_s: float, environ: Mapping[str, str] | None = None) -> Outcome:
    """Run ``python -m module words``, which ends with ``tell`` or ``decline``; an ``Outcome`` in any case."""
    with tempfile.TemporaryDirectory(prefix="play-", ignore_cleanup_errors=True) as folder:
        mark = uuid.uuid4().hex
        # What is temporary goes there, too: a socket of a fork server, say.
        own = {**os.environ, **(environ or {}), "PYTHONPATH": python_path(), MARK: mark, "TMPDIR": folder}
        # Files, not pipes: whatever a pool leaves may hold an end of a pipe for ever.
        with Path(folder, "out").open("wb") as out, Path(folder, "errors").open("wb") as errors:
            child = subprocess.Popen(
                [sys.executable, "-m", module, *words],
                env=own,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                start_new_session=True,
            )
        try:
            child.wait(limit_s)
        except subprocess.TimeoutExpired:
            return Outcome(None, HUNG, f"not done within {limit_s:g} s")
        finally:
            end_all(child, mark)
        said = Path(folder, "errors").read_text(errors="replace").strip()
        return _outcome(child.returncode, Path(folder, "out").read_text(errors="replace"), said)


def python_path() -> str:
    """So that a process finds this checkout, wherever it runs."""
    return os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])


def _outcome(code: int, out: str, errors: str) -> Outcome:
    """From what a process said in its last line."""
    with suppress(ValueError, IndexError, KeyError, TypeError):
        last = json.loads(out.splitlines()[-1])
        return Outcome(None, NOT_OFFERED, last["declined"]) if "declined" in last else Outcome(last["told"])
    return Outcome(None, FAILED, f"exit code {code}: {errors[-TOLD:]}")


def tell(what: Any) -> NoReturn:
    """The end of such a process: a pool that is of no use would not let it end, and is ended from without."""
    _end({"told": what})


def decline(why: object) -> NoReturn:
    """The same, when the pool has no such feature."""
    _end({"declined": str(why)})


def _end(words: dict[str, Any]) -> NoReturn:
    print("\n" + json.dumps(words), flush=True)
    os._exit(0)


def heed_sigterm() -> None:
    """For programs that play: when they are asked to end, what plays is ended, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def marked(session: int, mark: str) -> Iterator[psutil.Process]:
    """The living processes of a cell, whoever their parents are: by their session, or by their environment."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            is_candidate = process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
            if is_candidate and (os.getsid(process.pid) == session or process.environ().get(MARK) == mark):
                yield process


def end_all(child: subprocess.Popen[bytes], mark: str) -> None:
    """End whatever a cell has started."""
    end = monotonic() + END_S
    while (left := list(marked(child.pid, mark))) and monotonic() < end:
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        child.poll()
        sleep(LOOK_S)
    with suppress(subprocess.TimeoutExpired):
        child.wait(END_S)
