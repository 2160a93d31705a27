# SPDX-License-Identifier: Apache-2.0
"""A table for the terminal, for Markdown and for other programs, all three from the same `Table`."""

from __future__ import annotations

import csv
import io
import itertools
from typing import TYPE_CHECKING, Any

from kdlvfm.reporting.block import Block, Row, Table
from kdlvfm.reporting.columns import Column, cost_columns, cost_remarks, result_columns

if TYPE_CHECKING:
    from rich.console import Group

_VERDICT_STYLES = {"better": "green", "worse": "red", "not shown": "dim"}
_ROLE_STYLES = {"teacher": "cyan", "baseline": "bold", "equal_time": "bold", "method": ""}


def to_rich(table: Table, *, cost: bool = False) -> Group:
    """A renderable for `rich.print`: each block with its heading, its lines and its notes, at home in 120 columns.

    Args:
        table: what is shown.
        cost: the columns of cost in place of those of results.
    """
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
        columns, notes = _view(block, cost)
        for column in columns:
            header = Text.assemble((column.title, "bold"), "\n", (column.unit, "dim"))
            first = column is columns[0]
            grid.add_column(header, justify="left" if first else "right", no_wrap=not first, overflow="fold")
        for row, following in itertools.zip_longest(block.rows, block.rows[1:]):
            cells = [Text(column.text(row)) for column in columns]
            for column, cell in zip(columns, cells, strict=True):
                if column.title == "verdict":
                    cell.stylize(_VERDICT_STYLES.get(cell.plain, "dim"))
            last_of_role = following is not None and following.role == "method" != row.role
            grid.add_row(*cells, style=_ROLE_STYLES[row.role], end_section=last_of_role)
        parts.append(grid)
        parts += [Padding(Text(f"! {line}", "bold red"), (0, 0, 0, 1)) for line in block.warnings]
        parts += [Padding(Text(f"· {line}", "dim"), (0, 0, 0, 1)) for line in notes]
        parts.append(Text())
    return Group(*parts)


def to_markdown(table: Table, *, cost: bool = False) -> str:
    """The table in GitHub's Markdown, with a heading for each block and its warnings and notes as a list.

    Args:
        table: what is shown.
        cost: the columns of cost in place of those of results.
    """
    lines: list[str] = []
    for block in table.blocks:
        title, *details = heading(block)
        columns, notes = _view(block, cost)
        lines += [f"### {title}", "", *(f"{detail}  " for detail in details), ""]
        lines.append(_markdown_line([f"{column.title}<br>{column.unit}".removesuffix("<br>") for column in columns]))
        lines.append(_markdown_line([":---", *["---:"] * (len(columns) - 1)]))
        lines += [_markdown_line([column.text(row) for column in columns]) for row in block.rows]
        lines.append("")
        remarks = [f"- **{line}**" for line in block.warnings] + [f"- {line}" for line in notes]
        lines += [*remarks, ""] if remarks else []
    return "\n".join(lines)


def to_csv(table: Table) -> str:
    """One line for each row in full precision, the unit in the column's name; empty for a table without blocks."""
    rows = to_rows(table)
    if not rows:
        return ""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def to_rows(table: Table) -> list[dict[str, Any]]:
    """For each row a mapping from column to value, as in the CSV, for other programs."""
    return [_flat(block, row) for block in table.blocks for row in block.rows]


def heading(block: Block) -> list[str]:
    """The title of a block, then the lines below it."""
    lines = [f"{block.source}, {block.split} split", f"Student: {block.student}. Recipe: {block.recipe}."]
    if block.teacher is not None:
        weights = "RANDOM weights" if block.teacher["weights"] == "random" else f"{block.teacher['weights']} weights"
        licence = block.teacher["licence"] or "unknown"
        lines.append(f"Teacher (upper bound): {block.teacher['name']} ({weights}). Licence of its weights: {licence}.")
    return lines


def _view(block: Block, cost: bool) -> tuple[list[Column], list[str]]:
    """The columns shown, and the notes below them."""
    if cost:
        return cost_columns(block), cost_remarks(block)
    return result_columns(block), list(block.notes)


def _markdown_line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _flat(block: Block, row: Row) -> dict[str, Any]:
    teacher = block.teacher or {"name": None, "weights": None, "licence": None}
    interval = (row.difference and row.difference.interval) or (None, None)
    longer = row.to_equal_time
    longer_interval = (longer and longer.interval) or (None, None)
    runs = row.runs or {}
    return {
        "data": block.data,
        "split": block.split,
        "metric": block.metric,
        "less_is_better": block.reading.less_is_better,
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
        "difference_interval_over": row.difference and row.difference.interval and row.difference.over,
        "paired_seeds": row.difference and row.difference.count,
        "gap_closed_fraction": row.gap_closed,
        "gap_low_95_fraction": row.gap_interval and row.gap_interval[0],
        "gap_high_95_fraction": row.gap_interval and row.gap_interval[1],
        "p_value_holm": row.difference and row.difference.p_value,
        "verdict": row.difference and row.difference.verdict,
        "difference_to_equal_time_fraction": longer and longer.mean,
        "difference_to_equal_time_low_95_fraction": longer_interval[0],
        "difference_to_equal_time_high_95_fraction": longer_interval[1],
        "difference_to_equal_time_interval_over": longer and longer.interval and longer.over,
        "published_fraction": row.published and row.published.value,
        "parameters": row.parameters,
        "macs": row.macs,
        "latency_p50_seconds": row.latency_p50,
        "latency_p95_seconds": row.latency_p95,
        "inference_images_per_second": row.inference_images_per_second,
        "images_per_second": row.images_per_second,
        "train_seconds": row.train_seconds,
        "peak_memory_mib": row.peak_memory_mib,
        "teacher_share_fraction": row.teacher_share,
        "teacher_images": row.teacher_images,
        **{status: runs.get(status, 0) for status in ("finished", "running", "interrupted", "failed")},
    }
