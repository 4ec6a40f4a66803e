"""The tables, the page and the plot of the benchmark, from results that are known."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.children import python_path
from benchmarks.report import in_columns, medians, notes_of, number, page, row_text, table_of, times_better
from benchmarks.rows import ROWS, Figure
from tests.support import LIMIT_S


def cell(*runs: dict[str, float], trouble: str = "", why: str = "") -> dict[str, Any]:
    return {"runs": list(runs), "trouble": trouble, "why": why}


def no_op(per_s: float, parent: float = 10.0, workers: float = 5.0) -> dict[str, float]:
    return {"per_s": per_s, "parent_us": parent, "workers_us": workers}


NOOP = {
    "safepool": cell(no_op(90_000), no_op(123_456), no_op(200_000)),
    "stock": cell(no_op(5_000, 160.0), no_op(6_172.8, 20.0), no_op(6_500, 15.0)),
    "loky": cell(no_op(1), trouble="hung", why="not done within 60 s"),
    "mpire": cell(trouble="failed", why="exit code 1: Traceback\nValueError: odd"),
}
RESULTS = {
    "machine": "A processor, 2 cores, Linux 6, CPython 3.11",
    "date": "2025-01-02",
    "versions": {"safepool": "0.1.0", "stock": "", "loky": "3.7.0", "mpire": "2.10.2", "pebble": None},
    "repeats": 3,
    "rows": {
        "noop": NOOP,
        "trip": {"safepool": cell({"p50_us": 50.0, "p99_us": 80.0}), "stock": cell({"p50_us": 100.0, "p99_us": 40.0})},
        "features": {"safepool": cell({"plain_per_s": 100_000.0, "timeout_share": 0.9})},
    },
}


def test_a_cell_is_the_median_and_how_many_times_better_we_are() -> None:
    """Of rates and of costs alike; "~" if the runs differ; a pool that was spoilt has none, though a run was good."""
    assert table_of("noop", NOOP) == [
        ["", "futures/s", "parent CPU us/task", "workers CPU us/task"],
        ["safepool", "~123,456", "10", "5"],
        ["stock", "6,173 (20x)", "~20 (2x)", "5 (1x)"],
        ["loky", "hung", "", ""],
        ["mpire", "failed", "", ""],
    ]


def test_below_one_the_other_is_better() -> None:
    """And it is shown."""
    assert table_of("trip", RESULTS["rows"]["trip"])[2] == ["stock", "100 (2x)", "40 (0.5x)"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("more", "ours", "theirs", "times"),
    [(True, 8.0, 2.0, 4.0), (False, 8.0, 2.0, 0.25), (True, 13.0, 0.0, None), (False, -0.5, 2.0, None)],
)
def test_times_better(more: bool, ours: float, theirs: float, times: float | None) -> None:
    """Nothing is said of what has no ratio."""
    assert times_better(Figure("key", "words", more), ours, theirs) == times


def test_without_ours_there_is_no_ratio() -> None:
    """But the others' figures are there."""
    pools = {"safepool": cell(trouble="hung", why="late"), "stock": cell(no_op(5_000.0))}
    assert table_of("noop", pools)[1:] == [["safepool", "hung", "", ""], ["stock", "5,000", "10", "5"]]


def test_figures_that_nobody_has_are_left_out() -> None:
    """A pool without an event callback has no column for it."""
    assert table_of("features", RESULTS["rows"]["features"])[0] == ["", "futures/s without", "share with timeout"]  # type: ignore[index]


@pytest.mark.parametrize(("value", "words"), [(123456.7, "123,457"), (99.94, "99.9"), (0.04567, "0.0457"), (0.0, "0")])
def test_three_digits_count(value: float, words: str) -> None:
    assert number(value) == words


def test_medians_of_nothing_are_nothing() -> None:
    assert medians(cell()) == {}


def test_why_is_said_in_one_line() -> None:
    assert notes_of(NOOP) == ["loky: hung: not done within 60 s", "mpire: failed: ValueError: odd"]


def test_columns_are_aligned() -> None:
    """To the right, the names of the pools to the left."""
    assert list(in_columns([["", "a figure", "b"], ["stock", "1", "2,000"], ["loky", "hung"]])) == [
        "       a figure      b",
        "stock         1  2,000",
        "loky       hung",
    ]


def test_a_row_says_what_it_is_and_what_went_wrong() -> None:
    text = row_text("noop", NOOP)
    assert text.startswith(f"noop: {ROWS['noop'].words}\n")
    assert "  mpire: failed: ValueError: odd" in text


def test_the_page_has_all_of_it() -> None:
    """The machine, versions, who is left out, the image, every table, and how to make it again."""
    text = page(RESULTS, "performance.svg")
    for words in (
        "Machine: A processor, 2 cores, Linux 6, CPython 3.11.",
        "loky 3.7.0",
        "pebble: not installed, left out",
        "(performance.svg)",
        "the median of 3 runs",
        "| stock | 6,173 (20x) | ~20 (2x) | 5 (1x) |",
        "| loky | hung |  |  |",
        "* mpire: failed: ValueError: odd",
        "| stock | 100 (2x) | 40 (0.5x) |",
        "python -m benchmarks --json",
        "2025-01-02",
    ):
        assert words in text
    assert all(len(line) <= 120 or line[0] in "|W" for line in text.splitlines() if line)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *words],
        capture_output=True,
        text=True,
        timeout=2 * LIMIT_S,
        cwd=python_path().partition(":")[0],
    )


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """The results as a file."""
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RESULTS))
    return path


@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_the_plot_is_written(stored: Path, suffix: str, begins: bytes) -> None:
    """As PNG or SVG by its suffix, with the figures and the troubles in it; the same results make the same file."""
    pytest.importorskip("matplotlib")
    images = [stored.with_name(f"{name}{suffix}") for name in ("first", "second")]
    for image in images:  # (matplotlib keeps fonts open, so not in this process)
        done = command("--from", str(stored), "--plot", str(image))
        assert done.returncode == 0, done.stderr
    first, second = (image.read_bytes() for image in images)
    assert first.startswith(begins)
    assert first == second
    if suffix == ".svg":
        text = first.decode()
        for words in ("123,456", "6,173", "hung", "failed", "noop: futures/s", "trip: p50 us"):
            assert words in text
        assert "features" not in text  # one pool is no comparison
        assert ">0.4<" not in text  # nor does a panel that is left over show anything


def test_the_page_is_written_with_its_plot(stored: Path) -> None:
    """Beside each other, in a folder that may be new."""
    pytest.importorskip("matplotlib")
    path = stored.parent / "docs" / "performance.md"
    done = command("--from", str(stored), "--page", str(path))
    assert done.returncode == 0, done.stderr
    assert "(performance.svg)" in path.read_text()
    assert path.with_name("performance.svg").read_bytes().startswith(b"<?xml")


def test_the_command_measures_and_writes(tmp_path: Path) -> None:
    """One small row of two real pools: the head, the table, and JSON that has every run."""
    path = tmp_path / "results.json"
    done = command("--rows", "trip,timeout", "--pools", "safepool,stock", "--repeat", "1", "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert "safepool 0." in done.stdout
    assert "timeout: 50 tasks" in done.stdout
    results = json.loads(path.read_text())
    assert results["rows"]["timeout"]["stock"]["trouble"] == "n/a"
    for pool in ("safepool", "stock"):
        (run,) = results["rows"]["trip"][pool]["runs"]
        assert set(run) == {figure.key for figure in ROWS["trip"].figures}
        assert all(value > 0 for value in run.values()), run


@pytest.mark.parametrize(
    ("words", "said"),
    [(("--rows", "trop"), "unknown: trop"), (("--pools", "ray"), "unknown: ray"), (("--plot", "a.gif"), ".png, .svg")],
)
def test_the_command_refuses_what_it_does_not_know(words: tuple[str, ...], said: str) -> None:
    """Before it measures anything."""
    done = command(*words)
    assert done.returncode == 2
    assert said in done.stderr
