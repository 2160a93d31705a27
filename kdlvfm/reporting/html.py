# SPDX-License-Identifier: Apache-2.0
"""A report as one HTML file: tables, figures and the runs behind every row, without anything from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

from kdlvfm import __version__
from kdlvfm.reporting.block import Block, Row, Table
from kdlvfm.reporting.columns import METRIC_NAMES, cost_remarks, runs_text
from kdlvfm.reporting.record import Record, flatten, now
from kdlvfm.reporting.render import heading

_SCRIPTS = ("elements.js", "columns.js", "charts.js", "figures.js", "lines.js", "runs.js", "page.js")
_LEVELS = 4  # of folders between a run and the root of the runs, where sweeps keep the output of their cells
_CLASS_METRICS = {"iou": "IoU", "AP": "AP"}
_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="kdlvfm {version}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="lead">{lead}</p>
<noscript><p class="warning">This page needs JavaScript; <code>kdlvfm table</code> prints the same table.</p></noscript>
</header>
<div id="tools" role="search"></div>
<main id="content"></main>
<footer><p>Made from run records by kdlvfm {version}, {time}. One file, which loads nothing.</p>{problems}</footer>
<script id="data" type="application/json">{data}</script>
<script>{script}</script>
</body>
</html>
"""


@dataclass(frozen=True)
class Picture:
    """Predictions of a block's runs: a PNG file's bytes, or `None`, and the sentence below it or in its place."""

    png: bytes | None
    note: str


def to_html(
    table: Table,
    records: Mapping[Path, Record],
    folder: Path,
    *,
    title: str | None = None,
    pictures: Sequence[Picture] = (),
    problems: Sequence[str] = (),
) -> str:
    """The page.

    Whatever a record holds reaches the page as JSON that cannot end its element, is shown as text, and could not be
    executed if it were not: the page's policy allows its own script, by checksum, and nothing else.

    Args:
        table: of `records`.
        records: by file, as `collect` finds them.
        folder: where the page will lie; its links to records and logs are relative to it.
        title: of the page; default: the data.
        pictures: one for each block, or none at all.
        problems: records that were not used, and why.

    Raises:
        ValueError: there are pictures, but not one for each block.
    """
    if pictures and len(pictures) != len(table.blocks):
        raise ValueError(f"{len(pictures)} pictures do not fit {len(table.blocks)} blocks.")
    absent = Picture(None, "No predictions were drawn.")
    data = {
        "blocks": [_block(block, pictures[index] if pictures else absent) for index, block in enumerate(table.blocks)],
        "runs": {
            record["config_hash"]: {
                "record": record,
                "file": _link(file, folder),
                "logs": [_link(log, folder) for log in _logs(file, record["config_hash"])],
            }
            for file, record in records.items()
        },
    }
    style, script = _part("style.css"), "\n".join(map(_part, _SCRIPTS))
    policy = f"default-src 'none'; img-src data:; style-src '{_checksum(style)}'; script-src '{_checksum(script)}'"
    names = sorted({block.data for block in table.blocks})
    skipped = "".join(f"<li>{html.escape(line)}</li>" for line in problems)
    return _PAGE.format(
        policy=policy,
        title=html.escape(title or f"Distillation on {', '.join(names) or 'nothing'}"),
        version=html.escape(__version__),
        lead=html.escape(_lead(table, records)),
        style=style,
        script=script,
        time=now(),
        problems=f"<p>Not used:</p><ul>{skipped}</ul>" if skipped else "",
        data=_embedded(data),
    )


def _lead(table: Table, records: Mapping[Path, Record]) -> str:
    methods = sum(row.role == "method" for block in table.blocks for row in block.rows)
    finished = sum(record["status"] == "finished" for record in records.values())
    parts = [f"{_counted(methods, 'method')} in {_counted(len(table.blocks), 'comparison')}"]
    parts.append(f"{_counted(len(records), 'run')}, {finished} finished")
    if revisions := {record["git"]["revision"][:9] for record in records.values() if record["git"]}:
        parts.append(f"git {', '.join(sorted(revisions)[:3])}{' …' if len(revisions) > 3 else ''}")
    return " · ".join(parts)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _block(block: Block, picture: Picture) -> dict[str, Any]:
    title, *details = heading(block)
    baseline = next((row for row in block.rows if row.role == "baseline"), None)
    references = 1 - sum(row.role != "method" for row in block.rows)  # methods count from 1; 0 has the neutral colour
    group = next((name for row in block.rows for _, name in _by_class(row, block)), None)
    classes: list[str] = next((record["data"]["classes"] for row in block.rows for record in row.records), [])
    return {
        "title": title,
        "details": details,
        "data": block.data,
        "split": block.split,
        "metric": METRIC_NAMES.get(block.metric, block.metric),
        "metric_key": block.metric,
        "class_metric": _CLASS_METRICS.get(group or "", group),
        "classes": classes,
        "student": block.student,
        "network": block.student.partition(" (")[0],
        "teacher": block.teacher and block.teacher["name"],
        "teacher_card": block.teacher,
        "warnings": block.warnings,
        "notes": [*block.notes, *(note for note in cost_remarks(block) if note not in block.notes)],
        "picture": picture.png and f"data:image/png;base64,{base64.b64encode(picture.png).decode()}",
        "picture_note": picture.note,
        "rows": [
            _row(row, max(0, index), baseline, block, classes) for index, row in enumerate(block.rows, references)
        ],
    }


def _row(row: Row, index: int, baseline: Row | None, block: Block, classes: Sequence[str]) -> dict[str, Any]:
    settings = {key: value for record in row.records for key, value in flatten(record["distiller"]["settings"]).items()}
    revisions = {record["git"]["revision"] for record in row.records if record["git"]}
    words = [
        row.method,
        row.role,
        *(f"{key}={value}" for key, value in settings.items()),
        *revisions,
        *(row.runs or ()),
    ]
    return {
        "role": row.role,
        "method": row.method,
        "index": index,
        "score": row.score and row.score.mean,
        "std": row.score and row.score.std,
        "difference": row.difference and row.difference.mean,
        "interval": row.difference and row.difference.interval,
        "over": row.difference and row.difference.over,
        "p_value": row.difference and row.difference.p_value,
        "verdict": row.difference and row.difference.verdict,
        "longer": row.to_equal_time and asdict(row.to_equal_time),
        "published": row.published and row.published._asdict(),
        "gap": row.gap_closed,
        "gap_interval": row.gap_interval,
        "parameters": row.parameters,
        "macs": row.macs,
        "latency_p50": row.latency_p50,
        "latency_p95": row.latency_p95,
        "inference_images_per_second": row.inference_images_per_second,
        "images_per_second": row.images_per_second,
        "train_seconds": row.train_seconds,
        "peak_memory_mib": row.peak_memory_mib,
        "teacher_share": row.teacher_share,
        "finished": (row.runs or {}).get("finished", 0),
        "seeds": runs_text(row),
        "by_class": _class_cells(row, baseline, block, classes),
        "runs": [record["config_hash"] for record in row.records],
        "search": " ".join(words),
    }


def _by_class(row: Row, block: Block) -> Iterator[tuple[dict[int, dict[str, float | None]], str]]:
    """Results by class of a row, seed -> class -> fraction, with the name of the metric, if there are any."""
    if row.role == "teacher":
        metrics = {0: ((block.teacher or {}).get("metrics") or {}).get(block.split, {})}
    else:
        metrics = {record["seed"]: record["metrics"].get(block.split, {}) for record in row.records}
    for name in _CLASS_METRICS:
        if found := {seed: values[name] for seed, values in metrics.items() if name in values}:
            yield found, name


def _class_cells(
    row: Row, baseline: Row | None, block: Block, classes: Sequence[str]
) -> dict[str, dict[str, float | None]] | None:
    """For each class the mean over the seeds, and over those of the baseline too the mean difference to it."""
    own, _ = next(_by_class(row, block), ({}, None))
    other, _ = next(_by_class(baseline, block), ({}, None)) if baseline else ({}, None)
    if not own:
        return None

    def difference(name: str) -> float | None:
        if row.role == "teacher":  # one network for every seed of the baseline
            pairs = [(own[0].get(name), values.get(name)) for values in other.values()]
        else:
            pairs = [(own[seed].get(name), other[seed].get(name)) for seed in own.keys() & other.keys()]
        return _mean([a - b for a, b in pairs if a is not None and b is not None])

    return {
        name: {
            "value": _mean([x for values in own.values() if (x := values.get(name)) is not None]),
            "difference": None if row.role == "baseline" else difference(name),
        }
        for name in classes
    }


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _logs(record: Path, digest: str) -> list[Path]:
    """What a run wrote while it went on: the loggers' files in its folder, its output beside it or at its sweep."""
    run = record.parent
    files = [*sorted(run.glob("log/**/metrics.csv")), run.with_name(f"{run.name}.log"), run / "error.txt"]
    for parent in list(run.parents)[:_LEVELS]:
        files += sorted(parent.glob(f"sweeps/*/{digest}.log"))
    return [file for file in files if file.is_file()]


def _link(file: Path, folder: Path) -> dict[str, str]:
    path = Path(os.path.relpath(file, folder)).as_posix()
    # A name with a colon must not look like a scheme.
    return {"name": path, "href": f"./{quote(path)}"}


def _part(name: str) -> str:
    return resources.files("kdlvfm.reporting").joinpath("page").joinpath(name).read_text(encoding="utf-8")


def _checksum(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _embedded(data: Mapping[str, Any]) -> str:
    """JSON without the characters that mean anything to a parser of HTML."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
