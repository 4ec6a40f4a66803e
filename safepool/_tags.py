"""Arithmetic of tags: whose a process is, as a number that all its descendants inherit and cannot raise.

A tag is a pair of limits of a resource that no kernel looks at any more (see ``_os.linux``): the hard one names the
keeper, the soft one the worker.  Both survive exec, setsid and a cleared environment, and an ordinary user can only
lower them.  So pools within pools work downwards: a keeper within a worker takes the worker's soft limit as its own
hard one, and numbers its workers below that.

    keeper            hard = soft = H                  H is a multiple of 2**34 between 2**62 and 2**63
    its worker n      hard = H, soft = H - n * 2**20
    a keeper in there hard = soft = that number        a multiple of 2**20
    its worker m      soft = that number - m * 2**6
    and once more                                      a multiple of 2**6, numbering in steps of 1
"""

from __future__ import annotations

FIRST, LAST = 1 << 62, 1 << 63  # of the numbers that are tags; below the last
STEPS = (20, 6, 0)  # bits: the distance of two workers, by depth
WIDTHS = (34, 20, 6)  # bits: all that belongs to one keeper
LEFT_ON_PURPOSE = 0x5AFE  # the soft limit of what a task leaves running on purpose

Tag = tuple[int, int]  # soft, hard


def fresh(random: bytes, inherited_hard: int, inherited_soft: int) -> int | None:
    """The number of a new keeper; None where there is none to be had.  ``random``: eight bytes."""
    if inherited_hard < 0:  # no limit: nobody's family
        return FIRST + (int.from_bytes(random, "big") % (FIRST >> WIDTHS[0]) << WIDTHS[0])
    return inherited_soft if FIRST <= inherited_soft <= inherited_hard < LAST else None


def of_worker(keeper: int, launch: int, *, forked: bool = False) -> int:
    """The soft limit of a keeper's worker, or of one that the user's process forked; used again after thousands."""
    depth = _depth(keeper)
    half = (1 << WIDTHS[depth] - STEPS[depth] - 1) - 1
    return keeper - ((launch - 1) % half + 1 + half * forked << STEPS[depth])


def owner(keeper: int, tag: Tag) -> int | None:
    """The soft limit of the worker in whose family a process with this tag is; None: it cannot be told."""
    soft, hard = tag
    key = soft if hard == keeper else hard
    below = keeper - key
    step, width = STEPS[_depth(keeper)], WIDTHS[_depth(keeper)]
    if not 0 < below < 1 << width:
        return None
    return keeper - (below >> step << step)


def outermost(hard: int) -> int:
    """The number of the keeper within whose family all keepers above this tag are."""
    return -(-hard >> WIDTHS[0]) << WIDTHS[0]


def is_left_on_purpose(tag: Tag | None) -> bool:
    return tag is not None and tag[0] == LEFT_ON_PURPOSE


def is_in_family(keeper: int, tag: Tag) -> bool:
    """Does a process with this tag come from this keeper, and is not left on purpose?"""
    _, hard = tag
    return not is_left_on_purpose(tag) and 0 <= keeper - hard < 1 << WIDTHS[_depth(keeper)]


def _depth(keeper: int) -> int:
    for depth, width in enumerate(WIDTHS):
        if keeper % (1 << width) == 0:
            return depth
    return len(WIDTHS) - 1
