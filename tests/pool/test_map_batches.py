"""Items of ``map`` that travel by the hundred are each a task of its own: an error, a death, a limit costs one item."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from safepool import PoolTerminated, Retry, SafePoolExecutor, TaskTimeout, WorkerDied, _stream
from safepool._unpack import ONE
from tests.pool import tasks
from tests.pool.runs import log, note, noted  # noqa: F401  (the first is a fixture)
from tests.support import LIMIT_S, is_gone, until

MakePool = Callable[..., SafePoolExecutor]
MANY = 3_000
AT = 1_700  # the item that is special


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many items each batch that was sent had, but for those that were taken back and went once more."""
    found: list[int] = []
    seen: set[int] = set()

    def batches_of(stream: Any, items: Any, together: int) -> Any:
        made = _stream.batches_of(stream, items, together)
        for batch in made:
            found.append(len({*batch.tasks()} - seen))
            seen.update(batch.tasks())
        return made

    monkeypatch.setattr("safepool._pending.batches_of", batches_of)
    return found


def die_at(number: int) -> int:
    note(number)
    if number == AT:
        os._exit(7)
    return number


def raise_at(number: int) -> int:
    if number == AT:
        raise ValueError(f"no {number}")
    return number


def leave_at(number: int) -> int:
    if number == AT:
        raise SystemExit(f"left at {number}")
    return number


def _as_far_as_it_goes(results: Iterator[Any]) -> tuple[list[Any], BaseException | None]:
    """The values until something is raised, and that."""
    found = []
    try:
        for value in results:
            found.append(value)  # noqa: PERF402
    except BaseException as error:
        return found, error
    return found, None


def test_many_items_travel_together_and_come_in_order(pool: MakePool, context: Any, batches: list[int]) -> None:
    """Under every start method; a batch of many is what they travel in."""
    executor = pool(2, context)
    assert list(executor.map(abs, range(-MANY, MANY))) == [abs(n) for n in range(-MANY, MANY)]
    assert list(executor.map(pow, range(MANY), [2] * MANY)) == [n**2 for n in range(MANY)]
    assert max(batches) > 20
    assert sum(batches) == 3 * MANY


def test_a_death_costs_one_item_and_none_runs_twice(pool: MakePool, context: Any, batches: list[int]) -> None:
    """All that came before it is there; what was finished is not run again; the error names the item."""
    executor = pool(2, context)
    found, error = _as_far_as_it_goes(executor.map(die_at, range(MANY)))
    assert found == list(range(AT))
    assert isinstance(error, WorkerDied)
    assert error.exitcode == 7
    assert f"item {AT} of map over die_at" in str(error)
    assert max(batches) > 1
    executor.shutdown()
    assert set(noted().values()) == {1}
    assert set(noted()) >= set(range(AT + 1))


def test_the_rest_of_a_batch_is_done_by_others(pool: MakePool, batches: list[int]) -> None:
    """A worker dies in the midst of a batch: each other item is run, once."""
    executor = pool(2)
    stream = executor._stream(executor._options, die_at, list(range(MANY)), ONE)
    assert stream is not None
    until(lambda: stream.left == 0, "all are settled")
    lost = [at for at, value in enumerate(stream.results) if value != at]
    assert lost == [AT]
    assert noted() == Counter(range(MANY))
    assert max(batches) > 1


@pytest.mark.parametrize(("fn", "kind"), [(raise_at, ValueError), (leave_at, SystemExit)])
def test_an_error_costs_one_item(pool: MakePool, fn: Any, kind: type[BaseException]) -> None:
    """With the traceback of the worker, as for any task; the pool goes on."""
    executor = pool(2)
    found, error = _as_far_as_it_goes(executor.map(fn, range(MANY)))
    assert found == list(range(AT))
    assert type(error) is kind
    assert f" in {fn.__name__}" in str(error.__cause__)
    assert list(executor.map(abs, range(MANY))) == list(range(MANY))


CHUNK = 10  # items, of which AT begins one


def test_chunks_travel_together_and_come_in_order(pool: MakePool, context: Any, batches: list[int]) -> None:
    """Whatever they return; the last one may be shorter."""
    executor = pool(2, context)
    items = range(-MANY, MANY + 7)
    assert list(executor.map(abs, items, chunksize=CHUNK)) == [abs(n) for n in items]
    assert list(executor.map(pow, range(MANY), [2] * MANY, chunksize=CHUNK)) == [n**2 for n in range(MANY)]
    assert list(executor.map(grow, range(100), chunksize=3)) == [grow(n) for n in range(100)]
    assert max(batches) > 1
    assert sum(batches) == 601 + 300 + 34


def test_a_death_costs_one_chunk_and_no_item_runs_twice(pool: MakePool, batches: list[int]) -> None:
    """An item shares its fate with those of its chunk, as with the standard library's pool, but with no others."""
    executor = pool(2)
    assert list(executor.map(abs, range(MANY), chunksize=CHUNK)) == list(range(MANY))  # so that batches are big
    found, error = _as_far_as_it_goes(executor.map(die_at, range(MANY), chunksize=CHUNK))
    assert found == list(range(AT))
    assert isinstance(error, WorkerDied)
    assert f"chunk {AT // CHUNK} of map over die_at" in str(error)
    assert max(batches) > 1
    executor.shutdown()
    assert set(noted().values()) == {1}
    assert set(noted()) >= set(range(AT + 1))


@pytest.mark.parametrize("chunksize", [1, 4])
def test_a_generator_may_wait_for_what_an_earlier_task_does(pool: MakePool, tmp_path: Path, chunksize: int) -> None:
    """So no more is taken of it than there is; as with the standard library's pool."""

    def numbers() -> Iterator[int]:
        yield from range(100)
        until(lambda: len(noted()) == 100, "those before it are run")
        yield from range(100, 120)

    assert list(pool(2).map(die_at, numbers(), chunksize=chunksize)) == list(range(120))


def stop_at(number: int) -> int:
    if number == AT:
        raise StopIteration
    return number


@pytest.mark.parametrize("chunksize", [1, CHUNK])
@pytest.mark.parametrize("kind", [list, iter])
def test_an_item_that_stops_an_iteration_stops_no_other(pool: MakePool, chunksize: int, kind: Any) -> None:
    """It is an error as others are; results that were there are not passed over."""
    found, error = _as_far_as_it_goes(pool(2).map(stop_at, kind(range(MANY)), chunksize=chunksize))
    assert found == list(range(AT))
    assert isinstance(error, RuntimeError)


@pytest.mark.parametrize(("fn", "kind"), [(raise_at, ValueError), (leave_at, SystemExit)])
def test_an_error_costs_one_chunk(pool: MakePool, fn: Any, kind: type[BaseException]) -> None:
    executor = pool(2)
    found, error = _as_far_as_it_goes(executor.map(fn, range(MANY), chunksize=CHUNK))
    assert found == list(range(AT))
    assert type(error) is kind
    assert f" in {fn.__name__}" in str(error.__cause__)
    assert list(executor.map(abs, range(MANY), chunksize=CHUNK)) == list(range(MANY))


def grow(number: int) -> bytes | list[int]:
    return bytes([number]) * 90_000 if number % 2 else [number] * 100


def huge(number: int) -> bytes:
    return bytes([number]) * 3_000_000


@pytest.mark.parametrize("fn", [grow, huge])
def test_results_that_do_not_fit_on_the_board(pool: MakePool, batches: list[int], fn: Any) -> None:
    """They come home in parts, whatever their size and kind."""
    executor = pool(1)
    assert list(executor.map(abs, range(MANY))) == list(range(MANY))  # so that batches are big
    batches.clear()
    assert list(executor.map(fn, range(100))) == [fn(n) for n in range(100)]
    assert max(batches) > 1


def grow_and_die(number: int) -> bytes:
    if number == 77:
        os._exit(5)
    return bytes([number]) * 90_000


def test_a_death_after_some_parts_have_come(pool: MakePool) -> None:
    """What was sent, and what was only on the board, is there."""
    executor = pool(1)
    list(executor.map(abs, range(MANY)))
    found, error = _as_far_as_it_goes(executor.map(grow_and_die, range(100)))
    assert found == [bytes([n]) * 90_000 for n in range(77)]
    assert isinstance(error, WorkerDied)


def hold_at(number: int, gate: str) -> int:
    note(number)
    if number == AT:
        tasks.wait_for(Path(gate))
    return number


def test_one_that_takes_long_holds_up_no_other(pool: MakePool, tmp_path: Path, batches: list[int]) -> None:
    """What came before it in its batch is handed out, what comes after it is done by others, and all once."""
    executor = pool(2)
    gate = tmp_path / "gate"
    results = executor.map(hold_at, range(MANY), [str(gate)] * MANY)
    assert list(islice(results, AT)) == list(range(AT))
    until(lambda: len(noted()) == MANY, "all others are done meanwhile")
    gate.touch()
    assert list(results) == list(range(AT, MANY))
    assert noted() == Counter(range(MANY))
    assert max(batches) > 1


def start_a_sleeper(number: int) -> int:
    if number != AT:
        return number
    time.sleep(0.001)
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True).pid


def test_what_an_item_leaves_is_ended_and_named(pool: MakePool, caplog: pytest.LogCaptureFixture) -> None:
    """As with any task."""
    executor = pool(1)
    pid = list(executor.map(start_a_sleeper, range(MANY)))[AT]
    until(lambda: is_gone(pid), "it is ended")
    until(lambda: f"item {AT} of map over start_a_sleeper left processes behind" in caplog.text, "and named")


def test_leaving_the_iterator_cancels_what_has_not_begun(pool: MakePool, tmp_path: Path) -> None:
    """Whoever wants only the first results does not pay for all."""
    executor = pool(1)
    results = executor.map(note_slowly, range(MANY))
    assert list(islice(results, 10)) == list(range(10))
    results.close()  # type: ignore[attr-defined]
    executor.shutdown()
    assert len(noted()) < MANY // 2


def note_slowly(number: int) -> int:
    note(number)
    time.sleep(0.001)
    return number


def test_a_shutdown_waits_for_all_items_or_cancels_them(pool: MakePool) -> None:
    """As for tasks: with ``cancel_futures`` what has not begun is cancelled, and the iterator says so."""
    executor = pool(2)
    results = executor.map(abs, range(MANY))
    executor.shutdown()
    assert list(results) == list(range(MANY))
    executor = pool(1)
    results = executor.map(note_slowly, range(MANY))
    assert next(results) == 0
    executor.shutdown(cancel_futures=True)
    found, error = _as_far_as_it_goes(results)
    assert isinstance(error, CancelledError)
    assert found == list(range(1, len(found) + 1))


def test_killed_workers_end_the_iterator(pool: MakePool) -> None:
    """With the error that says so."""
    executor = pool(1)
    results = executor.map(note_slowly, range(MANY))
    assert next(results) == 0
    executor.kill_workers()
    _, error = _as_far_as_it_goes(results)
    assert isinstance(error, PoolTerminated | CancelledError)


def test_an_initializer_that_fails_ends_the_iterator(pool: MakePool) -> None:
    """With the reason."""
    executor = pool(2, initializer=divmod, initargs=(1, 0))
    found, error = _as_far_as_it_goes(executor.map(abs, range(MANY)))
    assert found == []
    assert isinstance(error, BrokenProcessPool)
    assert "ZeroDivisionError" in str(error)


def test_the_iterator_has_a_limit(pool: MakePool) -> None:
    """``timeout`` is from the call to the last result."""
    results = pool(1).map(tasks.nap, [0.0] * 20 + [LIMIT_S], timeout=1.0)
    began = time.monotonic()
    found, error = _as_far_as_it_goes(results)
    assert found == [None] * 20
    assert isinstance(error, TimeoutError)
    assert time.monotonic() - began < LIMIT_S / 3


def hang_at(number: int) -> int:
    if number == AT:
        time.sleep(LIMIT_S)
    return number


def test_a_limit_costs_one_item(pool: MakePool) -> None:
    """Under a task timeout each item has its own; what came before is there."""
    found, error = _as_far_as_it_goes(pool(2).options(timeout=3.0).map(hang_at, range(MANY)))
    assert found == list(range(AT))
    assert isinstance(error, TaskTimeout)


def die_once(number: int) -> int:
    note(number)
    if number == AT and noted()[number] == 1:
        os._exit(7)
    return number


def test_a_retry_policy_is_for_each_item(pool: MakePool) -> None:
    """The one that took its worker down is tried again; no other is."""
    executor = pool(2)
    assert list(executor.options(retry=Retry(attempts=2)).map(die_once, range(MANY))) == list(range(MANY))
    assert noted() == Counter(range(MANY)) + Counter([AT])


def test_maps_of_many_threads_at_once(pool: MakePool) -> None:
    """And tasks of other kinds between them."""
    executor = pool(2)

    def work(seed: int) -> bool:
        items = range(seed, seed + MANY)
        futures = [executor.submit(tasks.echo, [n]) for n in range(20)]
        same = list(executor.map(abs, items)) == list(items)
        return same and [future.result(LIMIT_S) for future in futures] == [[n] for n in range(20)]

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(work, range(6), timeout=LIMIT_S))


# ------------------------------------------------------------------ chunks


NUMBERS = list(range(-5, 1_000, 2))
PLAIN = {
    "list": NUMBERS,
    "tuple": tuple(NUMBERS),
    "range": range(-5, 1_000, 2),
    "backwards": range(1_000, -5, -3),
    "floats": [number / 8 for number in NUMBERS],
    "beyond 64 bits": range(10**20, 10**20 + 300),
    "words": [f"word {number}" for number in NUMBERS],
    "bytes": bytes(range(256)),
    "a dictionary": dict.fromkeys(NUMBERS),
    "one that is not plain, late": [*NUMBERS, [1, 2], *NUMBERS],
}


@pytest.mark.parametrize("items", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("chunksize", [1, 2, 7, 100, 10_000])
def test_chunks_of_anything(pool: MakePool, items: Any, chunksize: int) -> None:
    """Whatever is cut into chunks, and however these travel, each item is given to the function and comes back."""
    executor = pool(2)
    assert list(executor.map(tasks.echo, items, timeout=LIMIT_S, chunksize=chunksize)) == list(items)


def test_what_is_taken_is_taken_at_the_call(pool: MakePool) -> None:
    """Who changes the list afterwards changes nothing that was asked for."""
    executor = pool(1)
    executor.submit(time.sleep, 0.2)
    items = list(range(1_000))
    results = executor.map(tasks.echo, items, timeout=LIMIT_S, chunksize=10)
    items[500:] = ["other", "things"]
    assert list(results) == list(range(1_000))


@pytest.mark.parametrize("fn", [tasks.echo, lambda number: [number]], ids=["small", "pickled"])
def test_it_ends_where_it_is_closed(pool: MakePool, fn: Any) -> None:
    """Within a chunk, too; and what is left of the chunk is kept nowhere."""
    results = pool(2).map(fn, range(1_000), timeout=LIMIT_S, chunksize=100)
    assert len(list(islice(results, 150))) == 150
    results.close()  # type: ignore[attr-defined]
    assert list(results) == []
    results.close()  # type: ignore[attr-defined]


def fork_now_and_then(number: int) -> int:
    note(number)
    if number % 60 == 20:
        os.fork()
    return number


@pytest.mark.parametrize("leftovers", ["kill", "leave"])
def test_a_child_that_comes_back_through_the_loop_runs_nothing(pool: MakePool, leftovers: Any) -> None:
    """An item forks and forgets: the child is not to run the rest of the batch, nor write on the worker's board."""
    executor = pool(1, leftovers=leftovers)
    assert list(executor.map(fork_now_and_then, range(MANY), timeout=LIMIT_S)) == list(range(MANY))
    time.sleep(0.2)  # that a child would have to go on
    assert noted() == Counter(range(MANY))


def test_two_threads_at_one_iterator(pool: MakePool) -> None:
    """Who asks while the other one waits is told so, as with a generator; and nothing is lost for the other one."""
    executor = pool(2)
    results = executor.map(doze, range(100), timeout=LIMIT_S, chunksize=5)
    found: list[int] = []
    refused: list[str] = []

    def read() -> None:
        while True:
            try:
                found.append(next(results))
            except StopIteration:
                return
            except ValueError as error:
                refused.append(str(error))
                time.sleep(0.002)

    readers = [threading.Thread(target=read, daemon=True) for _ in range(2)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(LIMIT_S)
    assert set(refused) == {"generator already executing"}
    assert sorted(found) == list(range(100))


def doze(number: int) -> int:
    time.sleep(0.01)
    return number
