"""``as_completed`` and ``wait``: any mixture of futures, limits on time and on silence, errors that name names."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from safepool import SafePoolExecutor, Stalled, Unfinished, as_completed, wait
from tests.pool import tasks
from tests.support import LIMIT_S, until

Pool = Callable[..., SafePoolExecutor]


def test_a_mixture_completes(pool: Pool) -> None:
    """Our futures, a thread pool's and a bare one come out once each, duplicates too."""
    executor = pool(2)
    bare: Future[int] = Future()
    bare.set_result(3)
    with ThreadPoolExecutor(1) as threads:
        ours, theirs = executor.submit(pow, 2, 3), threads.submit(abs, -1)
        found = list(as_completed([ours, theirs, bare, ours], timeout=LIMIT_S, stall_timeout=LIMIT_S))
    assert sorted(future.result(0) for future in found) == [1, 3, 8]


def test_all_come_out_each_once(pool: Pool) -> None:
    """Of many futures each is yielded once, and nothing of them is kept."""
    executor = pool(2)
    futures = {executor.submit(tasks.echo, n) for n in range(300)}
    results = [future.result(0) for future in as_completed(futures, timeout=LIMIT_S)]
    assert sorted(results) == list(range(300))
    assert not any(future._waiters for future in futures)


def test_the_error_names_what_is_unfinished(pool: Pool, tmp_path: Path) -> None:
    """Out of time: the error is a TimeoutError and tells each unfinished future, its state and its process."""
    executor = pool(1)
    running = executor.options(name="stuck one").submit(tasks.wait_for, tmp_path / "gate")
    until(running.running, "it runs")
    queued = executor.options(name="queued one").submit(abs, -1)
    with pytest.raises(TimeoutError) as caught:
        list(as_completed([running, queued], timeout=0.2))
    assert isinstance(caught.value, Unfinished)
    assert set(caught.value.unfinished) == {running, queued}
    text = str(caught.value)
    assert "2 futures unfinished" in text
    assert "(stuck one) is running" in text
    assert f"process {running.worker_pid}" in text
    assert "(queued one) is queued" in text
    assert not running._waiters
    (tmp_path / "gate").touch()


def test_completed_ones_come_before_the_error(pool: Pool, tmp_path: Path) -> None:
    """What is done is yielded even if the time is over."""
    executor = pool(2)
    done = executor.submit(abs, -1)
    done.result(LIMIT_S)
    stuck = executor.submit(tasks.wait_for, tmp_path / "gate")
    found = as_completed([done, stuck], timeout=0.0)
    assert next(found) is done
    with pytest.raises(Unfinished):
        next(found)
    (tmp_path / "gate").touch()


def test_silence_is_noticed(pool: Pool, tmp_path: Path) -> None:
    """Nothing moves for ``stall_timeout``: as_completed and wait say so, and name what is stuck."""
    stuck = pool(1).submit(tasks.wait_for, tmp_path / "gate")
    until(stuck.running, "it runs")
    with pytest.raises(Stalled, match="nothing moved") as caught:
        list(as_completed([stuck], stall_timeout=0.3))
    assert caught.value.unfinished == [stuck]
    with pytest.raises(TimeoutError):
        wait([stuck], stall_timeout=0.3)
    (tmp_path / "gate").touch()
    assert list(as_completed([stuck], stall_timeout=LIMIT_S)) == [stuck]


def test_progress_for_others_is_no_silence(pool: Pool, tmp_path: Path) -> None:
    """A future that waits while its pool works for others has not stalled."""
    executor = pool(1)
    others = [executor.submit(tasks.nap, 0.1) for _ in range(12)]
    last = executor.submit(abs, -7)
    assert [future.result(0) for future in as_completed([last], timeout=LIMIT_S, stall_timeout=0.6)] == [7]
    assert all(future.done() for future in others)


def test_wait_returns_as_the_standard_library_does(pool: Pool, tmp_path: Path) -> None:
    """ALL, FIRST_COMPLETED and FIRST_EXCEPTION; a timeout returns what there is."""
    executor = pool(2)
    gate = tmp_path / "gate"
    stuck, quick = executor.submit(tasks.wait_for, gate), executor.submit(abs, -1)
    done, rest = wait([stuck, quick], timeout=LIMIT_S, return_when=FIRST_COMPLETED)
    assert (done, rest) == ({quick}, {stuck})
    assert wait([stuck], timeout=0.0) == (set(), {stuck})
    bad = executor.submit(int, "x")
    done, rest = wait([stuck, quick, bad], timeout=LIMIT_S, return_when=FIRST_EXCEPTION)
    assert bad in done
    assert rest == {stuck}
    gate.touch()
    assert wait([stuck, quick, bad], timeout=LIMIT_S).not_done == set()
    assert wait([]) == (set(), set())


def test_cancelled_ones_are_done(pool: Pool, tmp_path: Path) -> None:
    """A cancelled future is yielded at once, here and by the standard library's functions."""
    executor = pool(1)
    executor.submit(tasks.wait_for, tmp_path / "gate")
    cancelled = executor.submit(abs, -1)
    assert cancelled.cancel()
    assert list(as_completed([cancelled], timeout=LIMIT_S)) == [cancelled]
    assert list(concurrent.futures.as_completed([cancelled], timeout=LIMIT_S)) == [cancelled]
    assert concurrent.futures.wait([cancelled], timeout=LIMIT_S).done == {cancelled}
    (tmp_path / "gate").touch()


def test_a_cancelled_foreign_future_that_nobody_announces_is_seen() -> None:
    """A pool that dies between cancel and notification does not leave us waiting."""
    foreign: Future[int] = Future()
    found = as_completed([foreign], timeout=LIMIT_S)
    foreign.cancel()  # CANCELLED, and never CANCELLED_AND_NOTIFIED
    assert list(found) == [foreign]


def test_the_standard_library_waits_for_ours(pool: Pool) -> None:
    """concurrent.futures.as_completed and wait work on our futures."""
    executor = pool(2)
    futures = [executor.submit(abs, -n) for n in range(20)]
    assert {f.result(0) for f in concurrent.futures.as_completed(futures, timeout=LIMIT_S)} == set(range(20))
    assert concurrent.futures.wait(futures, timeout=LIMIT_S).not_done == set()


def test_asyncio_waits_for_ours(pool: Pool) -> None:
    """wrap_future and run_in_executor work, results and exceptions alike."""
    executor = pool(2)

    async def main() -> list[Any]:
        loop = asyncio.get_running_loop()
        good = asyncio.wrap_future(executor.submit(pow, 2, 5))
        view = loop.run_in_executor(executor.options(timeout=LIMIT_S), int, "x")
        return await asyncio.wait_for(asyncio.gather(good, view, return_exceptions=True), LIMIT_S)

    value, error = asyncio.run(main())
    assert value == 32
    assert isinstance(error, ValueError)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"timeout": "soon"}, TypeError),
        ({"timeout": True}, TypeError),
        ({"stall_timeout": 0}, ValueError),
        ({"stall_timeout": -1}, ValueError),
        ({"stall_timeout": float("nan")}, TypeError),
    ],
)
def test_wrong_limits_are_refused_at_the_call(wrong: dict[str, Any], error: type[Exception]) -> None:
    """Not at the first ``next``: at the call that was wrong."""
    future: Future[int] = Future()
    with pytest.raises(error):
        as_completed([future], **wrong)
    with pytest.raises(error):
        wait([future], **wrong)


def test_what_is_no_future_is_refused() -> None:
    """Wrong items and an unknown return_when are told at the call."""
    with pytest.raises(TypeError, match="need concurrent"):
        as_completed([3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="Invalid return condition"):
        wait([], return_when="SOMETIMES")
