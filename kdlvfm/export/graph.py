# SPDX-License-Identifier: Apache-2.0
"""From a student to a file of ONNX: images in, what the student says of them out, for any number and size of images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from kdlvfm.core.detector import DenseDetector, Detector
from kdlvfm.core.features import FeatureModel
from kdlvfm.export.pooling import ExportablePooling
from kdlvfm.export.suppression import select, translations

OPSET = 18
"""Version of ONNX' operators: the first whose Resize is antialiased as torch's is, and the one torch's exporter has."""

IMAGES = "images"


class ExportError(ValueError):
    """A student that cannot be exported, or whose graph does not compute what the student does."""


class Graph(nn.Module, ABC):
    """What is exported of a student: a function of images (B, 3, H, W), RGB in [0, 1], alone.

    Attributes:
        student: the student, in evaluation mode.
        outputs: of the graph, each with its shape: whole numbers, and names of sizes that depend on the images.
        about: what they are, for people.
    """

    outputs: Mapping[str, tuple[int | str, ...]]
    about: str

    def __init__(self, student: FeatureModel) -> None:
        super().__init__()
        self.student = student
        self.eval()

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The outputs, in their order."""


class LogitsGraph(Graph):
    """A segmenter: `logits` (B, K, H, W)."""

    about = "the largest logit of a pixel is its class"

    def __init__(self, student: FeatureModel) -> None:
        super().__init__(student)
        self.outputs = {"logits": ("batch", student.tap_info("logits").dim, "height", "width")}

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """See `Graph`."""
        return (self.student(images, ("logits",))["logits"],)


class CandidatesGraph(Graph):
    """A detector without NMS: `boxes` (B, N, 4) in pixels of the image given, and `scores` (B, N, K) in [0, 1]."""

    about = "boxes are corners x1, y1, x2, y2 in pixels; NMS is left to do"

    def __init__(self, student: DenseDetector) -> None:
        assert isinstance(student, FeatureModel)
        super().__init__(student)
        self.decode = student.box_decoder()
        self.num_classes = student.num_classes
        self.taps = student.task_taps
        self.outputs = {
            "boxes": ("batch", "candidates", 4),
            "scores": ("batch", "candidates", self.num_classes),
        }

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """See `Graph`."""
        found = self.decode(self.student(images, self.taps), (images.shape[-2], images.shape[-1]))
        scores = torch.cat(found.scores, dim=1)
        return found.boxes, scores if found.quality is None else scores * found.quality[..., None]


class DetectionsGraph(CandidatesGraph):
    """A detector with NMS: `boxes` (B, M, 4), `scores` (B, M) and `labels` (B, M), see `select`."""

    about = "boxes are corners x1, y1, x2, y2 in pixels, the best first; places left over have score 0 and label -1"

    def __init__(self, student: DenseDetector) -> None:
        super().__init__(student)
        limit = self.decode.selection.limit
        self.outputs = {"boxes": ("batch", limit, 4), "scores": ("batch", limit), "labels": ("batch", limit)}

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """See `Graph`."""
        found = self.decode(self.student(images, self.taps), (images.shape[-2], images.shape[-1]))
        return select(found, self.decode.selection)


def graph_of(student: FeatureModel, nms: bool = False) -> Graph:
    """What to export of a student.

    Args:
        student: a segmenter, or a detector with a dense head.
        nms: whether the graph of a detector ends with its NMS.

    Raises:
        ExportError: there is no graph for such a student.
    """
    if isinstance(student, Detector):
        try:
            if not isinstance(student, DenseDetector):
                raise ValueError(f"{student.card.name} does not give its boxes at every position.")
            return DetectionsGraph(student) if nms else CandidatesGraph(student)
        except ValueError as error:
            raise ExportError(f"there is no ONNX graph for this detector: {error}") from error
    logits = student.taps().get("logits")
    if logits is None or logits.stride is None:
        raise ExportError(f"{student.card.name} neither labels pixels nor detects boxes: there is no graph for it.")
    if nms:
        raise ExportError(f"{student.card.name} detects no boxes: leave NMS out.")
    return LogitsGraph(student)


def trace(graph: Graph) -> ExportedProgram:
    """The graph as torch sees it, for any number and size of images.

    Raises:
        ExportError: the student computes something that cannot be traced.
    """
    stride = max(info.stride or 1 for info in graph.student.taps().values())
    # No multiple of the stride, so that fitting to it is seen, and two positions or more on the coarsest map, since
    # torch takes a size of one for one that never changes.
    images = torch.zeros(2, 3, 2 * stride + 1, 3 * stride + 3)
    sizes = {IMAGES: {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}}
    try:
        with torch.no_grad(), ExportablePooling():
            return torch.export.export(graph, (images,), dynamic_shapes=sizes, strict=False)
    except Exception as error:  # tracing runs the code of other libraries, which fails in ways of its own
        raise ExportError(f"{graph.student.card.name} cannot be traced: {_first_line(error)}") from error


def write_onnx(graph: Graph, path: Path, metadata: Mapping[str, str]) -> None:
    """Write the graph as ONNX, checked for its form.

    Args:
        graph: of a student on the CPU.
        path: of the file.
        metadata: text that stands in the file.

    Raises:
        ExportError: the student cannot be traced, or uses an operation that ONNX does not have.
        ModuleNotFoundError: onnx or onnxscript is not installed.
    """
    import onnx

    traced = trace(graph)
    try:
        program = torch.onnx.export(
            traced,
            (),
            dynamo=True,
            verbose=False,
            input_names=[IMAGES],
            output_names=[*graph.outputs],
            opset_version=OPSET,
            custom_translation_table=translations(),
        )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"{graph.student.card.name} cannot be written as ONNX: {_first_line(error)}") from error
    assert program is not None
    model = program.model_proto
    _tidy(model.graph)
    _name_sizes(model.graph.input[0], ("batch", 3, "height", "width"))
    for output, shape in zip(model.graph.output, graph.outputs.values(), strict=True):
        _name_sizes(output, shape)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _tidy(graph: Any) -> None:
    """Leave out what the exporter notes for itself: lines of code with the paths of this machine, and formulas."""
    del graph.value_info[:]
    for part in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]


def _name_sizes(value: Any, shape: tuple[int | str, ...]) -> None:
    """State the shape of an input or output."""
    for size, known in zip(value.type.tensor_type.shape.dim, shape, strict=True):
        size.Clear()
        if isinstance(known, int):
            size.dim_value = known
        else:
            size.dim_param = known


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
