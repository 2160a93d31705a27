# SPDX-License-Identifier: Apache-2.0
"""A table for papers: methods as rows, pairs of teacher and student as columns, in LaTeX with booktabs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kdlvfm.reporting.block import OVER_IMAGES, Block, Row, Table
from kdlvfm.reporting.columns import METRIC_NAMES, NOTHING, cost_columns, cost_remarks
from kdlvfm.reporting.published import Published
from kdlvfm.reporting.reading import Reading
from kdlvfm.reporting.statistics import Difference

_NOTHING = "--"
_REFERENCES = ("teacher", "baseline", "equal_time")
_SIGNS = {"better": r"$^\uparrow$", "worse": r"$^\downarrow$"}
_ESCAPES = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    OVER_IMAGES: r"\dag{}",
}


class _Column(NamedTuple):
    head: tuple[str, ...]
    cells: dict[str, str]


def to_latex(table: Table, *, cost: bool = False) -> str:
    r"""A `table` environment, which needs `\usepackage[T1]{fontenc}` and `\usepackage{booktabs}`; empty without blocks.

    A single block has columns for score, differences with interval, share of the gap and published figures. Several
    have a column each, with score and difference, whose teacher and student are named below. The best method of a block
    is bold, arrows are verdicts, and what a reader must know stands below.

    Args:
        table: what is shown.
        cost: what was spent in place of what was reached; then each block is an environment of its own.
    """
    if cost:
        each = ((block, _remarks(block.warnings, cost_remarks(block))) for block in table.blocks)
        return "\n".join(
            _environment([block], _cost_columns(block), _cost_caption(block), remarks) for block, remarks in each
        )
    if not table.blocks:
        return ""
    if len(table.blocks) == 1:
        block = table.blocks[0]
        return _environment([block], _columns(block), _caption(table), _remarks(block.warnings, block.notes))
    remarks = []
    for number, block in enumerate(table.blocks, start=1):
        remarks += _remarks(block.warnings, [_pair(block), *block.notes], f"Column {number}: ")
    columns = [_column(number, block) for number, block in enumerate(table.blocks, start=1)]
    return _environment(table.blocks, columns, _caption(table), remarks)


def _environment(blocks: Sequence[Block], columns: Sequence[_Column], caption: str, remarks: Sequence[str]) -> str:
    rows = [row for block in blocks for row in block.rows]
    references = [row.method for role in _REFERENCES for row in rows if row.role == role]
    groups = [list(dict.fromkeys(references)), sorted({row.method for row in rows}.difference(references))]
    depth = len(columns[0].head)
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{caption}}}"]
    lines += [rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule"]
    for line in range(depth):
        lines.append(_line("method" if line == depth - 1 else "", *(escape(column.head[line]) for column in columns)))
    for group in filter(None, groups):
        lines.append(r"\midrule")
        lines += [_line(escape(name), *(column.cells.get(name, _NOTHING) for column in columns)) for name in group]
    lines += [r"\bottomrule", r"\end{tabular}", *(rf"\par\footnotesize {remark}" for remark in remarks)]
    return "\n".join([*lines, r"\end{table}", ""])


def _remarks(warnings: Sequence[str], notes: Sequence[str], where: str = "") -> list[str]:
    bold = [rf"\textbf{{{escape(where + text)}}}" for text in warnings]
    return bold + [escape(where + text) for text in notes]


def escape(text: str) -> str:
    """Text in which nothing is a command to LaTeX."""
    return re.sub("|".join(map(re.escape, _ESCAPES)), lambda found: _ESCAPES[found[0]], text)


def _caption(table: Table) -> str:
    places = dict.fromkeys(f"{block.source} ({block.split} split)" for block in table.blocks)
    text = rf"{escape(', '.join(places))}: mean $\pm$ standard deviation over the seeds, and the paired difference to "
    text += "the baseline of the same recipe"
    text += "".join(f" in {points}" for points in sorted({b.reading.points for b in table.blocks}) if points)
    if any(row.difference and row.difference.verdict in _SIGNS for block in table.blocks for row in block.rows):
        text += rf"; {_SIGNS['better']} better, {_SIGNS['worse']} worse than the baseline (paired t-test at 5\,\%)"
    if len(table.blocks) == 1:
        block = table.blocks[0]
        teacher = f", teacher {block.teacher['name']}" if block.teacher else ""
        text += f". Student {escape(block.student + teacher)}"
    return f"{text}."


def _cost_caption(block: Block) -> str:
    place = escape(f"{block.source} ({block.split} split)")
    return rf"{place}: what networks and training cost. Student {escape(block.student)}."


def _columns(block: Block) -> list[_Column]:
    def column(title: str, unit: str, text: Callable[[Row], str]) -> _Column:
        return _Column((title, unit), {row.method: text(row) for row in block.rows})

    reading = block.reading
    points = f"{reading.points} [95 % CI]".strip()
    columns = [
        column(_metric(block), reading.head, lambda row: _score(row, block)),
        column("vs baseline", points, lambda row: _difference(row.difference, reading)),
    ]
    if any(row.role == "equal_time" for row in block.rows):
        columns.append(column("vs equal time", points, lambda row: _difference(row.to_equal_time, reading)))
    columns.append(column("gap closed", "% [95 % CI]", _gap))
    if any(row.published for row in block.rows):
        columns.append(column("paper", "%", lambda row: _published(row.published)))
    return columns


def _cost_columns(block: Block) -> list[_Column]:
    _, score, *others = cost_columns(block)
    columns = [_Column((score.title, score.unit), {row.method: _score(row, block) for row in block.rows})]
    for column in others:
        cells = {row.method: escape(column.text(row)).replace(NOTHING, _NOTHING) for row in block.rows}
        columns.append(_Column((column.title, column.unit), cells))
    return columns


def _pair(block: Block) -> str:
    teacher = f"teacher {block.teacher['name']}" if block.teacher else "no teacher"
    return f"{teacher}, student {block.student}."


def _column(number: int, block: Block) -> _Column:
    cells = {}
    for row in block.rows:
        cells[row.method] = _score(row, block)
        if row.role == "method" and row.difference:
            sign = _SIGNS.get(row.difference.verdict or "", "")
            cells[row.method] += f" ({_points(row.difference.mean, block.reading)}){sign}"
        if row.published:
            cells[row.method] += f", paper {_published(row.published)}"
    return _Column((f"({number}) {block.data}", f"{_metric(block)}, {block.reading.head}".removesuffix(", ")), cells)


def _metric(block: Block) -> str:
    return METRIC_NAMES.get(block.metric, block.metric)


def _score(row: Row, block: Block) -> str:
    if row.score is None:
        return _NOTHING
    reading = block.reading
    mean = reading.number(row.score.mean)
    reached = [reading.gain(other.score.mean) for other in block.rows if other.role == "method" and other.score]
    if row.role == "method" and len(reached) > 1 and reading.gain(row.score.mean) == max(reached):
        mean = rf"\textbf{{{mean}}}"
    return mean if row.score.std is None else rf"{mean} $\pm$ {reading.number(row.score.std)}"


def _difference(difference: Difference | None, reading: Reading) -> str:
    if difference is None:
        return _NOTHING
    text = _points(difference.mean, reading)
    if difference.interval:
        text += " [{}, {}]".format(*(_points(border, reading) for border in difference.interval))
        text += escape(OVER_IMAGES) if difference.over == "images" else ""
    return text + _SIGNS.get(difference.verdict or "", "")


def _published(found: Published | None) -> str:
    return _NOTHING if found is None else f"{100 * found.value:.1f} [{found.source}]"


def _gap(row: Row) -> str:
    if row.gap_closed is None:
        return _NOTHING
    text = f"${round(100 * row.gap_closed)}$"
    if row.gap_interval:
        text += " [{}, {}]".format(*(f"${round(100 * border)}$" for border in row.gap_interval))
    return text


def _points(value: float, reading: Reading) -> str:
    return f"${reading.number(value, '+')}$"


def _line(*cells: str) -> str:
    return rf"{' & '.join(cells)} \\"
