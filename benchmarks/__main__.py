"""The hot path of safepool beside its peers: ``python -m benchmarks`` prints a table for each row.

Every run of every pool plays in a fresh process under a limit, in turns; medians, ratios, CPU time beside wall time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.children import heed_sigterm
from benchmarks.machine import heading, in_turns, installed, machine_line, present
from benchmarks.plot import SUFFIXES, draw
from benchmarks.report import LEGEND, Results, page, row_text
from benchmarks.rows import PEERS, ROWS, play

REPEATS = 3


def measure_row(row: str, pools: Sequence[str], repeats: int) -> dict[str, dict[str, Any]]:
    """Runs of every pool in turns; one that is spoilt once is spoilt, and is not tried again."""
    found: dict[str, dict[str, Any]] = {pool: {"runs": [], "trouble": "", "why": ""} for pool in pools}
    for pool in in_turns(pools, repeats):
        cell = found[pool]
        if not cell["trouble"]:
            told, cell["trouble"], cell["why"] = play(row, pool)
            cell["runs"] += [told] if told else []
    return found


def measure(rows: Iterable[str], pools: Sequence[str], repeats: int) -> Results:
    """All of it; each table is printed as soon as it is known."""
    versions = installed(pools)
    print(f"{heading(versions)}\nmedians of {repeats} runs in turns; {LEGEND}\n", flush=True)
    results: Results = {
        "machine": machine_line(),
        "date": date.today().isoformat(),
        "versions": versions,
        "repeats": repeats,
        "rows": {},
    }
    for row in rows:
        of_row = [pool for pool in present(versions) if pool in ROWS[row].pools]
        if of_row:
            results["rows"][row] = measure_row(row, of_row, repeats)
            print(row_text(row, results["rows"][row]) + "\n", flush=True)
    return results


def _names(allowed: Iterable[str]) -> Any:
    def of(text: str) -> list[str]:
        names = text.split(",")
        if unknown := sorted(set(names) - set(allowed)):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(allowed)}")
        return names

    return of


def _image(text: str) -> Path:
    path = Path(text)
    if path.suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"it must end with one of {', '.join(SUFFIXES)}; got {text!r}")
    return path


def _options() -> argparse.Namespace:
    words = "\n".join(["rows:", *(f"  {name:12} {row.words}" for name, row in ROWS.items())])
    parser = argparse.ArgumentParser(
        "python -m benchmarks", None, __doc__, words, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=_names(ROWS), default=list(ROWS), metavar="A,B", help="default: all")
    parser.add_argument("--pools", type=_names(PEERS), default=list(PEERS), metavar="A,B", help="default: all")
    parser.add_argument("--repeat", type=int, default=REPEATS, help="runs of each pool (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of every run there")
    parser.add_argument("--plot", type=_image, metavar="FILE", help="draw them, as PNG or SVG by its suffix")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the tables as Markdown, and an SVG beside it")
    parser.add_argument("--from", type=Path, dest="source", metavar="FILE", help="measure nothing; take this JSON")
    return parser.parse_args()


def main() -> None:
    options = _options()
    heed_sigterm()
    if options.source:
        results = json.loads(options.source.read_text())
    else:
        results = measure(options.rows, options.pools, max(1, options.repeat))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.plot:
        draw(results, options.plot)
    if options.page:
        image = options.page.with_suffix(".svg")
        options.page.parent.mkdir(parents=True, exist_ok=True)
        draw(results, image)
        options.page.write_text(page(results, image.name))


if __name__ == "__main__":
    main()
