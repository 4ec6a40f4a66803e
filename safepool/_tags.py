"""Arithmetic of tags: whose a process is, as a number that all its descendants inherit and cannot raise.

A tag is a pair of limits of a resource that no kernel looks at any more (see ``_os.linux``): the hard one names the
keeper, the soft one the worker.  Both survive exec, setsid and a cleared environment, and an ordinary user can only
lower them.  So pools within pools work downwards: a keeper within a worker takes a number below that worker's.

    keeper            hard = soft = H                  H is a multiple of 2**34 between 2**62 and 2**63
    its worker n      hard = H, soft = H - n * 2**20   the upper half of n is for workers that its program forks
    a keeper in there hard = soft = K                  K is a multiple of 2**8 within 2**20 below that; programs of
                                                       one worker have different ones, for they have different pids
    its worker m      hard = K, soft = K - m
    and in there      no tags: what is further in belongs to that worker
    ``safepool run``  hard = soft = R                  R is a multiple of 2**34 above all those; the keepers in there
                                                       are as if it were not
"""

from __future__ import annotations

FIRST, LAST = 1 << 62, 1 << 63  # of the numbers that are tags; below the last
RUNS = 3 << 61  # from here on they are those of ``safepool run``
OUTER, INNER = 34, 8  # bits: all that belongs to one keeper
WORKER = 20  # bits: all that belongs to a worker of an outer keeper
LEFT_ON_PURPOSE = 0x5AFE  # the soft limit of what a task leaves running on purpose

Tag = tuple[int, int]  # soft, hard


def fresh(random: bytes, pid: int, inherited: Tag) -> int | None:
    """The number of a new keeper of this process; None where there is none to be had.  ``random``: eight bytes."""
    soft, hard = inherited
    if hard < 0 or (hard >= RUNS and soft == hard):  # no limit: nobody's family
        return _between(FIRST, RUNS, random)
    if _is_outer(hard) and 0 < hard - soft < 1 << OUTER and soft % (1 << WORKER) == 0:
        return soft - (1 + pid % ((1 << WORKER - INNER) - 1) << INNER)
    return None


def of_run(random: bytes, inherited: Tag) -> int | None:
    """The number of a ``safepool run``; None: it is within a pool's worker, and belongs to that."""
    soft, hard = inherited
    if hard < 0:
        return _between(RUNS, LAST, random)
    return _between(RUNS, hard, random) if hard >= RUNS + (2 << OUTER) and soft == hard else None


def _between(first: int, last: int, random: bytes) -> int:
    return first + (1 + int.from_bytes(random, "big") % ((last - first >> OUTER) - 1) << OUTER)


def most_workers(keeper: int) -> int:
    """How many living workers can be told from each other: so many of the keeper's, and so many forked ones."""
    return (1 << _width(keeper) - _step(keeper) - 1) - 1


def of_worker(keeper: int, launch: int, *, forked: bool = False) -> int:
    """The soft limit of a keeper's worker, or of one that its program forked; used again after ``most_workers``."""
    most = most_workers(keeper)
    return keeper - ((launch - 1) % most + 1 + most * forked << _step(keeper))


def owner(keeper: int, tag: Tag) -> int | None:
    """The soft limit of the worker in whose family a process with this tag is; None: it cannot be told."""
    soft, hard = tag
    below = keeper - (soft if hard == keeper else hard)
    if not 0 < below < 1 << _width(keeper):
        return None
    return keeper - (below >> _step(keeper) << _step(keeper))


def outermost(hard: int) -> int:
    """The number of the keeper within whose family all keepers above this tag are."""
    return -(-hard >> OUTER) << OUTER


def is_left_on_purpose(tag: Tag | None) -> bool:
    return tag is not None and tag[0] == LEFT_ON_PURPOSE


def is_in_family(keeper: int, tag: Tag) -> bool:
    """Does a process with this tag come from this keeper, and is not left on purpose?"""
    _, hard = tag
    is_below = FIRST <= hard <= keeper < LAST and keeper - hard < 1 << _width(keeper)
    return is_below and not is_left_on_purpose(tag)


def _is_outer(keeper: int) -> bool:
    return FIRST <= keeper < LAST and keeper % (1 << OUTER) == 0


def _width(keeper: int) -> int:
    return OUTER if _is_outer(keeper) else INNER


def _step(keeper: int) -> int:
    return WORKER if _is_outer(keeper) else 0
