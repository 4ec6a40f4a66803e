"""Programs of other people's on their own pools and under ``safepool run``: are the answers the same, and how long?

``python -m benchmarks.clients --python PYTHON [--programs a,b] [--repeat N] [--json FILE]``.  ``PYTHON`` is that of an
environment that has them (``tests/clients/constraints-programs.txt``).  In turn, medians in seconds, and the ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.client_programs import PROGRAMS

SCRIPT = Path(__file__).with_name("client_programs.py")
PROJECT = SCRIPT.parent.parent
LIMIT_S = 300.0
TOLD = 2000


class Failed(Exception):
    """The program did not do its work: what it said last."""


def play(python: str, name: str, *, ours: bool, scale: int = 1) -> tuple[str, float]:
    """(what it printed, seconds), of one run in a folder of its own.  Raises ``Failed``."""
    environ = {**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONHASHSEED": "0"}
    with tempfile.TemporaryDirectory(prefix="clients-") as folder:
        words = [str(SCRIPT), name, ".", "--scale", str(scale), *(["--ours"] if ours else [])]
        command = [python, *(["-m", "safepool", "run", "--quiet"] if ours else []), *words]
        began = perf_counter()
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, env=environ, cwd=folder, check=False
        )
        took = perf_counter() - began
    if done.returncode:
        raise Failed(f"{name} ended with {done.returncode}:\n{done.stderr[-TOLD:]}")
    return done.stdout, took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--programs", default=",".join(PROGRAMS))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--scale", type=int, default=10, help="so many times the work that the tests do")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    print(f"{'seconds':10}{'own pool':>10}{'safepool':>10}{'ratio':>8}")
    for name in options.programs.split(","):
        times: dict[bool, list[float]] = {False: [], True: []}
        answers = set()
        for _ in range(options.repeat):
            for ours, seconds in times.items():
                answer, took = play(options.python, name, ours=ours, scale=options.scale)
                answers.add(answer)
                seconds.append(took)
        own, safe = median(times[False]), median(times[True])
        same = "" if len(answers) == 1 else "  THE ANSWERS DIFFER"
        print(f"{name:10}{own:10.2f}{safe:10.2f}{safe / own:8.2f}{same}", flush=True)
        found[name] = {"own": times[False], "safepool": times[True], "same": not same}
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))
    return 0 if all(one["same"] for one in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
