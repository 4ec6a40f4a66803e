"""The results of ``python -m benchmarks`` as one image: a panel for each row, a bar for each pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.pools import OURS
from benchmarks.report import Results, medians, number
from benchmarks.rows import ROWS

COLUMNS = 3
PANEL_INCHES = (4.6, 2.3)
OURS_COLOUR, PEERS_COLOUR, WORDS_COLOUR = "#1b6ca8", "#b9c2cb", "#333333"
SUFFIXES = (".png", ".svg")


def draw(results: Results, path: Path) -> None:
    """Write the image, as PNG or SVG by its suffix; the first figure of each row that more than one pool has."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = {row: pools for row, pools in results["rows"].items() if len(pools) > 1}
    lines = max(1, -(-len(rows) // COLUMNS))
    width, height = PANEL_INCHES
    # Text stays text, and the same results make the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "safepool", "font.size": 8}):
        image = Figure(figsize=(width * COLUMNS, height * lines), layout="constrained")
        panels = list(image.subplots(lines, COLUMNS, squeeze=False).flat)
        for panel, (row, pools) in zip(panels, rows.items()):
            _panel(panel, row, pools)
        for panel in panels[len(rows) :]:
            panel.set_axis_off()
        image.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(panel: Any, row: str, pools: dict[str, dict[str, Any]]) -> None:
    figure = ROWS[row].figures[0]
    found = {pool: medians(cell).get(figure.key) for pool, cell in pools.items()}
    names = list(found)
    lengths = [found[name] or 0.0 for name in names]
    colours = [OURS_COLOUR if name == OURS else PEERS_COLOUR for name in names]
    bars = panel.barh(names, lengths, color=colours)
    words = [number(value) if value is not None else pools[name]["trouble"] for name, value in found.items()]
    panel.bar_label(bars, words, padding=3, color=WORDS_COLOUR)
    panel.set_xlim(0, 1.25 * max(lengths) or 1)
    panel.invert_yaxis()
    panel.set_xticks([])
    panel.tick_params(length=0)
    panel.spines[["top", "right", "bottom"]].set_visible(False)
    better = "more" if figure.more_is_better else "less"
    panel.set_title(f"{row}: {figure.words} ({better} is better)", loc="left", fontsize=9)
