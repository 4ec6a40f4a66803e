"""Tags tell families apart, within and beside each other, and never take a stranger for one of ours."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from safepool import _tags
from safepool._tags import FIRST, LAST, RUNS

UNLIMITED = -1
randoms = st.binary(min_size=8, max_size=8)
pids = st.integers(2, 1 << 22)
launches = st.integers(1, 100_000)
limits = st.one_of(st.just(UNLIMITED), st.integers(0, LAST), st.sampled_from([0, 1000, 0x5AFE, FIRST, LAST]))


def outer(random: bytes) -> int:
    keeper = _tags.fresh(random, 2, (UNLIMITED, UNLIMITED))
    assert keeper is not None
    return keeper


@given(randoms, launches, st.booleans())
def test_a_worker_and_what_it_starts_are_its_keepers(random: bytes, launch: int, forked: bool) -> None:
    """The tag of a worker is in the keeper's family, names its worker, and may be worn by who had the keeper's."""
    keeper = outer(random)
    worker = _tags.of_worker(keeper, launch, forked=forked)
    assert worker < keeper
    assert _tags.is_in_family(keeper, (worker, keeper))
    assert _tags.owner(keeper, (worker, keeper)) == worker
    assert _tags.owner(keeper, (worker, worker)) == worker  # forked from the user's process
    assert _tags.outermost(keeper) == keeper


@given(randoms, randoms, randoms, pids)
def test_what_is_run_is_apart_and_its_pools_are_as_ever(random: bytes, again: bytes, inner: bytes, pid: int) -> None:
    """``safepool run`` wears a number that may be lowered to a keeper's, or another run's, and is neither's."""
    number = _tags.of_run(random, (UNLIMITED, UNLIMITED))
    assert number is not None
    assert _tags.is_in_family(number, (number, number))
    assert _tags.outermost(number) == number
    keeper = _tags.fresh(inner, pid, (number, number))
    assert keeper is not None
    assert keeper < number
    assert _tags.most_workers(keeper) == _tags.most_workers(outer(inner))
    nested = _tags.of_run(again, (number, number))
    assert nested is None or RUNS <= nested < number
    for tag in ((_tags.of_worker(keeper, 1), keeper), *(((nested, nested),) if nested else ())):
        assert not _tags.is_in_family(number, tag)
        assert not _tags.is_in_family(tag[1], (number, number))
    assert _tags.of_run(again, (_tags.of_worker(keeper, 1), keeper)) is None


@given(randoms)
def test_so_many_workers_differ(random: bytes) -> None:
    """Forked ones and the keeper's own, as many of each as it says."""
    keeper = outer(random)
    inner = _tags.fresh(random, 77, (_tags.of_worker(keeper, 5), keeper))
    assert inner is not None
    for number in (keeper, inner):
        most = _tags.most_workers(number)
        tags = [_tags.of_worker(number, n + 1, forked=forked) for forked in (False, True) for n in range(most)]
        assert len({*tags, number}) == 2 * most + 1
        assert most >= 100


@given(randoms, launches, launches, pids, pids, launches)
def test_keepers_within_workers(random: bytes, one: int, other: int, pid: int, pid2: int, inner: int) -> None:
    """A pool within a task belongs to that task's worker, and not to another worker or to a pool beside it."""
    keeper = outer(random)
    worker = _tags.of_worker(keeper, one)
    within = _tags.fresh(b"", pid, (worker, keeper))
    assert within is not None
    assert within < worker
    inmate = (_tags.of_worker(within, inner), within)
    assert _tags.owner(keeper, inmate) == worker
    assert _tags.is_in_family(keeper, inmate)
    assert _tags.is_in_family(within, inmate)
    assert _tags.outermost(within) == keeper
    assert not _tags.is_in_family(within, (worker, keeper))
    for beside in (_tags.fresh(b"", pid + 1, (worker, keeper)), _tags.fresh(b"", pid2, (worker, keeper))):
        assert beside is not None
        if beside != within:
            assert not _tags.is_in_family(beside, inmate)
            assert not _tags.is_in_family(within, (_tags.of_worker(beside, inner), beside))
    if (second := _tags.of_worker(keeper, other)) != worker:
        stranger = _tags.fresh(b"", pid2, (second, keeper))
        assert stranger is not None
        assert not _tags.is_in_family(stranger, inmate)
    assert _tags.fresh(b"", pid, inmate) is None  # further in there are none


@given(limits, limits, limits)
def test_limits_that_are_no_tags_are_nobodys(number: int, soft: int, hard: int) -> None:
    """Whatever the limits of a process are, it is in no family of a keeper without a number."""
    assert not _tags.is_in_family(0, (soft, hard))
    assert not _tags.is_in_family(number, (UNLIMITED, UNLIMITED))
    if number < FIRST or hard < FIRST:
        assert not _tags.is_in_family(number, (soft, hard))


def test_programs_that_one_task_starts_one_after_the_other_differ() -> None:
    """Their pids do."""
    keeper = outer(b"12345678")
    worker = _tags.of_worker(keeper, 1)
    numbers = [_tags.fresh(b"", pid, (worker, keeper)) for pid in range(1000, 3000)]
    assert None not in numbers
    assert all(one != other for one, other in pairwise(numbers))
    assert len(set(numbers)) == 2000
