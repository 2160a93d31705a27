# SPDX-License-Identifier: Apache-2.0
"""The figure of a table, for papers and pages: each method's difference to the baseline, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdlvfm.reporting.block import Block, Row, Table
from kdlvfm.reporting.canvas import INK, PAPER
from kdlvfm.reporting.cells import score_of
from kdlvfm.reporting.columns import METRIC_NAMES
from kdlvfm.reporting.statistics import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FAINT = "#9aa3ab"
_COLOURS: dict[Verdict | None, str] = {"better": "#0b62a8", "worse": "#b4460b", "not shown": INK, None: INK}
_WORDS: dict[Verdict | None, str] = {
    "better": "better than the baseline",
    "worse": "worse than the baseline",
    "not shown": "no difference shown",
    None: "no verdict",
}
# Inches.
_WIDTH, _LINE, _HEAD, _FOOT, _LEGEND = 7.0, 0.2, 0.7, 0.85, 0.4
_REACH = 1.0
"""How far an interval is drawn beyond all means, as a share of their span: two seeds may give any width."""


def draw_differences(table: Table, paths: Sequence[Path]) -> bool:
    """Draw each block with a baseline and a method that shares a seed with it: methods by rank, one line each.

    A dot is the difference of one seed, the diamond their mean, in the colour of the verdict, the whisker the 95 %
    interval that the table has; an arrow where it goes on beyond the figure.

    Args:
        table: what is shown.
        paths: files to write; their suffix is the format, as matplotlib knows it.

    Returns:
        Whether there was anything to draw; no file is written otherwise.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    shown = [(block, _ranked(block)) for block in table.blocks]
    shown = [(block, rows) for block, rows in shown if rows]
    if not shown:
        return False
    heights = [_HEAD + _LINE * len(rows) + _FOOT for _, rows in shown]
    total = sum(heights)
    # Without date and random names the same table is the same file.
    with rc_context({"svg.hashsalt": "kdlvfm", "font.size": 8, "axes.edgecolor": INK, "text.color": INK}):
        figure = Figure(figsize=(_WIDTH, total), facecolor=PAPER)
        top = total
        for (block, rows), height in zip(shown, heights, strict=True):
            bottom = (top - height + _FOOT) / total
            _draw_block(figure.add_axes((0.3, bottom, 0.66, _LINE * len(rows) / total)), block, rows)
            top -= height
        for path in paths:
            dated = {".svg": "Date", ".pdf": "CreationDate"}.get(path.suffix)
            figure.savefig(path, metadata={dated: None} if dated else None)
    return True


def _ranked(block: Block) -> list[Row]:
    """Methods that have a difference, the best one first."""
    rows = [row for row in block.rows if row.role == "method" and row.difference]
    return sorted(rows, key=lambda row: block.reading.gain(row.difference.mean if row.difference else 0), reverse=True)


def _draw_block(axis: Axes, block: Block, rows: Sequence[Row]) -> None:
    reading, factor = block.reading, block.reading.factor
    (baseline,) = (row for row in block.rows if row.role == "baseline")
    scores = _by_seed(baseline, block)
    teacher = next((row for row in block.rows if row.role == "teacher" and row.score), None)
    marks = [(0.0, "baseline")]
    if teacher and teacher.score and baseline.score:
        marks.append((factor * (teacher.score.mean - baseline.score.mean), "teacher"))
    for place, name in marks:
        axis.axvline(place, color=_FAINT, linewidth=0.8, linestyle=(0, (3, 2)))
        axis.text(place, -0.75, name, ha="center", color="#5c656d", fontsize=7)
    core = [place for place, _ in marks]
    for row in rows:
        core += [factor * (value - scores[seed]) for seed, value in _by_seed(row, block).items() if seed in scores]
    span = _REACH * (max(core) - min(core) or 1)
    for line, row in enumerate(rows):
        if row.difference is None:
            continue
        verdict, mean = row.difference.verdict, factor * row.difference.mean
        if row.difference.interval:
            ends = [factor * end for end in row.difference.interval]
            _whisker(axis, line, ends, (min(core) - span, max(core) + span), _COLOURS[verdict])
        seeds = [factor * (value - scores[seed]) for seed, value in _by_seed(row, block).items() if seed in scores]
        axis.plot(seeds, [line] * len(seeds), "o", markersize=3, color=_FAINT, zorder=3)
        axis.plot([mean], [line], "D", markersize=4.5, color=_COLOURS[verdict], zorder=4, **_filled(verdict))
    axis.set_yticks(range(len(rows)), [row.method for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.tick_params(left=False, labelcolor=INK)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    unit = f", {reading.points}" if reading.points else ""
    axis.set_xlabel(f"{METRIC_NAMES.get(block.metric, block.metric)} minus the baseline's{unit}; dots: seeds")
    axis.set_title(f"{block.student}\n{block.source}, {block.split} split", fontsize=9, loc="left", pad=16)
    _legend(axis)


def _filled(verdict: Verdict | None) -> dict[str, Any]:
    return {"label": _WORDS[verdict], "markerfacecolor": PAPER if verdict is None else _COLOURS[verdict]}


def _legend(axis: Axes) -> None:
    """Each verdict once, below the axis' title."""
    from matplotlib.transforms import ScaledTranslation

    entries = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    below = ScaledTranslation(0, -_LEGEND, axis.figure.dpi_scale_trans)
    axis.legend(
        list(entries.values()),
        list(entries),
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        bbox_transform=axis.transAxes + below,
        ncols=len(entries),
        frameon=False,
        fontsize=7,
    )


def _whisker(axis: Axes, line: int, ends: Sequence[float], limits: tuple[float, float], colour: str) -> None:
    low, high = max(ends[0], limits[0]), min(ends[1], limits[1])
    axis.plot([low, high], [line, line], "-", color=colour, linewidth=1.1, zorder=2)
    for end, known, arrow in ((low, ends[0], "<"), (high, ends[1], ">")):
        marker = "|" if math.isclose(end, known) else arrow
        axis.plot([end], [line], marker, color=colour, markersize=4.5, zorder=2)


def _by_seed(row: Row, block: Block) -> dict[int, float]:
    scores = {record["seed"]: score_of(record, block.split, block.metric) for record in row.records}
    return {seed: score for seed, score in scores.items() if score is not None}
