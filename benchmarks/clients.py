"""Programs of other people's on their own pools and under ``safepool run``: are the answers the same, and how long?

``python -m benchmarks.clients --python PYTHON [--programs a,b] [--repeat N] [--scale N] [--json FILE]``.  ``PYTHON`` is
that of an environment that has them (``tests/clients/constraints-programs.txt``).  In turn, medians in seconds, and the
ratio, without and with ``--preload`` of what their workers import.
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

from benchmarks.client_programs import LONG, PRELOAD, PROGRAMS

SCRIPT = Path(__file__).with_name("client_programs.py")
PROJECT = SCRIPT.parent.parent
LIMIT_S = 300.0
TOLD = 2000


class Failed(Exception):
    """The program did not do its work: what it said last."""


def play(python: str, name: str, *, ours: bool, scale: int = 1, preload: str = "") -> tuple[str, float]:
    """(what it printed, seconds), of one run in a folder of its own.  Raises ``Failed``."""
    environ = {**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONHASHSEED": "0"}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its own, and so should we
    with tempfile.TemporaryDirectory(prefix="clients-") as folder:
        words = [str(SCRIPT), name, ".", "--scale", str(scale), *(["--ours"] if ours else [])]
        run = ["-m", "safepool", "run", "--quiet", *(["--preload", preload] if preload else [])]
        command = [python, *(run if ours else []), *words]
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
    parser.add_argument("--scale", type=int, help="so many times the work of the tests; default: half a minute of it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    print(f"{'seconds':10}{'own pool':>10}{'safepool':>10}{'ratio':>8}{'preloaded':>12}{'ratio':>8}")
    for name in options.programs.split(","):
        scale = LONG[name] if options.scale is None else options.scale
        times: dict[str, list[float]] = {"own": [], "safepool": []} | ({"preloaded": []} if name in PRELOAD else {})
        answers = set()
        for _ in range(options.repeat):
            for how, seconds in times.items():
                preload = PRELOAD[name] if how == "preloaded" else ""
                answer, took = play(options.python, name, ours=how != "own", scale=scale, preload=preload)
                answers.add(answer)
                seconds.append(took)
        own, *ours = map(median, times.values())
        told = "".join(f"{one:{width}.2f}{one / own:8.2f}" for one, width in zip(ours, (10, 12)))
        same = "" if len(answers) == 1 else "  THE ANSWERS DIFFER"
        print(f"{name:10}{own:10.2f}{told}{same}", flush=True)
        found[name] = {**times, "same": not same}
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))
    return 0 if all(one["same"] for one in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
