"""What has become slower: ratios to the stock pool beside those of the committed baseline.  Pure, but for its file.

A loss of a third is a warning.  Half lost is a failure only if it is lost in each of ``ATTEMPTS`` measurements, for a
machine that does something else for a moment is none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("baseline.json")
WARNING_LOSS = 1 / 3
FAILURE_LOSS = 1 / 2
ATTEMPTS = 3
ROUNDING = 1e-9

#: Figure -> how many times better than the stock pool.
Ratios = Mapping[str, float]


class Kind(Enum):
    FINE = "fine"
    WARNING = "warning"
    SUSPECT = "suspect"  # half is lost, so far: measure it again
    FAILURE = "failure"
    MISSING = "missing"  # the baseline has it, no measurement has
    NEW = "new"  # the other way round


class Verdict(NamedTuple):
    """On one figure; ``loss``: the share of the baseline that is lost in the best of its measurements."""

    figure: str
    kind: Kind
    baseline: float | None
    ratios: tuple[float, ...]
    loss: float | None = None

    def __str__(self) -> str:
        measured = ", ".join(f"{ratio:.2f}x" for ratio in self.ratios)
        match self.kind:
            case Kind.MISSING:
                return f"missing: {self.figure}: {self.baseline:.2f}x in the baseline, not measured now"
            case Kind.NEW:
                return f"new: {self.figure}: {measured}, not in the baseline; --write-baseline writes it"
        lost = f"{max(0.0, self.loss or 0.0):.0%} lost"
        return f"{self.kind.value}: {self.figure}: {self.baseline:.2f}x in the baseline, now {measured}: {lost}"


def judge(baseline: Ratios, measured: Sequence[Ratios]) -> list[Verdict]:
    """On every figure of the baseline, and then on the new ones; ``measured``: one for each attempt, in turn."""
    found = [_judge_one(figure, ratio, _of(figure, measured)) for figure, ratio in baseline.items()]
    new = dict.fromkeys(figure for ratios in measured for figure in ratios if figure not in baseline)
    return found + [Verdict(figure, Kind.NEW, None, _of(figure, measured)) for figure in new]


def _of(figure: str, measured: Iterable[Ratios]) -> tuple[float, ...]:
    return tuple(ratios[figure] for ratios in measured if figure in ratios)


def _judge_one(figure: str, baseline: float, ratios: tuple[float, ...]) -> Verdict:
    if not ratios:
        return Verdict(figure, Kind.MISSING, baseline, ratios)
    loss = 1 - max(ratios) / baseline
    kind = Kind.FINE
    if loss >= FAILURE_LOSS - ROUNDING:
        kind = Kind.FAILURE if len(ratios) >= ATTEMPTS else Kind.SUSPECT
    elif loss >= WARNING_LOSS - ROUNDING:
        kind = Kind.WARNING
    return Verdict(figure, kind, baseline, ratios, loss)


def suspects(verdicts: Iterable[Verdict]) -> list[str]:
    """The figures to measure again."""
    return [verdict.figure for verdict in verdicts if verdict.kind is Kind.SUSPECT]


def read(path: Path = FILE) -> dict[str, float]:
    """Raises ``OSError`` or ``ValueError`` if there is no such baseline."""
    return {figure: float(ratio) for figure, ratio in json.loads(path.read_text())["ratios"].items()}


def write(ratios: Ratios, machine: str, path: Path = FILE) -> None:
    rounded = {figure: round(ratio, 3) for figure, ratio in ratios.items()}
    path.write_text(json.dumps({"machine": machine, "ratios": rounded}, indent=1) + "\n")
