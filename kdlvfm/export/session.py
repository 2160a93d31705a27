# SPDX-License-Identifier: Apache-2.0
"""A file of ONNX in onnxruntime, as a model of this library: a task measures it as it measures the student."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdlvfm.core.detector import Candidates, Selection
from kdlvfm.core.features import FeatureModel, Features, TapInfo
from kdlvfm.export.graph import IMAGES, CandidatesGraph, DetectionsGraph, ExportError, Graph
from kdlvfm.export.suppression import select


class OnnxModel(FeatureModel):
    """What a graph computes in onnxruntime, on the CPU with as many threads as torch has; its taps are its outputs.

    Args:
        path: of the file.
        graph: what was written to it.

    Raises:
        ExportError: onnxruntime does not take the file.
        ModuleNotFoundError: onnxruntime is not installed.
    """

    def __init__(self, path: Path, graph: Graph) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # what goes wrong is raised as well
        self.card = replace(graph.student.card, name=path.name)
        self.outputs = tuple(graph.outputs)
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no class in common
            raise ExportError(f"onnxruntime cannot load {path.name}: {error}") from error
        sizes = {name: [size for size in shape if isinstance(size, int)] for name, shape in graph.outputs.items()}
        self._taps = {name: TapInfo(known[-1], None) for name, known in sizes.items()}

    def taps(self) -> dict[str, TapInfo]:
        """The outputs of the graph."""
        return dict(self._taps)

    def forward(self, images: Tensor, taps: Collection[str]) -> dict[str, Tensor]:
        """The outputs named, of images (B, 3, H, W) in [0, 1].

        Raises:
            ExportError: onnxruntime cannot compute them.
        """
        try:
            found = self._session.run([*taps], {IMAGES: images.numpy()})
        except Exception as error:  # as above
            raise ExportError(f"{self.card.name} fails on images {tuple(images.shape)}: {error}") from error
        return {tap: torch.from_numpy(value) for tap, value in zip(taps, found, strict=True)}

    def everything(self, images: Tensor) -> dict[str, Tensor]:
        """All outputs of the graph."""
        found: dict[str, Tensor] = self(images, self.outputs)
        return found


class OnnxDetector(OnnxModel):
    """The graph of a detector; without NMS in it, detections are selected here, by the detector's own numbers.

    Of such a graph the candidates of all levels are one list, and the threshold, which is one of scores that are not
    yet multiplied by a quality, applies to detectors without such a quality only.

    Args:
        path: of the file.
        graph: what was written to it.
    """

    def __init__(self, path: Path, graph: CandidatesGraph) -> None:
        super().__init__(path, graph)
        self.task_taps = self.outputs
        self.num_classes = graph.num_classes
        self._selection: Selection | None = None
        if not isinstance(graph, DetectionsGraph):
            selection = graph.decode.selection
            self._selection = replace(selection, score_threshold=0.0) if graph.decode.rates else selection

    def loss(self, features: Features, target: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A graph is not trained.

        Raises:
            TypeError: always.
        """
        del features, target
        raise TypeError(f"{self.card.name} is a graph: it cannot be trained.")

    def predict(self, features: Features, sizes: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """See `kdlvfm.core.detector.Detector`."""
        height, width = torch.stack([*sizes])[:, :, None, None].unbind(1)
        x, y = features["boxes"][..., 0::2].clamp_max(width), features["boxes"][..., 1::2].clamp_max(height)
        boxes, scores = torch.stack([x, y], dim=-1).flatten(-2), features["scores"]
        if self._selection is None:
            labels = features["labels"]
        else:
            boxes, scores, labels = select(Candidates(boxes, (scores,), None), self._selection)
        return [
            {"boxes": box[score > 0], "scores": score[score > 0], "labels": label[score > 0]}
            for box, score, label in zip(boxes, scores, labels, strict=True)
        ]


def open_graph(path: Path, graph: Graph) -> OnnxModel:
    """A file as the model that fits what was written to it.

    Raises:
        ExportError: onnxruntime does not take the file.
        ModuleNotFoundError: onnxruntime is not installed.
    """
    return OnnxDetector(path, graph) if isinstance(graph, CandidatesGraph) else OnnxModel(path, graph)
