# SPDX-License-Identifier: Apache-2.0
"""From a detector's candidates to its detections, in operations that can be exported: thresholds, NMS, the best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlvfm.core.detector import Candidates, Selection

NO_CLASS = -1
"""Label of places that no detection fills."""


def select(candidates: Candidates, selection: Selection) -> tuple[Tensor, Tensor, Tensor]:
    """The detections of a batch, the best first; M is the limit of the selection.

    Returns:
        boxes (B, M, 4), scores (B, M) and labels (B, M), int64. Places left over have score 0 and label -1.
    """
    boxes = candidates.boxes
    scores = torch.cat([_strongest(level, selection) for level in candidates.scores], dim=1)
    if candidates.quality is not None:
        scores = scores * candidates.quality[..., None]
    has_area = (boxes[..., 2:] > boxes[..., :2]).all(dim=-1, keepdim=True)
    scores = suppressed(boxes, scores * has_area, selection.iou_threshold, selection.limit)
    # As many zeros follow as are asked for: a small image may have fewer candidates.
    best, index = F.pad(scores.flatten(1), (0, selection.limit)).topk(selection.limit)
    count, classes = scores.shape[1:]
    index = index.clamp(max=count * classes - 1)
    found = best > 0
    place = (index // classes)[..., None].expand(-1, -1, 4)
    return boxes.gather(1, place) * found[..., None], best, (index % classes).where(found, NO_CLASS)


def _strongest(scores: Tensor, selection: Selection) -> Tensor:
    """Scores (B, n, K) with zeros for those below the threshold, and for those not among the best of their image."""
    best = F.pad(scores.flatten(1), (0, selection.per_level)).topk(selection.per_level).values
    kept = (scores > selection.score_threshold) & (scores >= best[:, -1, None, None])
    return scores * kept


@torch.library.custom_op("kdlvfm::suppressed", mutates_args=())
def suppressed(boxes: Tensor, scores: Tensor, iou_threshold: float, limit: int) -> Tensor:
    """Non-maximum suppression of each class by itself.

    Args:
        boxes: (B, N, 4), corners.
        scores: (B, N, K); those that are 0 take no part.
        iou_threshold: of two boxes that overlap more, the one with the lower score is suppressed.
        limit: at most so many are left of a class.

    Returns:
        The scores with zeros for what is suppressed.
    """
    from torchvision.ops import nms

    kept = torch.zeros_like(scores)
    for image, row in enumerate(scores):
        for label, column in enumerate(row.unbind(1)):
            (given,) = column.nonzero(as_tuple=True)
            chosen = given[nms(boxes[image, given], column[given], iou_threshold)[:limit]]
            kept[image, chosen, label] = column[chosen]
    return kept


@suppressed.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float, limit: int) -> Tensor:
    del boxes, iou_threshold, limit
    return torch.empty_like(scores)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How torch's exporter writes `suppressed`: with ONNX' NonMaxSuppression.

    Raises:
        ModuleNotFoundError: onnxscript is not installed.
    """
    from onnxscript import opset18 as op

    def translate(boxes: Any, scores: Any, iou_threshold: float, limit: int) -> Any:
        by_class = op.Transpose(scores, perm=[0, 2, 1])
        most: Any = op.Constant(value_int=limit)
        overlap: Any = op.Constant(value_float=iou_threshold)
        least: Any = op.Constant(value_float=0.0)
        kept = op.NonMaxSuppression(boxes, by_class, most, overlap, least)
        chosen = op.ScatterND(op.Sub(by_class, by_class), kept, op.GatherND(by_class, kept))
        return op.Transpose(chosen, perm=[0, 2, 1])

    return {torch.ops.kdlvfm.suppressed.default: translate}
