"""Big arguments and results are copied once each way, and nothing else about them is different."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safepool import Retry, SafePoolExecutor, WorkerDied, _blocks, _bulk, _os
from safepool._parts import BIG_BYTES
from tests.faults import tasks as faults
from tests.pool import tasks
from tests.pool.test_deaths import error_of, is_usable
from tests.support import LIMIT_S, SLACK_S, run_script, until

np = pytest.importorskip("numpy")
if "big_data" not in _os.CAPABILITIES:
    pytest.skip("big things go as small ones do", allow_module_level=True)

MakePool = Callable[..., SafePoolExecutor]
BIG = 3 * BIG_BYTES
MODULES = "list(__import__('sys').modules)"


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many big things have gone out, and come home, as a block of shared memory, or as bytes."""
    seen: Counter[str] = Counter()
    pack, receive = _bulk.pack, _bulk.receive

    def packed(*args: Any) -> Any:
        cargo = pack(*args)
        seen["out" if isinstance(cargo._held, _blocks.Block) else "out as bytes"] += 1
        return cargo

    def received(*args: Any) -> Any:
        arrived = receive(*args)
        seen["home" if isinstance(arrived, _bulk.Arrived) else "home as bytes"] += 1
        return arrived

    monkeypatch.setattr(_bulk, "pack", packed)
    monkeypatch.setattr(_bulk, "receive", received)
    return seen


def arrays() -> dict[str, Any]:
    one = np.arange(BIG // 8, dtype=float)
    return {
        "plain": one,
        "in Fortran's order": np.asfortranarray(one.reshape(3, -1)),
        "not contiguous": one.reshape(3, -1)[:, ::-3],
        "structured": np.zeros(BIG // 16, dtype=[("a", "<i8"), ("b", "S8")]),
        "just big": np.ones(BIG_BYTES, dtype=np.uint8),
        "huge": np.arange(50_000_000, dtype=np.uint8),
    }


@pytest.mark.parametrize("kind", arrays())
def test_arrays_come_and_return_as_they_are(pool: MakePool, context: Any, used: Counter[str], kind: str) -> None:
    """An array of any kind arrives equal, and so does what is returned, which may be written to."""
    array = arrays()[kind]
    back = pool(1, context).submit(tasks.echo, array).result(LIMIT_S)
    np.testing.assert_array_equal(back, array)
    assert (back.dtype, back.shape, back.flags.writeable) == (array.dtype, array.shape, True)
    assert array.nbytes < BIG_BYTES or used == {"out": 1, "home": 1}


@pytest.mark.parametrize("size", [BIG_BYTES - 100, BIG_BYTES, BIG, 50_000_000])
def test_bytes_and_texts_come_and_return_as_they_are(pool: MakePool, context: Any, size: int) -> None:
    """Bytes, byte arrays and texts of every size arrive equal and of the same type, alone and deep within others."""
    executor = pool(1, context)
    for value in (b"\x01" * size, bytearray(b"\x01" * size), "ö" * size):
        assert executor.submit(tasks.echo, value).result(LIMIT_S) == value
        back = executor.submit(tasks.keywords, deep=[(value, 1)]).result(LIMIT_S)["deep"][0][0]
        assert (type(back), back) == (type(value), value)


def fill(array: Any, value: float) -> Any:
    array[:] = value
    return array


def test_the_two_sides_are_independent(pool: MakePool, used: Counter[str]) -> None:
    """What is changed after ``submit``, in the worker, or in a result changes nothing anywhere else."""
    executor, array = pool(1), np.ones(BIG // 8)
    first = executor.submit(tasks.echo, array)
    filled = executor.submit(fill, array, 7)
    array[:] = 2
    assert (first.result(LIMIT_S) == 1).all()
    assert (filled.result(LIMIT_S) == 7).all()
    assert (array == 2).all()
    first.result(0)[:] = 3
    assert (executor.submit(tasks.echo, array).result(LIMIT_S) == 2).all()
    assert (filled.result(0) == 7).all()
    assert used == {"out": 3, "home": 3}


def test_functions_may_hold_big_things(pool: MakePool, context: Any, used: Counter[str]) -> None:
    """A closure, and a bound method, over a big array goes as an argument does; so do the items of a chunk."""
    executor, array = pool(1, context), np.arange(BIG // 8)
    assert executor.submit(lambda: int(array[-1])).result(LIMIT_S) == BIG // 8 - 1
    assert executor.submit(array.sum).result(LIMIT_S) == array.sum()
    assert list(executor.map(np.sum, [array] * 4, chunksize=2, timeout=LIMIT_S)) == [array.sum()] * 4
    assert used == {"out": 4}


def test_items_of_a_map_return_big_things(pool: MakePool, context: Any, used: Counter[str]) -> None:
    """What small items come to may be big, each in its place, with small ones and errors between."""
    executor = pool(2, context)
    sizes = [BIG if n % 3 == 0 else 5 for n in range(40)]
    for size, back in zip(sizes, executor.map(bytes, sizes, timeout=LIMIT_S)):
        assert back == bytes(size)
    assert used["home"] + used["home as bytes"] == len([size for size in sizes if size == BIG])
    assert used["home"]
    found = executor.map(bytes, [BIG] * 20 + [-1] + [BIG] * 20, timeout=LIMIT_S)
    assert [len(next(found)) for _ in range(20)] == [BIG] * 20
    with pytest.raises(ValueError, match="negative"):
        next(found)


def test_exceptions_with_big_things_in_them_travel(pool: MakePool, used: Counter[str]) -> None:
    """A big exception comes as a small one does, in one piece."""
    error = error_of(pool(1).submit(tasks.make_and_raise, ValueError, b"x" * BIG))
    assert error.args == (b"x" * BIG,)
    assert used == {"out": 1}


def test_what_is_small_goes_as_ever(pool: MakePool, used: Counter[str]) -> None:
    """Below a megabyte there is no block, no descriptor, and nothing to be given back."""
    executor = pool(1)
    assert executor.submit(tasks.echo, np.ones(BIG_BYTES // 16)).result(LIMIT_S).sum() == BIG_BYTES // 16
    assert executor.submit(tasks.echo, b"x" * (BIG_BYTES // 2)).result(LIMIT_S) == b"x" * (BIG_BYTES // 2)
    assert not used
    assert executor._watchdog._store is None


# ------------------------------------------------------------------ accidents


def die_first(log: Path, array: Any) -> float:
    tasks.die_until(log, 2)
    return float(array.sum())


def test_a_big_argument_is_sent_again(pool: MakePool, context: Any, tmp_path: Path, used: Counter[str]) -> None:
    """After each death of its worker the next attempt gets the same big argument, which was copied once."""
    patient = pool(1, context).options(retry=Retry(attempts=3, on=("death",), deaths=3))
    assert patient.submit(die_first, tmp_path / "log", np.ones(BIG // 8)).result(LIMIT_S) == BIG // 8
    assert used == {"out": 1}


def look_first(log: Path, size: int) -> bytes:
    return b"no" if tasks.attempt(log) == 1 else b"x" * size


def test_a_policy_may_look_at_a_big_result(pool: MakePool, tmp_path: Path) -> None:
    """A retry policy reads a result, and the program reads it again, and gets its own."""
    import tenacity

    seen: list[int] = []

    def is_short(result: bytes) -> bool:
        seen.append(len(result))
        return len(result) < BIG

    policy = tenacity.Retrying(retry=tenacity.retry_if_result(is_short), stop=tenacity.stop_after_attempt(3))
    future = pool(1).options(retry=policy).submit(look_first, tmp_path / "log", BIG)
    assert future.result(LIMIT_S) == b"x" * BIG
    assert seen == [2, BIG]


def stopped_worker(executor: SafePoolExecutor) -> int:
    pid: int = executor.submit(os.getpid).result(LIMIT_S)
    os.kill(pid, signal.SIGSTOP)
    return pid


def test_a_big_call_is_cancelled_before_it_begins(pool: MakePool, used: Counter[str]) -> None:
    """One that its worker has but has not read is taken back, and the next ones get their own arguments."""
    executor = pool(1)
    pid = stopped_worker(executor)
    taken, queued, stays = (executor.submit(tasks.echo, np.full(BIG // 8, n)) for n in range(3))
    until(lambda: taken._sent, "it is sent")
    assert queued.cancel()
    assert taken.cancel()
    os.kill(pid, signal.SIGCONT)
    assert (stays.result(LIMIT_S) == 2).all()
    for n in range(5):
        assert (executor.submit(tasks.echo, np.full(BIG // 8, n)).result(LIMIT_S) == n).all()
    assert executor.submit(os.getpid).result(LIMIT_S) == pid
    assert used["out"] == 8


@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_worker_is_killed_with_a_big_call_unread(
    pool: MakePool, context: Any, monkeypatch: pytest.MonkeyPatch, *, as_bytes: bool
) -> None:
    """It dies before it has read one, or with half of it in the channel: another worker gets it whole."""
    if as_bytes:
        monkeypatch.setattr(_bulk.Cargo, "lend", lambda cargo: None)
    executor = pool(1, context)
    pid = stopped_worker(executor)
    future = executor.submit(tasks.echo, np.arange(BIG))
    until(lambda: future._sent, "it is sent")
    os.kill(pid, signal.SIGKILL)
    assert (future.result(LIMIT_S) == np.arange(BIG)).all()
    assert future.worker_pid != pid
    assert is_usable(executor)


def size_then_die(data: Any) -> None:
    assert len(data) == BIG
    tasks.send_self(signal.SIGKILL)


def test_a_death_costs_one_big_task(pool: MakePool, context: Any) -> None:
    """Of many big tasks in flight those that kill their workers fail, and all others are done."""
    executor = pool(2, context)
    data = b"x" * BIG
    futures = [executor.submit(size_then_die if n % 8 == 0 else tasks.echo, data) for n in range(24)]
    for n, future in enumerate(futures):
        if n % 8 == 0:
            assert isinstance(error_of(future), WorkerDied)
        else:
            assert future.result(LIMIT_S) == data


def test_a_finished_big_result_survives_its_worker(pool: MakePool) -> None:
    """Results are read long after the workers, and the pool, are gone; also those that nobody asked for so far."""
    executor = pool(2)
    futures = [executor.submit(bytes, BIG + n) for n in range(100)]
    executor.shutdown()
    assert [len(future.result(0)) for future in futures] == [BIG + n for n in range(100)]


def test_many_big_calls_from_many_threads(pool: MakePool, context: Any, used: Counter[str]) -> None:
    """More than there may be blocks: each caller gets its own back."""
    executor = pool(2, context)
    wrong: list[Any] = []

    def work(number: int) -> None:
        futures = [executor.submit(tasks.echo, np.full(BIG_BYTES // 4, number + n)) for n in range(40)]
        for n, future in enumerate(futures):
            back = future.result(LIMIT_S)
            if back.shape != (BIG_BYTES // 4,) or not (back == number + n).all():
                wrong.append((number, n, back))

    threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * LIMIT_S)
        assert not thread.is_alive()
    assert not wrong
    assert sum(used.values()) == 2 * 120


# --------------------------------------------------------------------- bounds


def blocks(pid: int | str = "self") -> int:
    """Descriptors of shared memory that this process has."""
    names = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            names.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except OSError:  # of the listing itself
            continue
    return sum("memfd:safepool" in name for name in names)


def shared_bytes(pid: int | str = "self") -> int:
    """Of shared memory that is mapped in this process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssShmem"))


def test_memory_is_given_back(pool: MakePool) -> None:
    """A hundred big calls use a few blocks again and again; a pool that rests has none, and one that is closed."""
    executor = pool(1)
    pid = executor.submit(os.getpid).result(LIMIT_S)
    until(lambda: "safepool._bulk" in executor.submit(eval, MODULES).result(LIMIT_S), "all is loaded there")
    here, there, shared = blocks(), blocks(pid), shared_bytes()
    array = np.ones(BIG // 8)
    for _ in range(100):
        executor.submit(tasks.echo, array).result(LIMIT_S)
    assert blocks() <= here + 3
    assert blocks(pid) <= there + 3
    assert shared_bytes() <= shared + 4 * BIG
    limit_s = _blocks.KEEP_S + 2 * SLACK_S
    until(lambda: blocks() == here, "the program has given its blocks back", limit_s)
    until(lambda: blocks(pid) == there, "its worker has, too", limit_s)
    assert shared_bytes() <= shared
    until(lambda: executor._watchdog._trim_at is None, "nothing is left to do for a pool that rests")
    executor.submit(tasks.echo, array).result(LIMIT_S)
    executor.shutdown()
    assert blocks() <= here


def test_unread_results_hold_few_descriptors(pool: MakePool) -> None:
    """A program that never looks at its results does not run out of descriptors for it."""
    executor, before = pool(1), len(os.listdir("/proc/self/fd"))
    futures = [executor.submit(bytes, BIG_BYTES) for _ in range(150)]
    futures[-1].result(LIMIT_S)
    assert len(os.listdir("/proc/self/fd")) <= before + _bulk.MOST_ARRIVED + 20
    assert all(len(future.result(LIMIT_S)) == BIG_BYTES for future in futures)


def test_a_worker_without_descriptors(pool: MakePool, context: Any, used: Counter[str]) -> None:
    """A task has left its worker none: big arguments and results go as bytes, and nobody notices but the clock."""
    executor = pool(1, context)
    pid = executor.submit(os.getpid).result(LIMIT_S)
    assert executor.submit(tasks.echo, np.ones(1)).result(LIMIT_S) == 1  # now it has what makes arrays
    assert executor.submit(faults.use_up_descriptors).result(LIMIT_S)
    for n in range(4):
        array = np.full(BIG // 8, n)
        assert (executor.submit(tasks.echo, array).result(LIMIT_S) == array).all()
    assert executor.submit(os.getpid).result(LIMIT_S) == pid
    assert used == {"out": 4, "home as bytes": 4}


WITHOUT_DESCRIPTORS = """
import os, resource, sys
sys.path.insert(0, {root!r})
from safepool import SafePoolExecutor
from tests.pool import tasks

size = 3_000_000
with SafePoolExecutor(1) as executor:
    for had_big_things in (False, True):
        assert executor.submit(pow, 2, 3).result(30) == 8
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
        taken = []
        try:
            while True:
                taken.append(os.dup(0))
        except OSError:
            pass
        futures = [executor.submit(tasks.echo, bytes([n]) * size) for n in range(10)]
        assert [future.result(30) for future in futures] == [bytes([n]) * size for n in range(10)]
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert executor.submit(tasks.echo, b"x" * size).result(30) == b"x" * size
print("all done")
"""


def test_a_program_without_descriptors(tmp_path: Path) -> None:
    """Arguments go as bytes while there is none, and no result is lost."""
    root = str(Path(__file__).parent.parent.parent)
    done = run_script(tmp_path / "script.py", WITHOUT_DESCRIPTORS.format(root=root))
    assert done.stdout == "all done\n", done.stderr


def test_a_platform_without_shared_memory(pool: MakePool, monkeypatch: pytest.MonkeyPatch, used: Counter[str]) -> None:
    """Then everything goes as bytes."""
    monkeypatch.setattr(_os, "CAPABILITIES", _os.CAPABILITIES - {"big_data"})
    assert pool(1).submit(tasks.size, 1, b"x" * BIG).result(LIMIT_S) == (1, BIG)
    assert not used


def test_workers_load_nothing_for_it_at_their_start(pool: MakePool) -> None:
    """The first task of a fresh worker finds that nothing of this is loaded."""
    import multiprocessing

    loaded = pool(1, multiprocessing.get_context("spawn")).submit(eval, MODULES).result(LIMIT_S)
    assert not set(loaded) & {"safepool._bulk", "safepool._blocks", "safepool._os.memory", "ctypes"}
