"""Two forks, of which the first is held up in another module's hook; then, is the lock of the channels free?"""

from __future__ import annotations

import os
import threading
import time

gate, entered = threading.Event(), threading.Event()


def hold_up_the_first() -> None:
    if not entered.is_set():
        entered.set()
        gate.wait(20)


# Hooks run in the reverse order of their registration: this one after those of safepool.
os.register_at_fork(before=hold_up_the_first)

from safepool import SafePoolExecutor, _os  # noqa: E402


def fork() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def main() -> None:
    assert SafePoolExecutor
    first = threading.Thread(target=fork)
    first.start()
    entered.wait(20)
    time.sleep(0.1)
    second = threading.Thread(target=fork)
    second.start()
    time.sleep(2 * _os.FORK_LIMIT_S)
    gate.set()
    first.join(20)
    second.join(20)
    print("free" if _os._ours_lock.acquire(timeout=5) else "locked for ever")


main()
