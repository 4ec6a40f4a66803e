"""The pool holds every row of the fault grid, however its workers start, and nothing is left of a row."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from benchmarks.fault_rows import PASS, ROWS
from benchmarks.faults import Cell, run_cell
from benchmarks.pools import OURS, STARTS

LIMIT_S = 110.0  # for one cell; its own limits are shorter, but for rows that repeat much
SLACK_S = 1.5  # what a machine that has other work may add to any time
#: Rows that take long by nature are tried here with the default start only, and with the others by nox -s slow.
LONG = (6, 7, 8, 9, 16, 24)
#: What the stdlib refuses under fork, and what is the user's own choice there.
NOT_UNDER_FORK = (7, 22)


def _combinations() -> Iterator[Any]:
    for number, row in ROWS.items():
        for start in STARTS:
            if start == "fork" and number in NOT_UNDER_FORK:
                continue
            is_slow = start != "default" and number in LONG
            marks = [pytest.mark.slow] if is_slow else []
            yield pytest.param(number, start, marks=marks, id=f"{number}-{row.fault.replace(' ', '_')}-{start}")


@pytest.fixture(autouse=True)
def audit() -> None:
    """In the place of that for tests in this process: a cell is audited within and after its own process."""


@pytest.fixture(scope="module")
def cells(request: pytest.FixtureRequest) -> Iterator[dict[tuple[int, str], Future[Cell]]]:
    """The cells of all selected tests, two at a time: most of what they do is to wait."""
    params = [item.callspec.params for item in request.session.items if item.path == request.path]  # type: ignore[attr-defined]
    with ThreadPoolExecutor(2) as threads:
        found = {
            (number, start): threads.submit(run_cell, ROWS[number], OURS, start, slack=SLACK_S, brief=True)
            for number, start in ((param["number"], param["start"]) for param in params)
        }
        yield found
        threads.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("number", "start"), [*_combinations()])
def test_the_row_holds(cells: dict[tuple[int, str], Future[Cell]], number: int, start: str) -> None:
    """All of it: every future resolves, right and soon, nothing innocent is lost, the pool goes on, nothing is left."""
    cell = cells[number, start].result(LIMIT_S)
    assert cell.verdict == PASS, "\n".join([str(cell), *cell.evidence])
    assert [part["part"] for part in cell.parts if part["verdict"] != PASS] == []
