"""What the quick benchmark says of a loss, and when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import baseline
from benchmarks.baseline import ATTEMPTS, Kind, Verdict, judge, suspects
from benchmarks.quick import FIGURES, compare, ratios

KNOWN = {"futures": 20.0, "start": 0.1}


def the_futures(*measured: float) -> Verdict:
    """The verdict on one figure, from so many attempts."""
    verdict, _ = judge(KNOWN, [{"futures": ratio, "start": 0.1} for ratio in measured])
    assert verdict.figure == "futures"
    return verdict


@pytest.mark.parametrize(
    ("lost", "kind"),
    [
        (-1.0, Kind.FINE),
        (0.0, Kind.FINE),
        (0.30, Kind.FINE),
        (1 / 3, Kind.WARNING),
        (0.40, Kind.WARNING),
        (0.49, Kind.WARNING),
        (0.50, Kind.SUSPECT),
        (0.60, Kind.SUSPECT),
        (1.0, Kind.SUSPECT),
    ],
)
def test_the_loss_decides(lost: float, kind: Kind) -> None:
    """30 % less is silent, a third is a warning, and half is looked at again; a gain is silent, too."""
    verdict = the_futures(20.0 * (1 - lost))
    assert verdict.kind is kind
    assert verdict.loss == pytest.approx(lost)
    assert verdict.baseline == 20.0


@pytest.mark.parametrize("ratio", [0.04, 0.06, 0.07])
def test_a_small_ratio_is_judged_by_its_share_too(ratio: float) -> None:
    """What is slower than the stock pool by nature is compared with itself, not with the stock pool."""
    kinds = {0.04: Kind.SUSPECT, 0.06: Kind.WARNING, 0.07: Kind.FINE}
    assert judge({"start": 0.1}, [{"start": ratio}])[0].kind is kinds[ratio]


@pytest.mark.parametrize("times", [1, 2])
def test_half_lost_does_not_fail_before_the_third_time(times: int) -> None:
    """The machine may have had something else to do."""
    verdict = the_futures(*[8.0] * times)
    assert verdict.kind is Kind.SUSPECT
    assert suspects([verdict]) == ["futures"]


def test_half_lost_three_times_fails() -> None:
    """Then it is no accident."""
    verdict = the_futures(8.0, 7.0, 9.0)
    assert verdict.kind is Kind.FAILURE
    assert verdict.ratios == (8.0, 7.0, 9.0)
    assert suspects([verdict]) == []
    assert "failure: futures: 20.00x in the baseline, now 8.00x, 7.00x, 9.00x: 55% lost" in str(verdict)


@pytest.mark.parametrize(("better", "kind"), [(20.0, Kind.FINE), (12.0, Kind.WARNING), (10.1, Kind.WARNING)])
@pytest.mark.parametrize("place", range(ATTEMPTS))
def test_the_best_of_the_attempts_counts(better: float, kind: Kind, place: int) -> None:
    """Half must be lost in each of them, whichever comes first."""
    measured = [4.0] * ATTEMPTS
    measured[place] = better
    assert the_futures(*measured).kind is kind


def test_figures_are_judged_apart() -> None:
    """One that is bad spoils no other, and one that is good hides no other."""
    measured = [{"futures": 20.0, "start": 0.03}] * ATTEMPTS
    assert [verdict.kind for verdict in judge(KNOWN, measured)] == [Kind.FINE, Kind.FAILURE]


def test_only_what_is_bad_is_measured_again() -> None:
    """Later attempts have the suspects only; the others are judged by the first."""
    measured = [{"futures": 8.0, "start": 0.1}, {"futures": 19.0}]
    assert [verdict.kind for verdict in judge(KNOWN, measured)] == [Kind.FINE, Kind.FINE]
    assert suspects(judge(KNOWN, measured[:1])) == ["futures"]


def test_a_figure_that_is_missing_is_said() -> None:
    """It is neither good nor bad."""
    verdicts = judge(KNOWN, [{"start": 0.1}])
    assert [(verdict.figure, verdict.kind) for verdict in verdicts] == [
        ("futures", Kind.MISSING),
        ("start", Kind.FINE),
    ]
    assert str(verdicts[0]) == "missing: futures: 20.00x in the baseline, not measured now"


def test_a_new_figure_is_said() -> None:
    """And how it comes into the baseline."""
    verdicts = judge(KNOWN, [{**KNOWN, "map": 3.0}])
    assert [(verdict.figure, verdict.kind) for verdict in verdicts][2:] == [("map", Kind.NEW)]
    assert str(verdicts[2]) == "new: map: 3.00x, not in the baseline; --write-baseline writes it"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """A baseline survives its file."""
    path = tmp_path / "baseline.json"
    baseline.write(KNOWN, "a machine", path)
    assert baseline.read(path) == KNOWN
    assert "a machine" in path.read_text()


def test_the_committed_baseline_has_every_figure() -> None:
    """Of those that are measured, and no other."""
    assert set(baseline.read()) == set(FIGURES)


def test_more_is_not_better_of_times() -> None:
    """A ratio says how many times better than the stock pool, whichever way that is."""
    medians = {
        "stock": {"futures_per_s": 100.0, "cold_start_ms": 10.0},
        "safepool": {"futures_per_s": 300.0, "cold_start_ms": 40.0},
    }
    assert ratios(medians) == {"futures_per_s": 3.0, "cold_start_ms": 0.25}
    assert ratios({"safepool": medians["safepool"]}) == {}


# ------------------------------------------------------- the loop of the command


def run(measured: list[float], capsys: pytest.CaptureFixture[str]) -> tuple[bool, int, str]:
    """(is it good, how often was it measured again, what was said) for a figure that is measured so."""
    todo = iter(measured)
    first = {"futures": next(todo), "start": 0.1}
    again: list[list[str]] = []

    def measure(bad: list[str]) -> dict[str, float]:
        again.append(bad)
        return {"futures": next(todo)}

    good = compare(KNOWN, first, measure)
    assert all(bad == ["futures"] for bad in again)
    return good, len(again), capsys.readouterr().out


def test_a_good_figure_is_measured_once(capsys: pytest.CaptureFixture[str]) -> None:
    """And nothing is said of it."""
    assert run([15.0], capsys) == (True, 0, "as the baseline\n")


def test_a_warning_is_measured_once_and_does_not_fail(capsys: pytest.CaptureFixture[str]) -> None:
    good, again, said = run([12.0], capsys)
    assert (good, again) == (True, 0)
    assert "warning: futures: 20.00x in the baseline, now 12.00x: 40% lost" in said


def test_a_bad_moment_is_measured_again_and_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    good, again, said = run([8.0, 19.0], capsys)
    assert (good, again) == (True, 1)
    assert said.splitlines() == ["measured again, for half is lost: futures", "as the baseline"]


def test_a_figure_that_stays_bad_fails_after_three(capsys: pytest.CaptureFixture[str]) -> None:
    good, again, said = run([8.0, 8.0, 8.0, 20.0], capsys)
    assert (good, again) == (False, 2)
    assert "failure: futures" in said


def test_a_figure_that_cannot_be_measured_again_ends_the_loop(capsys: pytest.CaptureFixture[str]) -> None:
    """The stock pool may fail, too; that is told elsewhere."""
    asked: list[list[str]] = []

    def nothing(bad: list[str]) -> dict[str, float]:
        asked.append(bad)
        return {}

    assert compare(KNOWN, {"futures": 8.0, "start": 0.1}, nothing)
    assert len(asked) == ATTEMPTS - 1
    assert "suspect: futures" in capsys.readouterr().out
