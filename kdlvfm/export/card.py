# SPDX-License-Identifier: Apache-2.0
"""The model card of a student: what it is, where its weights come from, what it scores and how it is loaded."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdlvfm import __version__
from kdlvfm.export.graph import OPSET, Graph
from kdlvfm.export.weights import Network

_TASKS = {"segmentation": ("image-segmentation", "labels pixels"), "detection": ("object-detection", "detects objects")}
_ELSEWHERE = ("out=", "data.root=", "run.", "logger")
"""Overrides of a command that say where and how a run was computed, and nothing about its result."""

_RANDOM, _UNKNOWN = "none: random weights", "unknown"


@dataclass(frozen=True)
class Statistics:
    """What images in [0, 1] are normalised with, each channel by itself; R, G and B.

    Attributes:
        mean: is subtracted.
        std: is divided by.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Measured:
    """One row of the results.

    Attributes:
        title: what was measured.
        metrics: its scores by name, as a record has them; `None` if they were not measured.
        latency: its field `inference`, as a record has it; `None` if it was not timed.
        bytes: size of its file.
    """

    title: str
    metrics: Mapping[str, Any] | None
    latency: Mapping[str, Any] | None
    bytes: int


def model_card(
    record: Mapping[str, Any],
    networks: Sequence[Network],
    graphs: Mapping[str, Graph],
    statistics: Statistics,
    measured: Sequence[Measured],
    index: Mapping[str, Any],
    paper: str | None,
) -> str:
    """The text of `MODEL_CARD.md`: Markdown under a head of YAML as the Hugging Face Hub reads it.

    Args:
        record: of the run.
        networks: whose weights are beside the card.
        graphs: files of ONNX beside the card, by name.
        statistics: of the student.
        measured: results to show beside those of the record.
        index: the head's `model-index`.
        paper: of the method.
    """
    import yaml

    parts = [
        _introduction(record, paper),
        "## Results\n\n" + "\n\n".join(_results(record, measured)),
        "## Licences\n\n" + _licences(record),
        "## Use\n\n" + "\n\n".join([_input(statistics), *_loading(networks), *map(_running, graphs.items())]),
        "## Training\n\n" + _training(record),
    ]
    head = yaml.safe_dump(_head(record, networks, graphs, index), sort_keys=False, allow_unicode=True, width=10_000)
    return f"---\n{head}---\n\n" + "\n\n".join(parts) + "\n"


def licences(record: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Under whose terms a student was made: `student weights` before training, `teacher weights` and `data`.

    Where a teacher made the labels (`kdlvfm label`), `weights of the labels' teacher` too; of a run in two stages also
    the first stage's teacher and data.
    """
    labels, first = record["data"].get("labels"), record["config"].get("after")
    weights = {
        "student weights": record["student"],
        "teacher weights": record["teacher"],
        "weights of the labels' teacher": labels and labels["teacher"],
        "weights of the first stage's teacher": first and first["teacher"],
    }
    found = {
        what: {"name": part["name"], "licence": _RANDOM if part["weights"] == "random" else part["licence"] or _UNKNOWN}
        for what, part in weights.items()
        if part is not None
    }
    data = {"data": (record["data"]["name"], record["data"]["licence"])}
    if first:
        data["data of the first stage"] = first["data"], first["data_licence"]
    return {**found, **{what: {"name": name, "licence": terms or _UNKNOWN} for what, (name, terms) in data.items()}}


def _head(
    record: Mapping[str, Any], networks: Sequence[Network], graphs: Mapping[str, Graph], index: Mapping[str, Any]
) -> dict[str, Any]:
    weights = [part["licence"] for what, part in licences(record).items() if not what.startswith("data")]
    terms = set(weights) - {_RANDOM} or {_UNKNOWN}
    licence = {"license": "other", "license_name": "see-licences-in-this-card"}
    if len(terms) == 1 and all(re.fullmatch(r"[a-z0-9.-]+", term) for term in terms):
        licence = {"license": terms.pop()}
    kind = _TASKS[record["task"]["name"]][0]
    scores = [metric["type"] for entry in index["model-index"] for metric in entry["results"][0]["metrics"]]
    return {
        **licence,
        "library_name": networks[0].target.partition(".")[0].replace("_", "-"),
        "pipeline_tag": kind,
        "tags": ["knowledge-distillation", kind, *(["onnx"] if graphs else [])],
        "metrics": scores[:1],
        **index,
    }


def _introduction(record: Mapping[str, Any], paper: str | None) -> str:
    student, data, classes = record["student"], record["data"], record["data"]["classes"]
    teacher, first = record["teacher"], record["config"].get("after")
    if teacher or first:
        method = record["distiller"]["name"] + (f" ({paper})" if paper else "")
        names = " and ".join(dict.fromkeys(card["name"] for card in (first and first["teacher"], teacher) if card))
        origin = f"It was distilled from {names} with {method}"
    else:
        origin = "It was trained without a teacher"
    cost = f"It has {student['parameters'] / 1e6:.2f} M parameters"
    if student["macs"] is not None:
        size = "x".join(map(str, student["input_size"]))
        cost += f", and an image of {size} pixels takes {student['macs'] / 1e9:.2f} G multiply-accumulates"
    return (
        f"# {student['name']}, {record['name']}\n\n"
        f"A small network that {_TASKS[record['task']['name']][1]} of {len(classes)} classes: {', '.join(classes)}. "
        f"{origin}, on {data['name']}, by kdlvfm {__version__}. {cost}."
    )


def _results(record: Mapping[str, Any], measured: Sequence[Measured]) -> Iterator[str]:
    """Tables: the scores in the record, and what was measured of the files."""
    splits = record["metrics"]
    names = dict.fromkeys(name for scores in splits.values() for name in _plain(scores))
    rows = [[split, *(_percent(_plain(scores).get(name)) for name in names)] for split, scores in splits.items()]
    yield "In percent, as the run measured them:"
    yield _table(["split", *names], rows)
    if measured:
        yield "The files, on one image at a time:" if measured[0].latency else "The files:"
        yield _table(*as_cells(measured, record["task"]["primary_metric"]))


def as_cells(measured: Iterable[Measured], metric: str) -> tuple[list[str], list[list[str]]]:
    """Titles of columns, and rows of cells: what was measured, a metric, latency and size."""
    titles, rows = ["", f"{metric}, %", "p50, ms", "p95, ms", "MB"], []
    for row in measured:
        latency = row.latency or {"latency_p50": None, "latency_p95": None}
        times = ("–" if x is None else f"{1000 * x:.1f}" for x in (latency["latency_p50"], latency["latency_p95"]))
        score = None if row.metrics is None else row.metrics.get(metric)
        rows.append([row.title, _percent(score), *times, f"{row.bytes / 1e6:.1f}"])
    return titles, rows


def _licences(record: Mapping[str, Any]) -> str:
    rows = [[what, part["name"], part["licence"]] for what, part in licences(record).items()]
    return (
        "The student was made from the work of others, whose terms may bind whoever uses it or passes it on. Its own "
        "weights are those before training:\n\n" + _table(["of", "name", "licence"], rows)
    )


def _input(statistics: Statistics) -> str:
    mean, std = (", ".join(f"{x:.4g}" for x in values) for values in (statistics.mean, statistics.std))
    return (
        "Images are RGB, float in [0, 1]. The ONNX files and kdlvfm's models normalise them; for other libraries "
        f"subtract the mean ({mean}) and divide by the standard deviation ({std})."
    )


def _loading(networks: Iterable[Network]) -> Iterator[str]:
    for network in networks:
        yield f"`{network.file}`, {network.about}:\n\n```python\n" + "\n".join(network.lines()) + "\n```"


def _running(item: tuple[str, Graph]) -> str:
    name, graph = item
    outputs = "; ".join(f"`{key}` ({', '.join(map(str, shape))})" for key, shape in graph.outputs.items())
    return (
        f"`{name}`, opset {OPSET}, from `images` (batch, 3, height, width) of any size to {outputs}; "
        f"{graph.about}:\n\n```python\nimport onnxruntime\n"
        f'session = onnxruntime.InferenceSession("{name}", providers=["CPUExecutionProvider"])\n'
        f'{", ".join(graph.outputs)}{"," * (len(graph.outputs) == 1)} = session.run(None, {{"images": images}})\n```'
    )


def _training(record: Mapping[str, Any]) -> str:
    command = [word for word in record["command"] if not word.startswith(_ELSEWHERE)]
    counts = ", ".join(f"{count} {split}" for split, count in record["data"]["counts"].items())
    settings = {key: value for key, value in record["distiller"]["settings"].items() if value is not None}
    lines = [
        f"- {record['steps']} steps of {record['batch_size']} images, seed {record['seed']}; weights of the "
        + ("last step" if record["selection"] == "last" else "best validation"),
        f"- {record['data']['name']}: {counts}",
        f"- distiller {record['distiller']['name']} {json.dumps(settings) if settings else ''}".rstrip(),
        f"- configuration {record['config_hash']}, kdlvfm {record['versions']['kdlvfm']}, torch "
        f"{record['versions']['torch']}",
    ]
    return "\n".join(lines) + f"\n\n```bash\n{shlex.join(command)}\n```"


def _plain(scores: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in scores.items() if isinstance(value, float)}


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
