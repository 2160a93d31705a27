# SPDX-License-Identifier: Apache-2.0
"""A table for the terminal, for Markdown and for other programs, all three from the same `Table`."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from kdlvfm.reporting.tables import Block, Row, Table

if TYPE_CHECKING:
    from rich.console import Group

_NOTHING = "–"
METRIC_NAMES = {"miou": "mIoU"}
_VERDICT_STYLES = {"better": "green", "worse": "red", "not shown": "dim"}
_ROLE_STYLES = {"teacher": "cyan", "baseline": "bold", "method": ""}


class _Column(NamedTuple):
    title: str
    unit: str
    text: Callable[[Row], str]


def to_rich(table: Table) -> Group:
    """A renderable for `rich.print`: each block with its heading, its lines and its notes, at home in 120 columns."""
    from rich import box
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table as Grid
    from rich.text import Text

    parts: list[Any] = []
    for block in table.blocks:
        title, *details = heading(block)
        parts += [Text(title, "bold"), *(Text(line, "dim") for line in details)]
        grid = Grid(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="none")
        columns = _columns(block)
        for column in columns:
            header = Text.assemble((column.title, "bold"), "\n", (column.unit, "dim"))
            first = column is columns[0]
            grid.add_column(header, justify="left" if first else "right", no_wrap=not first)
        for row, following in itertools.zip_longest(block.rows, block.rows[1:]):
            cells = [Text(column.text(row)) for column in columns]
            for column, cell in zip(columns, cells, strict=True):
                if column.title == "verdict":
                    cell.stylize(_VERDICT_STYLES.get(cell.plain, "dim"))
            last_of_role = following is not None and following.role == "method" != row.role
            grid.add_row(*cells, style=_ROLE_STYLES[row.role], end_section=last_of_role)
        parts.append(grid)
        parts += [Padding(Text(f"! {line}", "bold red"), (0, 0, 0, 1)) for line in block.warnings]
        parts += [Padding(Text(f"· {line}", "dim"), (0, 0, 0, 1)) for line in block.notes]
        parts.append(Text())
    return Group(*parts)


def to_markdown(table: Table) -> str:
    """The table in GitHub's Markdown, with a heading for each block and its warnings and notes as a list."""
    lines: list[str] = []
    for block in table.blocks:
        title, *details = heading(block)
        columns = _columns(block)
        lines += [f"### {title}", "", *(f"{detail}  " for detail in details), ""]
        lines.append(_markdown_line([f"{column.title}<br>{column.unit}".removesuffix("<br>") for column in columns]))
        lines.append(_markdown_line([":---", *["---:"] * (len(columns) - 1)]))
        lines += [_markdown_line([column.text(row) for column in columns]) for row in block.rows]
        lines.append("")
        remarks = [f"- **{line}**" for line in block.warnings] + [f"- {line}" for line in block.notes]
        lines += [*remarks, ""] if remarks else []
    return "\n".join(lines)


def to_csv(table: Table) -> str:
    """One line for each row in full precision, the unit in the column's name; empty for a table without blocks."""
    rows = [_flat(block, row) for block in table.blocks for row in block.rows]
    if not rows:
        return ""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def heading(block: Block) -> list[str]:
    """The title of a block, then the lines below it."""
    lines = [f"{block.data}, {block.split} split", f"Student: {block.student}. Recipe: {block.recipe}."]
    if block.teacher is not None:
        weights = "RANDOM weights" if block.teacher["weights"] == "random" else f"{block.teacher['weights']} weights"
        licence = block.teacher["licence"] or "unknown"
        lines.append(f"Teacher (upper bound): {block.teacher['name']} ({weights}). Licence of its weights: {licence}.")
    return lines


def _columns(block: Block) -> list[_Column]:
    columns = [
        _Column("method", "", lambda row: row.method),
        _Column(METRIC_NAMES.get(block.metric, block.metric), "%", _score),
        _Column("vs baseline", "points [95 % CI]", _difference),
        _Column("gap", "% closed [95 % CI]", _gap),
    ]
    if any(row.difference and row.difference.verdict for row in block.rows):
        columns.append(_Column("verdict", "", lambda row: (row.difference and row.difference.verdict) or _NOTHING))
    return [
        *columns,
        _Column("params", "M", lambda row: _size(row.parameters, 1e6)),
        _Column("MACs", "G", lambda row: _size(row.macs, 1e9)),
        _Column("training", "images/s", lambda row: _number(row.images_per_second, 1, ",.0f")),
        _Column("teacher", "% of step", lambda row: _number(row.teacher_share, 100, ".0f")),
        _Column("seeds", "", runs_text),
    ]


def _number(value: float | None, factor: float, form: str) -> str:
    return _NOTHING if value is None else format(factor * value, form)


def _size(value: int | None, unit: float) -> str:
    if value is None:
        return _NOTHING
    scaled = value / unit
    return f"{scaled:.2g}" if scaled < 0.1 else f"{scaled:.2f}" if scaled < 10 else f"{scaled:,.1f}"


def _score(row: Row) -> str:
    if row.score is None:
        return _NOTHING
    spread = "" if row.score.std is None else f" ± {100 * row.score.std:.1f}"
    return f"{100 * row.score.mean:.1f}{spread}"


def _difference(row: Row) -> str:
    if row.difference is None:
        return _NOTHING
    text = f"{100 * row.difference.mean:+.1f}"
    if row.difference.interval is None:
        return text
    low, high = row.difference.interval
    return f"{text} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _gap(row: Row) -> str:
    text = _number(row.gap_closed, 100, ".0f")
    if row.gap_interval is None:
        return text
    low, high = row.gap_interval
    return f"{text} [{round(100 * low)}, {round(100 * high)}]"


def runs_text(row: Row) -> str:
    """`3`, or `2, 1 failed` where not every run finished."""
    if not row.runs:
        return _NOTHING
    others = [f"{count} {status}" for status, count in row.runs.items() if status != "finished"]
    return ", ".join([str(row.runs["finished"]), *others] if "finished" in row.runs else others)


def _markdown_line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _flat(block: Block, row: Row) -> dict[str, Any]:
    teacher = block.teacher or {"name": None, "weights": None, "licence": None}
    interval = (row.difference and row.difference.interval) or (None, None)
    runs = row.runs or {}
    return {
        "data": block.data,
        "split": block.split,
        "metric": block.metric,
        "student": block.student,
        "recipe_hash": block.recipe,
        "teacher": teacher["name"],
        "teacher_weights": teacher["weights"],
        "teacher_licence": teacher["licence"],
        "role": row.role,
        "method": row.method,
        "mean_fraction": row.score and row.score.mean,
        "std_fraction": row.score and row.score.std,
        "difference_fraction": row.difference and row.difference.mean,
        "difference_low_95_fraction": interval[0],
        "difference_high_95_fraction": interval[1],
        "paired_seeds": row.difference and row.difference.count,
        "gap_closed_fraction": row.gap_closed,
        "gap_low_95_fraction": row.gap_interval and row.gap_interval[0],
        "gap_high_95_fraction": row.gap_interval and row.gap_interval[1],
        "p_value_holm": row.difference and row.difference.p_value,
        "verdict": row.difference and row.difference.verdict,
        "parameters": row.parameters,
        "macs": row.macs,
        "images_per_second": row.images_per_second,
        "train_seconds": row.train_seconds,
        "peak_memory_mib": row.peak_memory_mib,
        "teacher_share_fraction": row.teacher_share,
        **{status: runs.get(status, 0) for status in ("finished", "running", "interrupted", "failed")},
    }
