# SPDX-License-Identifier: Apache-2.0
"""A table for papers: methods as rows, pairs of teacher and student as columns, in LaTeX with booktabs."""

from __future__ import annotations

import re
from typing import NamedTuple

from kdlvfm.reporting.render import METRIC_NAMES
from kdlvfm.reporting.tables import Block, Row, Table

_NOTHING = "--"
_SIGNS = {"better": r"$^\uparrow$", "worse": r"$^\downarrow$"}
_REFERENCES = ("teacher", "baseline")
_ESCAPES = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
}


class _Column(NamedTuple):
    head: tuple[str, ...]
    cells: dict[str, str]


def to_latex(table: Table) -> str:
    r"""A `table` environment, which needs `\usepackage[T1]{fontenc}` and `\usepackage{booktabs}`; empty without blocks.

    A single block has columns for score, difference with interval and share of the gap. Several have a column each,
    with score and difference. The best method of a block is bold, arrows are verdicts, and what a reader must know
    stands below.
    """
    if not table.blocks:
        return ""
    single = len(table.blocks) == 1
    columns = _columns(table.blocks[0]) if single else [_column(block) for block in table.blocks]
    names = {row.method for block in table.blocks for row in block.rows}
    groups = [[name for name in _REFERENCES if name in names], sorted(names.difference(_REFERENCES))]
    depth = len(columns[0].head)
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_caption(table)}}}"]
    lines += [rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule"]
    for line in range(depth):
        lines.append(_line("method" if line == depth - 1 else "", *(escape(column.head[line]) for column in columns)))
    for group in filter(None, groups):
        lines.append(r"\midrule")
        lines += [_line(escape(name), *(column.cells.get(name, _NOTHING) for column in columns)) for name in group]
    lines += [r"\bottomrule", r"\end{tabular}"]
    for number, block in enumerate(table.blocks, start=1):
        where = "" if single else f"Column {number}: "
        remarks = [rf"\textbf{{{escape(where + text)}}}" for text in block.warnings]
        remarks += [escape(where + text) for text in block.notes]
        lines += [rf"\par\footnotesize {remark}" for remark in remarks]
    return "\n".join([*lines, r"\end{table}", ""])


def escape(text: str) -> str:
    """Text in which nothing is a command to LaTeX."""
    return re.sub("|".join(map(re.escape, _ESCAPES)), lambda found: _ESCAPES[found[0]], text)


def _caption(table: Table) -> str:
    places = dict.fromkeys(f"{block.data} ({block.split} split)" for block in table.blocks)
    text = rf"{escape(', '.join(places))}: mean $\pm$ standard deviation over the seeds, and the paired difference to "
    text += r"the baseline of the same recipe in points"
    if any(row.difference and row.difference.verdict in _SIGNS for block in table.blocks for row in block.rows):
        text += rf"; {_SIGNS['better']} better, {_SIGNS['worse']} worse than the baseline (paired t-test at 5\,\%)"
    if len(table.blocks) == 1:
        block = table.blocks[0]
        teacher = f", teacher {block.teacher['name']}" if block.teacher else ""
        text += f". Student {escape(block.student + teacher)}"
    return f"{text}."


def _columns(block: Block) -> list[_Column]:
    def column(*head: str, cells: dict[str, str]) -> _Column:
        return _Column(head, cells)

    return [
        column(_metric(block), "%", cells={row.method: _score(row, block) for row in block.rows}),
        column("vs baseline", "points [95 % CI]", cells={row.method: _difference(row) for row in block.rows}),
        column("gap closed", "% [95 % CI]", cells={row.method: _gap(row) for row in block.rows}),
    ]


def _column(block: Block) -> _Column:
    teacher = block.teacher["name"] if block.teacher else "no teacher"
    cells = {}
    for row in block.rows:
        cells[row.method] = _score(row, block)
        if row.role == "method" and row.difference:
            sign = _SIGNS.get(row.difference.verdict or "", "")
            cells[row.method] += f" ({_points(row.difference.mean)}){sign}"
    return _Column((f"{block.data}, {_metric(block)}", teacher, block.student.partition(" (")[0]), cells)


def _metric(block: Block) -> str:
    return METRIC_NAMES.get(block.metric, block.metric)


def _score(row: Row, block: Block) -> str:
    if row.score is None:
        return _NOTHING
    mean = f"{100 * row.score.mean:.1f}"
    reached = [other.score.mean for other in block.rows if other.role == "method" and other.score]
    if row.role == "method" and len(reached) > 1 and row.score.mean == max(reached):
        mean = rf"\textbf{{{mean}}}"
    return mean if row.score.std is None else rf"{mean} $\pm$ {100 * row.score.std:.1f}"


def _difference(row: Row) -> str:
    if row.difference is None:
        return _NOTHING
    text = _points(row.difference.mean)
    if row.difference.interval:
        text += " [{}, {}]".format(*map(_points, row.difference.interval))
    return text + _SIGNS.get(row.difference.verdict or "", "")


def _gap(row: Row) -> str:
    if row.gap_closed is None:
        return _NOTHING
    text = f"${round(100 * row.gap_closed)}$"
    if row.gap_interval:
        text += " [{}, {}]".format(*(f"${round(100 * border)}$" for border in row.gap_interval))
    return text


def _points(value: float) -> str:
    return f"${100 * value:+.1f}$"


def _line(*cells: str) -> str:
    return rf"{' & '.join(cells)} \\"
