"""``on_event`` tells what becomes of tasks and workers: everything once, when it is so, and nobody waits for it."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import pytest

import safepool
from safepool import PoolEvent, Retry, SafePoolExecutor, _pending
from tests.pool import tasks
from tests.support import LIMIT_S, until

MakePool = Callable[..., SafePoolExecutor]
MANY = 3_000


def raise_at(number: int, at: int) -> int:
    if number == at:
        raise ValueError(f"no {number}")
    return number


def done(seen: list[PoolEvent]) -> Counter[str]:
    """How many tasks are done, by what became of them."""
    counts: Counter[str] = Counter()
    for event in seen:
        counts[event.what] += event.done
    return +counts


def test_every_task_is_told_once(pool: MakePool, context: Any) -> None:
    """Under every start method; the sum of what is done is what was submitted, and shutdown waits until it is told."""
    seen: list[PoolEvent] = []
    executor = pool(2, context, on_event=seen.append)
    futures: list[Future[Any]] = [executor.submit(raise_at, n, 7) for n in range(MANY)]
    futures += [executor.submit(os._exit, 3), executor.options(name="late", timeout=0.1).submit(time.sleep, LIMIT_S)]
    wait(futures, LIMIT_S)
    executor.shutdown()
    assert done(seen) == {"returned": MANY - 1, "failed": 3}
    why = {event.task: event.why for event in seen if event.what == "failed"}
    assert why == {
        str(futures[7]): "ValueError: no 7",
        str(futures[-2]): "its worker died",
        str(futures[-1]): "it took longer than its timeout",
    }
    assert next(event.pid for event in seen if event.task == str(futures[-2])) is not None
    ends = [event for event in seen if event.what == "worker ended"]
    assert {event.why for event in ends} >= {"exit code 3", "exit code -9"}
    assert {event.pid for event in seen if event.what == "worker started"} <= {event.pid for event in ends}


def test_the_items_of_map_are_told_and_travel_by_the_hundred(pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever shows progress pays nothing for it; the item that raised is named."""
    sizes: list[int] = []

    def batches_of(*args: Any) -> Any:
        made = _pending_batches_of(*args)
        sizes.extend(len(batch.tasks()) for batch in made)
        return made

    _pending_batches_of = _pending.batches_of
    monkeypatch.setattr(_pending, "batches_of", batches_of)
    seen: list[PoolEvent] = []
    executor = pool(2, on_event=seen.append)
    found: list[int] = []
    with pytest.raises(ValueError, match="no 2000"):
        found.extend(executor.map(raise_at, range(MANY), [2000] * MANY))
    assert found == list(range(2000))
    assert sum(executor.map(abs, range(MANY), chunksize=50)) == sum(range(MANY))
    executor.shutdown()
    counts = done(seen)
    assert counts.pop("failed") == 1
    assert counts.total() == MANY - 1 + MANY // 50
    assert [(event.task, event.why) for event in seen if event.what == "failed"] == [
        ("item 2000 of map over raise_at", "ValueError: no 2000")
    ]
    assert max(sizes) > 20


def test_attempts_are_told_and_are_not_done(pool: MakePool, tmp_path: Any) -> None:
    """Two come to nothing, the third returns: two are told as retried, with their reasons, and one as returned."""
    seen: list[PoolEvent] = []
    executor = pool(1, on_event=seen.append, retry=Retry(attempts=3))
    future = executor.submit(tasks.fail_until, tmp_path / "log", 2)
    assert future.result(LIMIT_S) == 3
    executor.shutdown()
    assert done(seen) == {"returned": 1}
    told = [event for event in seen if event.what == "retried"]
    assert [event.task for event in told] == [str(future)] * 2
    assert [event.why.rpartition(": ")[2] for event in told] == ["attempt 1", "attempt 2"]


def test_what_is_told_is_so(pool: MakePool, tmp_path: Any) -> None:
    """Whoever is told that a task is done finds it so; what was cancelled is told too."""
    futures: list[Future[Any]] = []
    lies: list[PoolEvent] = []
    seen: list[PoolEvent] = []

    def look(event: PoolEvent) -> None:
        seen.append(event)
        if sum(done(seen).values()) > sum(future.done() for future in futures):
            lies.append(event)

    executor = pool(1, on_event=look)
    futures.append(executor.submit(tasks.wait_for, tmp_path / "gate"))
    futures += [executor.submit(tasks.echo, n) for n in range(299)]
    cancelled = [future for future in futures[200:] if future.cancel()]
    (tmp_path / "gate").touch()
    executor.shutdown()
    assert len(cancelled) == 100
    assert done(seen) == {"returned": 200, "cancelled": 100}
    assert not lies


def test_what_cannot_be_sent_is_told(pool: MakePool) -> None:
    """With the error of pickling."""
    seen: list[PoolEvent] = []
    executor = pool(1, on_event=seen.append)
    future = executor.submit(tasks.echo, threading.Lock())
    executor.shutdown()
    assert done(seen) == {"failed": 1}
    assert [(event.task, "pickle" in event.why) for event in seen if event.what == "failed"] == [(str(future), True)]


def test_a_slow_callback_holds_up_nothing(pool: MakePool) -> None:
    """The tasks go on; what has come meanwhile is summed up."""
    gate = threading.Event()
    seen: list[PoolEvent] = []

    def look(event: PoolEvent) -> None:
        gate.wait(LIMIT_S)
        seen.append(event)

    executor = pool(2, on_event=look)
    for _ in range(10):
        assert sum(future.result(LIMIT_S) for future in [executor.submit(abs, n) for n in range(300)]) == sum(
            range(300)
        )
    assert seen == []
    gate.set()
    executor.shutdown()
    assert done(seen) == {"returned": 3000}
    assert len(seen) < 100


def test_a_callback_that_raises_is_logged(pool: MakePool, caplog: pytest.LogCaptureFixture) -> None:
    """And is told of what comes after it."""
    seen: list[PoolEvent] = []

    def look(event: PoolEvent) -> None:
        seen.append(event)
        raise SystemExit("no more")

    executor = pool(1, on_event=look)
    assert executor.submit(abs, -1).result(LIMIT_S) == 1
    until(lambda: done(seen) == {"returned": 1}, "it is told")
    assert executor.submit(abs, -2).result(LIMIT_S) == 2
    executor.shutdown()
    assert done(seen) == {"returned": 2}
    assert "on_event" in caplog.text
    assert "no more" in caplog.text


def test_what_cannot_be_called_is_refused() -> None:
    """At the call that made the pool."""
    with pytest.raises(TypeError, match="on_event must be callable"):
        SafePoolExecutor(1, on_event=3)  # type: ignore[arg-type]


def test_a_patch_may_tell(tmp_path: Any) -> None:
    """Beside the summary."""
    import concurrent.futures

    seen: list[PoolEvent] = []
    with safepool.patch(summary=False, on_event=seen.append) as patched:
        with concurrent.futures.ProcessPoolExecutor(2) as executor:
            assert list(executor.map(abs, range(-MANY, 0))) == list(range(MANY, 0, -1))
        assert patched.summary()["done"] == MANY
    assert done(seen) == {"returned": MANY}


def test_many_slow_calls_are_no_stuck_one(pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time, in order, and all before shutdown returns, however long they take together."""
    monkeypatch.setattr("safepool._side.PATIENCE_S", 0.4)
    calls: list[int] = []
    together: list[int] = []

    def look(event: PoolEvent) -> None:
        calls.append(1)
        together.append(len(calls))
        time.sleep(0.05)
        calls.pop()

    executor = pool(1, on_event=look)
    futures = [executor.submit(divmod, n, 0) for n in range(20)]
    wait(futures, LIMIT_S)
    executor.shutdown()
    assert len(together) >= 20
    assert set(together) == {1}
    assert not calls


def test_whoever_has_the_lock_holds_up_nothing(pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scenario 1 of ``telling``: the pool goes on, and what it could not hand on is told with what comes next."""
    monkeypatch.setattr("safepool.telling.LOCK_LIMIT_S", 0.05)
    seen: list[PoolEvent] = []
    executor = pool(1, on_event=seen.append)
    (teller,) = executor._watchdog.observers
    with teller._lock:  # type: ignore[attr-defined]
        assert [executor.submit(tasks.echo, n).result(LIMIT_S) for n in range(5)] == list(range(5))
    assert executor.submit(tasks.echo, 5).result(LIMIT_S) == 5
    executor.shutdown()
    assert done(seen) == {"returned": 6}
