# SPDX-License-Identifier: Apache-2.0
"""The columns of a table for people: what was reached, and what it cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kdlvfm.reporting.block import OVER_IMAGES, Block, Row
from kdlvfm.reporting.cells import remarks_on_machines
from kdlvfm.reporting.reading import Reading
from kdlvfm.reporting.statistics import Difference

NOTHING = "–"
METRIC_NAMES = {"miou": "mIoU", "frechet_distance": "FD", "noise_error": "noise error", "class_shift": "class shift"}


class Column(NamedTuple):
    """A column: its head, the unit below it, and the text of a row."""

    title: str
    unit: str
    text: Callable[[Row], str]


def result_columns(block: Block) -> list[Column]:
    """What was reached, and in short what it cost; the costs give way to a second baseline, which needs their place."""
    reading, unit = block.reading, f"{block.reading.points} [95 % CI]".strip()
    columns = [*_names(block), Column("vs baseline", unit, lambda row: _difference(row.difference, reading))]
    longer = any(row.role == "equal_time" for row in block.rows)
    if longer:
        columns.append(Column("vs equal time", unit, lambda row: _difference(row.to_equal_time, reading)))
    columns.append(Column("gap", "% closed [95 % CI]", _gap))
    if any(row.difference and row.difference.verdict for row in block.rows):
        columns.append(Column("verdict", "", lambda row: (row.difference and row.difference.verdict) or NOTHING))
    if any(row.published for row in block.rows):
        columns.append(Column("paper", "%", _published))
    costs = [] if longer else [_PARAMETERS, _MACS, _TRAINING, _TEACHER]
    return [*columns, *costs, _SEEDS]


def cost_columns(block: Block) -> list[Column]:
    """The score, and all that is known of what it cost; columns that no row of the block fills are left out."""
    columns = [
        _PARAMETERS,
        _MACS,
        Column("latency", "ms, p50 / p95", _latency),
        Column("inference", "images/s", lambda row: _speed(row.inference_images_per_second)),
        Column("trained", "min", lambda row: _number(row.train_seconds, 1 / 60, ",.1f")),
        _TRAINING,
        Column("memory", "GiB", lambda row: _size(row.peak_memory_mib, 1024)),
        _TEACHER,
        Column("teacher saw", "1000 images", lambda row: _number(row.teacher_images, 1e-3, ",.1f")),
    ]
    filled = [column for column in columns if any(column.text(row) != NOTHING for row in block.rows)]
    return [*_names(block), *filled, _SEEDS]


def cost_remarks(block: Block) -> list[str]:
    """How the times of inference were measured, if they were, and whether they compare."""
    records = [record for row in block.rows for record in row.records if record["status"] == "finished"]
    runs = [record["inference"] for record in records if record.get("inference")]
    remarks = remarks_on_machines(records)
    if not runs:
        return remarks

    def each(field: str) -> str:
        return " or ".join(map(str, sorted({run[field] for run in runs})))

    sizes = " or ".join(sorted({"{}x{}".format(*run["input_size"]) for run in runs}))
    threads = f"{each('threads')} thread{'s' if {run['threads'] for run in runs} != {1} else ''}"
    least = min(run["repetitions"] for run in runs)
    return [
        *remarks,
        f"Inference: the student alone on {each('device')}, {threads}, {each('precision')}, images of {sizes} pixels "
        f"(height x width). Latency of one image, from {least} repetitions or more; images/s in batches of "
        f"{each('batch_size')}. All rows but the teacher's are of one network and differ by what else the machine did.",
    ]


def _names(block: Block) -> list[Column]:
    return [
        Column("method", "", lambda row: row.method),
        Column(
            METRIC_NAMES.get(block.metric, block.metric), block.reading.head, lambda row: _score(row, block.reading)
        ),
    ]


def _number(value: float | None, factor: float, form: str) -> str:
    return NOTHING if value is None else format(factor * value, form)


def _size(value: float | None, unit: float) -> str:
    if value is None:
        return NOTHING
    scaled = value / unit
    return f"{scaled:.2g}" if scaled < 0.1 else f"{scaled:.2f}" if scaled < 10 else f"{scaled:,.1f}"


def _speed(value: float | None) -> str:
    return _number(value, 1, ",.0f" if value is None or value >= 10 else ".1f")


def _score(row: Row, reading: Reading) -> str:
    if row.score is None:
        return NOTHING
    spread = "" if row.score.std is None else f" ± {reading.number(row.score.std)}"
    return f"{reading.number(row.score.mean)}{spread}"


def _difference(difference: Difference | None, reading: Reading) -> str:
    if difference is None:
        return NOTHING
    text = reading.number(difference.mean, "+")
    if difference.interval is None:
        return text
    low, high = difference.interval
    mark = OVER_IMAGES if difference.over == "images" else ""
    return f"{text} [{reading.number(low, '+')}, {reading.number(high, '+')}]{mark}"


def _gap(row: Row) -> str:
    text = _number(row.gap_closed, 100, ".0f")
    if row.gap_interval is None:
        return text
    low, high = row.gap_interval
    return f"{text} [{round(100 * low)}, {round(100 * high)}]"


def _published(row: Row) -> str:
    return NOTHING if row.published is None else f"{100 * row.published.value:.1f} [{row.published.source}]"


def _latency(row: Row) -> str:
    if row.latency_p50 is None:
        return NOTHING
    return f"{_size(row.latency_p50, 1e-3)} / {_size(row.latency_p95, 1e-3)}"


def runs_text(row: Row) -> str:
    """`3`, or `2, 1 failed` where not every run finished."""
    if not row.runs:
        return NOTHING
    others = [f"{count} {status}" for status, count in row.runs.items() if status != "finished"]
    return ", ".join([str(row.runs["finished"]), *others] if "finished" in row.runs else others)


_PARAMETERS = Column("params", "M", lambda row: _size(row.parameters, 1e6))
_MACS = Column("MACs", "G", lambda row: _size(row.macs, 1e9))
_TRAINING = Column("training", "images/s", lambda row: _number(row.images_per_second, 1, ",.0f"))
_TEACHER = Column("teacher", "% of step", lambda row: _number(row.teacher_share, 100, ".0f"))
_SEEDS = Column("seeds", "", runs_text)
