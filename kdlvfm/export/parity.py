# SPDX-License-Identifier: Apache-2.0
"""Whether a graph in onnxruntime computes what the student computes in torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlvfm.core.detector import Detector
from kdlvfm.export.graph import DetectionsGraph, ExportError, Graph
from kdlvfm.export.session import OnnxDetector, OnnxModel

TOLERANCE = 1e-4
"""Largest difference, as a share of the largest value where that is above 1, as are logits and pixels."""

_SAME = 0.95


@dataclass(frozen=True)
class Check:
    """One batch in both.

    Attributes:
        batch: number of images.
        height: of the images in pixels.
        width: likewise.
        error: largest difference found, see `TOLERANCE`.
        detections: what torch detected in the images together; `None` for a graph without NMS.
    """

    batch: int
    height: int
    width: int
    error: float
    detections: int | None = None


def check_parity(graph: Graph, model: OnnxModel, shapes: Iterable[tuple[int, int, int]]) -> list[Check]:
    """Compare a graph's outputs with the student's in torch; of a graph with NMS, with the student's own detections.

    Args:
        graph: what was written.
        model: the file in onnxruntime.
        shapes: (batch, height, width) of the images to try.

    Raises:
        ExportError: they differ by more than the tolerance.
    """
    checks = []
    for batch, height, width in shapes:
        images = _images(batch, height, width)
        with torch.no_grad():
            if isinstance(graph, DetectionsGraph) and isinstance(model, OnnxDetector):
                error, detections = _compare_detections(graph, model, images)
            else:
                ours, theirs = graph(images), model(images, model.outputs)
                error = max(difference(theirs[name], x) for name, x in zip(graph.outputs, ours, strict=True))
                detections = None
        if not error <= TOLERANCE:
            raise ExportError(
                f"{model.card.name} does not compute what the student does: on {batch} images of {height}x{width} "
                f"pixels it differs by {error:.1e}, more than {TOLERANCE:.0e}."
            )
        checks.append(Check(batch, height, width, error, detections))
    return checks


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference of two tensors, divided by the largest value expected where that is above 1; NaN is infinite.

    >>> difference(torch.tensor([100.0, 1.0]), torch.tensor([101.0, 1.0]))
    0.0099...
    """
    if found.shape != expected.shape:
        return torch.inf
    if not expected.numel():
        return 0.0
    worst = (found - expected).abs().max() / expected.abs().max().clamp_min(1)
    return float(worst.nan_to_num(torch.inf))


def _compare_detections(graph: DetectionsGraph, model: OnnxDetector, images: Tensor) -> tuple[float, int]:
    """Largest difference between detections that both have, and how many there are.

    Of twenty, one may be missing: of two boxes with equal scores, either may suppress the other.

    Raises:
        ExportError: more are missing.
    """
    student: Any = graph.student
    assert isinstance(student, Detector)
    sizes = [torch.tensor(images.shape[-2:])] * len(images)
    ours = student.predict(graph.student(images, graph.taps), sizes)
    theirs = model.predict(model(images, model.outputs), sizes)
    worst, same, count = 0.0, 0, 0
    for a, b in zip(ours, theirs, strict=True):
        errors = _errors(a, b)
        close = [error for error in errors if error <= TOLERANCE]
        worst = max([worst, *close])
        same, count = same + len(close), count + max(len(a["scores"]), len(b["scores"]))
    if same < _SAME * count:
        raise ExportError(
            f"{model.card.name} detects otherwise than the student: of {count} boxes {same} are the same."
        )
    return worst, count


def _errors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[float]:
    """For each detection of ours, how far from it the nearest one of theirs with its label is."""
    errors = []
    for box, score, label in zip(ours["boxes"], ours["scores"], ours["labels"], strict=True):
        alike = theirs["labels"] == label
        boxes = (theirs["boxes"][alike] - box).abs().amax(dim=1) / ours["boxes"].max().clamp_min(1)
        scores = (theirs["scores"][alike] - score).abs()
        errors.append(float(torch.maximum(boxes, scores).min()) if len(scores) else torch.inf)
    return errors


def _images(batch: int, height: int, width: int) -> Tensor:
    """Smooth noise with a little grain: (batch, 3, height, width) in [0, 1], always the same."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, height // 16 + 2, width // 16 + 2, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return (smooth + 0.05 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)
