"""One line each: asyncio and joblib on our pool."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import CancelledError
from time import monotonic
from typing import Any

import pytest

from safepool import SafePoolExecutor, TaskTimeout, WorkerDied, register_joblib
from tests.pool import tasks
from tests.support import LIMIT_S, until

MakePool = Callable[..., SafePoolExecutor]

# ---------------------------------------------------------------------- asyncio


def test_a_future_can_be_awaited(pool: MakePool) -> None:
    """Its value, or its error, is that of the ``await``; and ``run_in_executor`` works as with any pool."""
    executor = pool(2)

    async def main() -> list[Any]:
        loop = asyncio.get_running_loop()
        told = await asyncio.gather(*(executor.submit(pow, 2, n) for n in range(4)))
        told.append(await loop.run_in_executor(executor, abs, -5))
        with pytest.raises(WorkerDied):
            await executor.submit(os._exit, 0)
        with pytest.raises(TaskTimeout):
            await executor.options(timeout=0.1).submit(tasks.nap, tasks.LIMIT_S)
        return told

    assert asyncio.run(main()) == [1, 2, 4, 8, 5]


def test_whoever_is_cancelled_over_it_kills_the_task(pool: MakePool) -> None:
    """A limit of asyncio's, or the end of a group: the worker does not go on with what nobody awaits."""
    executor = pool(1)

    async def main() -> None:
        running, queued = (executor.submit(tasks.nap, tasks.LIMIT_S) for _ in range(2))
        with pytest.raises(asyncio.TimeoutError):
            async with asyncio.timeout(0.5):
                await asyncio.gather(running, queued)
        until(lambda: running.cancelled() and queued.cancelled(), "both are cancelled")

    began = monotonic()
    asyncio.run(main())
    assert executor.submit(abs, -1).result(LIMIT_S) == 1
    assert monotonic() - began < 10


def _stop() -> None:
    raise StopIteration


def test_no_error_hangs_whoever_awaits_it(pool: MakePool) -> None:
    """asyncio cannot tell a ``StopIteration``, and a killed task is not the cancellation of whoever awaits it."""
    executor = pool(1)

    async def main() -> None:
        with pytest.raises(RuntimeError, match="StopIteration"):
            await asyncio.wait_for(executor.submit(_stop), LIMIT_S)
        running = executor.submit(tasks.nap, tasks.LIMIT_S)
        asyncio.get_running_loop().call_later(0.3, running.kill)
        with pytest.raises(CancelledError):
            await running

    asyncio.run(main())


# ----------------------------------------------------------------------- joblib


@pytest.fixture
def joblib() -> Any:
    found = pytest.importorskip("joblib")
    register_joblib()
    yield found
    from safepool.joblib_backend import Backend

    if Backend._kept is not None:
        Backend._kept[1].kill_workers()
        Backend._kept = None


def test_joblib_runs_on_our_pool(joblib: Any) -> None:
    """Functions, lambdas and errors as with joblib's own; workers are kept from one call to the next."""
    with joblib.parallel_config(backend="safepool", n_jobs=2):
        assert joblib.Parallel()(joblib.delayed(pow)(n, 2) for n in range(50)) == [n * n for n in range(50)]
        assert joblib.Parallel()(joblib.delayed(lambda n: n + 1)(n) for n in range(3)) == [1, 2, 3]
        one, other = (set(joblib.Parallel()(joblib.delayed(os.getpid)() for _ in range(20))) for _ in range(2))
        assert os.getpid() not in one | other
        assert len(one | other) <= 2
        with pytest.raises(ValueError, match="no number"):
            joblib.Parallel()(joblib.delayed(int)(text) for text in ("1", "no number", "3"))
        assert list(joblib.Parallel(return_as="generator")(joblib.delayed(abs)(-n) for n in range(4))) == [0, 1, 2, 3]


def test_joblib_takes_the_policy_of_a_pool(joblib: Any) -> None:
    """A death costs a retry, and a task that is stuck its limit: joblib's own pool has words for neither."""
    flag = f"/proc/{os.getpid()}/fd/.."
    with joblib.parallel_config(backend="safepool", n_jobs=2, timeout=0.5):
        with pytest.raises(TimeoutError):
            joblib.Parallel()(joblib.delayed(tasks.nap)(tasks.LIMIT_S) for _ in range(2))
        assert joblib.Parallel()(joblib.delayed(os.path.exists)(flag) for _ in range(2)) == [True, True]


def test_two_parallels_with_other_options_do_not_disturb_each_other(joblib: Any) -> None:
    """In turn, and in threads: joblib itself would wait for ever for a batch that a closed pool has refused."""
    half = joblib.Parallel(n_jobs=2, backend="safepool", return_as="generator", batch_size=1)(
        joblib.delayed(tasks.nap)(0.05, n) for n in range(10)
    )
    first = next(half)
    assert joblib.Parallel(n_jobs=3, backend="safepool")(joblib.delayed(abs)(-n) for n in range(3)) == [0, 1, 2]
    assert [first, *half] == list(range(10))


def _nested(joblib: Any, n: int) -> list[int]:
    return joblib.Parallel(n_jobs=2, backend="safepool")(joblib.delayed(abs)(-k) for k in range(n))  # type: ignore[no-any-return]


def _kept_word() -> str:
    return os.environ["SAFEPOOL_TEST_WORD"]


def test_joblib_in_tasks_and_with_an_initializer(joblib: Any) -> None:
    """Tasks know the backend too; an initializer of one's own runs beside ours."""
    with joblib.parallel_config(backend="safepool", n_jobs=2):
        assert joblib.Parallel()(joblib.delayed(_nested)(joblib, n) for n in (2, 3)) == [[0, 1], [0, 1, 2]]
    with joblib.parallel_config(backend="safepool", n_jobs=2, initializer=_set, initargs=("one",)):
        assert joblib.Parallel()(joblib.delayed(_kept_word)() for _ in range(2)) == ["one", "one"]


def _set(word: str) -> None:
    os.environ["SAFEPOOL_TEST_WORD"] = word


def _threads() -> str:
    return os.environ["OMP_NUM_THREADS"]


def test_joblibs_workers_share_the_processors(joblib: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many threads each that together they use the processors once, unless the environment says how many."""
    for asked, given in (("", str(max(1, joblib.cpu_count() // 2))), ("3", "3")):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        if not asked:
            monkeypatch.delenv("OMP_NUM_THREADS")
        found = joblib.Parallel(n_jobs=2, backend="safepool")(joblib.delayed(_threads)() for _ in range(2))
        assert set(found) == {given}
