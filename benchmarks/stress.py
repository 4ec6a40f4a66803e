"""A million futures through one pool while everything happens to it: each resolves once, and nothing grows.

    python -m benchmarks.stress --futures 1000000 --workers 4

Workers are killed, tasks raise, end their workers, go over their limits, are cancelled and killed; four threads submit.
At the end the pool is shut down under the hands of its submitters.  Prints memory and descriptors on the way; exit code
1 if a future is not resolved exactly once, an answer is wrong, or something grew.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import threading
from collections import Counter
from concurrent.futures import BrokenExecutor, Future
from contextlib import suppress
from time import monotonic, sleep
from typing import Any

import psutil

from safepool import SafePoolExecutor

LIMIT_S = 60.0  # without any future resolving: a hang
THREADS = 4
OPEN_PER_THREAD = 1000
KILL_EVERY_S = 0.2
GROWTH_BYTES = 30e6  # from the first tenth to the last, beyond what is noise
GROWTH_FDS = 8
SAMPLES = 20


def work(number: int) -> int:
    return number


def fail(number: int) -> None:
    raise ValueError(number)


def die(number: int) -> None:
    os._exit(number % 256)


def hang(number: int) -> None:
    sleep(3600)


class Stress:
    """One run.  ``faults`` lists what must not have happened."""

    def __init__(self, count: int, workers: int, context: Any, seed: int) -> None:
        self.count, self.seed = count, seed
        self.pool = SafePoolExecutor(workers, context)
        self.limited = self.pool.options(timeout=0.05)
        self.retried = self.pool.options(retry=1)
        self.kinds: Counter[str] = Counter()
        self.faults: list[str] = []
        self.samples: list[tuple[int, float, int]] = []  # futures resolved, bytes, descriptors
        self.resolved = 0
        self._lock = threading.Lock()
        self._told: dict[int, int] = {}  # open futures, by number: how often they were called done
        self._ending = threading.Event()
        self._moved = monotonic()

    def run(self) -> None:
        submitters = [threading.Thread(target=self._submit, args=(n,), daemon=True) for n in range(THREADS)]
        for thread in submitters:
            thread.start()
        self._disturb_until_made()
        # The race: everybody submits, cancels and kills, and the pool closes.
        self.pool.shutdown(wait=False, cancel_futures=True)
        self._ending.set()
        self.pool.shutdown(wait=True)
        for thread in submitters:
            thread.join(LIMIT_S)
        self._check(not any(thread.is_alive() for thread in submitters), "a submitter hangs")
        self._check(not self._told, f"{len(self._told)} futures never resolved, such as {list(self._told)[:5]}")

    def _check(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.faults.append(otherwise)

    def _disturb_until_made(self) -> None:
        dice, me = random.Random(self.seed), psutil.Process()
        while self.resolved < self.count and not self.faults:
            sleep(KILL_EVERY_S)
            self._check(monotonic() - self._moved < LIMIT_S, f"nothing moves: {self.pool!r}")
            pids = list(self.pool._processes)
            if pids:
                with suppress(ProcessLookupError):
                    os.kill(dice.choice(pids), signal.SIGKILL)
            if self.resolved >= self.count * len(self.samples) / SAMPLES:
                self.samples.append((self.resolved, me.memory_info().rss, me.num_fds()))

    def _submit(self, thread: int) -> None:
        dice = random.Random(f"{self.seed} {thread}")
        mine: list[Future[Any]] = []
        number = thread
        with suppress(RuntimeError):  # the pool is shut down
            while not self._ending.is_set():
                number += THREADS
                mine.append(self._one(dice.random(), number))
                if dice.random() < 0.02:
                    dice.choice(mine).cancel()
                while len(mine) >= OPEN_PER_THREAD:
                    mine = [future for future in mine if not future.done()]
                    if len(mine) >= OPEN_PER_THREAD:
                        sleep(0.001)

    def _one(self, draw: float, number: int) -> Future[Any]:
        with self._lock:
            self._told[number] = 0
        try:
            if draw < 0.97:
                future = self.pool.submit(work, number)
            elif draw < 0.985:
                future = self.pool.submit(fail, number)
            elif draw < 0.998:
                future = self.retried.submit(work, number)
            elif draw < 0.9998:
                future = self.limited.submit(work, number)
            elif draw < 0.99988:
                future = self.limited.submit(hang, number)
            elif draw < 0.99996:
                future = self.pool.submit(die, number)
            else:
                future = self.pool.submit(hang, number)
                threading.Timer(0.05, future.kill).start()
        except RuntimeError:
            with self._lock:
                del self._told[number]
            raise
        future.add_done_callback(lambda future: self._done(number, future))
        return future

    def _done(self, number: int, future: Future[Any]) -> None:
        kind = "cancelled" if future.cancelled() else type(future.exception(0)).__name__
        if kind == "NoneType":
            kind = "answered"
            self._check(future.result(0) == number, f"{future!r} answered {future.result(0)}, not {number}")
        elif kind == "ValueError":
            self._check(future.exception(0).args == (number,), f"{future!r} raised another's error")
        elif kind not in ("cancelled", "TaskTimeout"):
            self._check(isinstance(future.exception(0), BrokenExecutor), f"{future!r}: {future.exception(0)!r}")
        with self._lock:
            self.kinds[kind] += 1
            self._check(number in self._told, f"{future!r} was called done twice")
            self._told.pop(number, None)
            self.resolved += 1
            self._moved = monotonic()

    def growth(self) -> tuple[float, int]:
        """Bytes and descriptors, from the samples of the first half to those of the last quarter, by their medians."""
        half, quarter = self.samples[2 : len(self.samples) // 2], self.samples[-len(self.samples) // 4 :]
        middle = [sorted(values)[len(values) // 2] for part in (half, quarter) for values in list(zip(*part))[1:]]
        return middle[2] - middle[0], int(middle[3] - middle[1])


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--futures", type=int, default=1_000_000)
    options.add_argument("--workers", type=int, default=4)
    options.add_argument("--start", default="default", choices=["default", "fork", "spawn", "forkserver"])
    options.add_argument("--seed", type=int, default=1)
    asked = options.parse_args()
    context = None if asked.start == "default" else multiprocessing.get_context(asked.start)
    stress = Stress(asked.futures, asked.workers, context, asked.seed)
    began = monotonic()
    stress.run()
    seconds = monotonic() - began
    for resolved, rss, fds in stress.samples:
        print(f"{resolved:9} resolved {rss / 1e6:7.1f} MB {fds:4} descriptors")
    memory, fds = stress.growth()
    stress._check(memory < GROWTH_BYTES, f"memory grew by {memory / 1e6:.1f} MB")
    stress._check(fds < GROWTH_FDS, f"descriptors grew by {fds}")
    print(f"{stress.resolved} futures in {seconds:.0f} s ({stress.resolved / seconds:.0f}/s): {dict(stress.kinds)}")
    print(f"growth: {memory / 1e6:+.1f} MB, {fds:+} descriptors")
    print("\n".join(["FAULTS:", *stress.faults[:20]]) if stress.faults else "every future resolved exactly once")
    return 1 if stress.faults else 0


if __name__ == "__main__":
    sys.exit(main())
