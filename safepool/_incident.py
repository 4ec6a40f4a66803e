"""One program of 756 short tasks on either pool, which reports its figures and ends when its stdin does.

It is what the demo runs: 32 workers, each replaced after 10 tasks, with arguments of a few kilobytes.
"""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import active_children, connection

TASKS = 756
WORKERS = 32
TASKS_PER_WORKER = 10
ARGUMENT_BYTES = 10_000  # with much less, the pipe to the workers would hold everything that waits
TASK_S = 0.002
REPORT_S = 0.2
LIFE_S = 90.0  # the demo ends long before; this is for a demo that is itself stopped
KILL_S = 3.0

POOLS = ("stock", "safepool")


def work(number: int, argument: bytes) -> int:
    """One task: it needs its argument whole, and next to no time."""
    time.sleep(TASK_S)
    return number + len(argument)


def main(which: str) -> None:
    """Do all tasks on one of ``POOLS``, with a line of JSON about it a few times a second."""
    told_to_end = threading.Event()
    threading.Thread(target=_await_end_of_stdin, args=(told_to_end,), daemon=True).start()
    began = time.monotonic()
    pool = _open(which)
    try:
        argument = bytes(ARGUMENT_BYTES)
        futures = [pool.submit(work, number, argument) for number in range(TASKS)]
        while True:
            seconds = time.monotonic() - began
            print(json.dumps({"seconds": seconds, **_figures(pool, futures)}), flush=True)
            if told_to_end.wait(REPORT_S) or seconds > LIFE_S:
                break
    except BrokenPipeError:
        pass  # the demo is gone, and with it all reason to go on
    except Exception:
        traceback.print_exc()  # before the abrupt end of the stock pool's program
    finally:
        _close(which, pool)


def _await_end_of_stdin(told_to_end: threading.Event) -> None:
    # Not sys.stdin: a thread inside it when the interpreter ends is a fatal error.
    while os.read(0, 1):
        pass
    told_to_end.set()


def _open(which: str) -> ProcessPoolExecutor:
    if which == "stock":
        return ProcessPoolExecutor(WORKERS, max_tasks_per_child=TASKS_PER_WORKER)
    from .executor import SafePoolExecutor

    return SafePoolExecutor(WORKERS, max_tasks_per_child=TASKS_PER_WORKER)


def _figures(pool: ProcessPoolExecutor, futures: list[Future[int]]) -> dict[str, int]:
    done = sum(_is_right(number, future) for number, future in enumerate(futures))
    failed = sum(future.done() for future in futures) - done
    running = sum(future.running() for future in futures)
    pending = len(futures) - done - failed - running
    return {"done": done, "failed": failed, "running": running, "pending": pending, "workers": _alive(pool)}


def _is_right(number: int, future: Future[int]) -> bool:
    if not future.done() or future.cancelled() or future.exception(0) is not None:
        return False
    return future.result(0) == number + ARGUMENT_BYTES


def _alive(pool: ProcessPoolExecutor) -> int:
    # Only looks: is_alive() would reap the dead, under the hands of the pool that is on show.
    processes = list((pool._processes or {}).values())
    dead = connection.wait([process.sentinel for process in processes], timeout=0)
    return len(processes) - len(dead)


def _close(which: str, pool: ProcessPoolExecutor) -> None:
    if which != "stock":
        pool.shutdown(cancel_futures=True)
        return
    end = time.monotonic() + KILL_S
    while (workers := active_children()) and time.monotonic() < end:  # again: it may just start another one
        for process in workers:
            process.kill()
            process.join(0.1)
    # A hung stock pool cannot be shut down: the end of the interpreter would wait for its thread.  The
    # resource tracker outlives this process, and removes the semaphores.
    os._exit(0)
