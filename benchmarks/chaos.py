"""A worker is killed every 50 ms while no-op tasks run: who survives that, and how many answers come through.

``python -m benchmarks.chaos [--pools a,b] [--seconds S] [--every S] [--repeat N] [--json FILE]``.  Each pool plays in a
process of its own, in turn.  One survives if each of its futures is done soon after the last kill, no answer is false,
no more tasks fail than workers were killed, and it works afterwards.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
from collections import deque
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

import psutil

from benchmarks import children
from benchmarks.fault_rows import KEPT, family
from benchmarks.machine import installed, present
from benchmarks.pools import OURS, NotOffered, open_pool

WORKERS = 2
IN_FLIGHT = 200
SETTLE_S = 5.0  # for all futures to be done after the last kill


def echo(number: int) -> int:
    return number


def play(name: str, seconds: float, every: float) -> dict[str, Any]:
    """One run in this process."""
    pool = open_pool(name, WORKERS)
    assert pool.submit(echo, -1).result(SETTLE_S) == -1
    stop = threading.Event()
    kills = [0]

    def kill() -> None:
        while not stop.wait(every):
            workers = [process for process in family() if _name(process) not in KEPT]
            if workers:
                with suppress(psutil.Error):
                    random.choice(workers).kill()
                    kills[0] += 1

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    began = monotonic()
    open_: deque[tuple[int, Future[Any]]] = deque()
    right = failed = false = number = 0
    refused = ""
    while monotonic() - began < seconds and not refused:
        while len(open_) < IN_FLIGHT:
            try:
                open_.append((number, pool.submit(echo, number)))
            except Exception as error:
                refused = type(error).__name__
                break
            number += 1
        if not open_ or not wait([open_[0][1]], timeout=seconds).done:
            break
        while open_ and open_[0][1].done():
            asked, future = open_.popleft()
            if future.cancelled() or future.exception() is not None:
                failed += 1
            elif future.result() == asked:
                right += 1
            else:
                false += 1
    took = monotonic() - began
    stop.set()
    killer.join(SETTLE_S)
    stuck = len(wait([future for _, future in open_], timeout=SETTLE_S).not_done)
    works = False
    with suppress(Exception):
        works = pool.submit(echo, -2).result(SETTLE_S) == -2
    why = [
        *([f"submit: {refused}"] if refused else []),
        *([f"{stuck} futures never done"] if stuck else []),
        *([f"{false} false answers"] if false else []),
        *([f"{failed} failed by {kills[0]} kills"] if failed > kills[0] else []),
        *([] if works else ["of no use afterwards"]),
    ]
    return {"per_s": right / took, "right": right, "failed": failed, "kills": kills[0], "why": "; ".join(why)}


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return KEPT[0]  # gone: not to be killed


def run(name: str, seconds: float, every: float) -> dict[str, Any]:
    """The same in a process of its own, which is killed if it hangs."""
    words = ["--play", name, "--seconds", str(seconds), "--every", str(every)]
    outcome = children.play("benchmarks.chaos", words, seconds + 3 * SETTLE_S)
    why = outcome.why if outcome.trouble == children.NOT_OFFERED else "hung, or died"
    found: dict[str, Any] = outcome.told or {"per_s": 0.0, "right": 0, "failed": 0, "kills": 0, "why": why}
    return found


def main() -> int:
    versions = installed()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pools", default=",".join(present(versions)))
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--every", type=float, default=0.05)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--play", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.play:
        try:
            children.tell(play(options.play, options.seconds, options.every))
        except NotOffered as error:
            children.decline(error)
    children.heed_sigterm()
    names = options.pools.split(",")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(options.repeat):
        for name in names:
            if not any(one["why"] for one in runs[name]):  # once is enough
                runs[name].append(run(name, options.seconds, options.every))
    print(f"{WORKERS} workers, a kill every {options.every:g} s for {options.seconds:g} s; medians of {options.repeat}")
    for name, found in runs.items():
        per_s = median(one["per_s"] for one in found)
        why = next((one["why"] for one in found if one["why"]), "")
        verdict = f"does not survive: {why}" if why else "survives"
        kills = median(one["kills"] for one in found)
        print(f"{name:10} {versions[name]:10} {per_s:9,.0f} answers/s  {kills:4.0f} kills  {verdict}")
    if options.json is not None:
        options.json.write_text(json.dumps(runs, indent=1))
    return 1 if OURS in runs and any(one["why"] for one in runs[OURS]) else 0


if __name__ == "__main__":
    sys.exit(main())
