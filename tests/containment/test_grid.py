"""Whatever a task leaves and however it all ends, nothing is left soon after: seen from outside, cell by cell."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from benchmarks.families import ALLOWED, NA, NOBODY, OK, STARTS, TRIGGERS, Case, Cell, run_case
from benchmarks.family_shapes import SHAPES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process adopt orphans")

LIMIT_S = 110.0
AT_A_TIME = 2
EVERY_SHAPE_MEETS = ("return", "worker SIGKILL", "user SIGKILL")
USUAL = {
    *(Case(shape, trigger) for shape in SHAPES for trigger in EVERY_SHAPE_MEETS),
    Case("cleared", "return at once"),
    Case("deaf", "timeout"),
    Case("live bomb", "timeout"),
    Case("cleared", "keeper SIGKILL"),
    Case("stopped", "keeper SIGKILL"),
    Case("daemon", "user SIGTERM"),
    Case("grandchild", "user os._exit"),
    Case("deaf", "user raises"),
    Case("child", "user Ctrl-C"),
    Case("daemon", "keeper then user"),
    Case("cleared", "keeper and user"),
    Case("daemon", "return", "fork"),
    Case("deaf", "worker SIGKILL", "fork"),
    Case("bomb", "user SIGKILL", "fork"),
    Case("daemon", "user Ctrl-C", "fork"),
    Case("cleared", "return", uid=NOBODY),
    Case("stopped", "worker SIGKILL", uid=NOBODY),
    Case("daemon", "user SIGKILL", uid=NOBODY),
    Case("hopper", "user SIGKILL", uid=NOBODY),
    Case("cleared", "keeper and user", uid=NOBODY),
}
ALL = [
    *(Case(shape, trigger, start) for start in STARTS for shape in SHAPES for trigger in TRIGGERS),
    *(Case(shape, trigger, uid=NOBODY) for shape in SHAPES for trigger in TRIGGERS),
    *(Case(shape, trigger, isolation="namespace") for shape in SHAPES for trigger in TRIGGERS),
    *(Case(shape, trigger, "default", NOBODY, "namespace") for shape in SHAPES for trigger in TRIGGERS),
]


@pytest.fixture(autouse=True)
def audit() -> None:
    """In the place of that for tests in this process: a cell is watched from outside all the time."""


@pytest.fixture(scope="module")
def cells(request: pytest.FixtureRequest) -> Iterator[dict[Case, Future[Cell]]]:
    """The cells of all selected tests, two at a time: most of what they do is to wait."""
    cases = [item.callspec.params["case"] for item in request.session.items if item.path == request.path]  # type: ignore[attr-defined]
    with ThreadPoolExecutor(AT_A_TIME) as threads:
        yield {case: threads.submit(run_case, case) for case in cases}
        threads.shutdown(cancel_futures=True)


def _params() -> Iterator[Any]:
    for case in ALL:
        yield pytest.param(case, marks=[] if case in USUAL else [pytest.mark.slow], id=str(case).replace(", ", "-"))


@pytest.mark.parametrize("case", [*_params()])
def test_nothing_is_left(cells: dict[Case, Future[Cell]], case: Case) -> None:
    """All of the family is gone in time, and workers and keeper with it when the user's process is."""
    cell = cells[case].result(LIMIT_S)
    if cell.verdict == NA:
        pytest.skip(cell.evidence[0])
    assert cell.verdict == OK or (cell.verdict == ALLOWED and not case.must_hold), "\n".join(
        [str(cell), *cell.evidence]
    )
