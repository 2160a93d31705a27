# SPDX-License-Identifier: Apache-2.0
"""The files of an export, from a run: weights, graphs, what was measured of them, and the card."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kdlvfm import __version__
from kdlvfm.cli.build import build_data
from kdlvfm.cli.list import papers_of
from kdlvfm.cli.loading import networks_of, statistics_of
from kdlvfm.cli.runs import WEIGHTS, load_student
from kdlvfm.cli.targets import check_targets, instantiate
from kdlvfm.core import FeatureModel, Task
from kdlvfm.data.base import SampleData
from kdlvfm.export.card import Measured, licences, model_card
from kdlvfm.export.folder import write_manifest
from kdlvfm.export.graph import OPSET, Graph, graph_of, write_onnx
from kdlvfm.export.parity import TOLERANCE, check_parity
from kdlvfm.export.quantise import quantise
from kdlvfm.export.session import open_graph
from kdlvfm.export.weights import as_text, write_weights
from kdlvfm.reporting.cost import measure_inference
from kdlvfm.reporting.model_index import to_model_index
from kdlvfm.reporting.record import Record
from kdlvfm.reporting.tables import summarise
from kdlvfm.training.fit import evaluate

CARD = "MODEL_CARD.md"
LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
_ONNX, _INT8 = "student.onnx", "student.int8.onnx"


@dataclass(frozen=True)
class Wanted:
    """What an export is to hold.

    Attributes:
        onnx: a graph, too.
        nms: in the graph of a detector.
        calibration: training images for INT8; `None` for no INT8, and no scores.
        data_root: where the data of the run lies here; `None` where it lay then.
        size: height and width of the images timed; `None` for no timing.
        seconds: to time each file.
    """

    onnx: bool
    nms: bool
    calibration: int | None
    data_root: str | None
    size: tuple[int, int] | None
    seconds: float


def write_export(run: Path, record: Record, request: Mapping[str, Any], wanted: Wanted, folder: Path) -> None:
    """Write all files of an export into an empty folder.

    Args:
        run: folder of the run.
        record: of the run.
        request: what identifies the export, for its list of files.
        wanted: what to write.
        folder: where.

    Raises:
        CommandError: the data or the weights of the run cannot be used.
        ExportError: the student cannot be exported, or its graph does not compute what it does.
    """
    classes = record["data"]["classes"]
    config = {part: dict(record["config"][part]) for part in ("data", "task")}
    check_targets(config, run / "record.json")
    data = None if wanted.calibration is None else _data(config, record, wanted.data_root)
    task: Task = instantiate(config["task"], num_classes=len(classes), class_names=classes)
    student = load_student(run, record)
    graph = graph_of(student, wanted.nms) if wanted.onnx else None
    statistics = statistics_of(student)
    stated = {
        "kdlvfm": __version__,
        "run": record["name"],
        "record_sha256": request["record"],
        "task": record["task"]["name"],
        "classes": classes,
        **asdict(statistics),
        "licences": licences(record),
    }
    networks = [*networks_of(student, record["config"]["student"], len(classes))]
    for network in networks:
        write_weights(network, folder, stated)
        print(f"weights    {network.file}, {network.about}", flush=True)
    content: dict[str, Any] = {"request": dict(request), "metadata": stated, "onnx": None, "measured": None}
    measured: list[Measured] = []
    if graph is not None:
        print("onnx       tracing and writing; this takes a minute or so", flush=True)
        write_onnx(graph, folder / _ONNX, as_text(stated))
        content["onnx"] = _parity(graph, folder / _ONNX, record)
        if data is not None and wanted.calibration is not None:
            _quantise(data, folder, wanted.calibration)
        if data is not None or wanted.size is not None:
            measured = [*_measure(student, graph, task, data, folder, wanted)]
            content["measured"] = {
                "split": None if data is None else _split(data),
                "metric": task.primary_metric,
                "versions": {library: importlib.metadata.version(library) for library in ("torch", *LIBRARIES)},
                "rows": [asdict(row) for row in measured],
            }
    graphs = {} if graph is None else {name: graph for name in (_ONNX, _INT8) if (folder / name).exists()}
    paper = papers_of(record["distiller"]["name"]) or None
    card = model_card(record, networks, graphs, statistics, measured, _index(record), paper)
    (folder / CARD).write_text(card, encoding="utf-8")
    write_manifest(folder, content)


def _data(config: dict[str, Any], record: Record, root: str | None) -> SampleData:
    if root is not None:
        config["data"]["root"] = root
    data = build_data(config)
    if data.split_hash() != record["data"]["split_hash"]:
        print("note       this data is not what the run saw (its split hash differs).")
    return data


def _split(data: SampleData) -> str:
    return "test" if "test" in data.splits else data.splits[-1]


def _parity(graph: Graph, path: Path, record: Record) -> dict[str, Any]:
    """Compare the file with the student: at the size of evaluation and at smaller ones, with odd sides."""
    height, width = record["student"]["input_size"]
    shapes = [(1, height, width), (2, height // 2 + 1, width // 2 + 3), (3, width // 2, height // 2 + 7)]
    checks = check_parity(graph, open_graph(path, graph), shapes)
    worst = max(check.error for check in checks)
    boxes = "" if checks[0].detections is None else f"; {sum(check.detections or 0 for check in checks)} boxes compared"
    sizes = ", ".join(f"{check.height}x{check.width}" for check in checks)
    print(f"onnx       opset {OPSET}, as torch within {worst:.1e} at {sizes}{boxes}", flush=True)
    parity = {"tolerance": TOLERANCE, "checks": [asdict(check) for check in checks]}
    return {"opset": OPSET, "outputs": {name: list(shape) for name, shape in graph.outputs.items()}, "parity": parity}


def _quantise(data: SampleData, folder: Path, most: int) -> None:
    """Write the INT8 file, calibrated on images that are spread evenly over those of training."""
    samples: Any = data.evaluation_set("train")
    count = min(most, len(samples))

    def images() -> Iterator[Tensor]:
        for i in range(count):
            yield data.collate([samples[i * len(samples) // count]])["image"]

    quantise(folder / _ONNX, folder / _INT8, images())
    print(f"int8       calibrated on {count} training images", flush=True)


def _measure(
    student: FeatureModel, graph: Graph, task: Task, data: SampleData | None, folder: Path, wanted: Wanted
) -> Iterator[Measured]:
    """Scores, where there is data, and latency of the student in torch and of each file."""
    models: dict[str, tuple[str, FeatureModel, Callable[[Tensor], Any]]] = {WEIGHTS: ("torch fp32", student, graph)}
    for name, title in {_ONNX: "onnxruntime fp32", _INT8: "onnxruntime int8"}.items():
        if (folder / name).exists():
            opened = open_graph(folder / name, graph)
            models[name] = title, opened, opened.everything
    for name, (title, model, forward) in models.items():
        metrics = latency = None
        if data is not None:
            metrics = evaluate(model, data.evaluation_loader(_split(data)), task)
        if wanted.size is not None:
            latency = measure_inference(model, wanted.size, forward=forward, seconds=wanted.seconds)
            latency["precision"] = "int8" if name == _INT8 else "float32"
        yield Measured(title, metrics, latency, (folder / name).stat().st_size)


def _index(record: Record) -> dict[str, Any]:
    """The `model-index` of a card."""
    import yaml

    split = "test" if "test" in record["metrics"] else next(iter(record["metrics"]))
    index: dict[str, Any] = yaml.safe_load(to_model_index(summarise([record], split), {}))
    return index
