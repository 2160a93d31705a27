# SPDX-License-Identifier: Apache-2.0
"""Boxes from the outputs of mmdet's dense heads: for all images and positions at once, so that it can be exported."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from kdlvfm.core.detector import Candidates, Selection
from kdlvfm.core.features import Features
from kdlvfm.models.mmdet_head import OUTPUTS, is_dense


class DenseDecoder:
    """The candidates of GFL, RetinaNet, FCOS, ATSS and heads that decode like them; mmdet's own priors and coders.

    mmdet itself leaves candidates out before it decodes the rest, image by image.

    Args:
        net: mmdet's detector.
        name: of it, for messages.
        taps: its outputs, `cls.<i>`, `reg.<i>` and perhaps `ctr.<i>`.

    Attributes:
        selection: what the configuration of the detector says about tests.
        rates: whether the head has a third output, the quality of its boxes.

    Raises:
        ValueError: the head decodes, or suppresses, in another way.
    """

    def __init__(self, net: Any, name: str, taps: Collection[str]) -> None:
        if not (is_dense(net) and _is_known(net.bbox_head)):
            raise ValueError(f"{name} does not decode its boxes as GFL, RetinaNet, FCOS and ATSS do, which can be.")
        settings = net.bbox_head.test_cfg
        kind = settings.nms.get("type", "nms")
        if kind != "nms" or settings.nms.get("class_agnostic") or settings.get("min_bbox_size", 0) > 0:
            raise ValueError(f"{name} does not select by plain NMS for each class (test_cfg {dict(settings)}).")
        self.selection = Selection(
            settings.get("score_thr", 0.0), settings.nms_pre, settings.nms.iou_threshold, settings.max_per_img
        )
        self._head = net.bbox_head
        self._taps = {kind: [tap for tap in taps if tap.startswith(f"{kind}.")] for kind in OUTPUTS}
        self.rates = bool(self._taps["ctr"])

    def __call__(self, features: Features, size: tuple[int, int]) -> Candidates:
        """See `kdlvfm.core.detector.BoxDecoder`."""
        head = self._head
        cls, reg, ctr = ([features[tap] for tap in taps] for taps in self._taps.values())
        priors = head.prior_generator.grid_priors([x.shape[-2:] for x in cls], dtype=cls[0].dtype, device=cls[0].device)
        strides = head.prior_generator.strides
        boxes = torch.cat([self._decode(*level) for level in zip(reg, priors, strides, strict=True)], dim=1)
        if head.bbox_coder.clip_border:
            x, y = boxes[..., 0::2].clamp(0, size[1]), boxes[..., 1::2].clamp(0, size[0])
            boxes = torch.stack([x, y], dim=-1).flatten(-2)
        scores = tuple(_rows(x, head.cls_out_channels).sigmoid() for x in cls)
        quality = torch.cat([_rows(x, 1) for x in ctr], dim=1).sigmoid().squeeze(-1) if self.rates else None
        return Candidates(boxes, scores, quality)

    def _decode(self, reg: Tensor, priors: Tensor, stride: tuple[int, int]) -> Tensor:
        """Boxes (B, n, 4) of a level from its map (B, C, h, w) and its priors (n, 2) or (n, 4)."""
        head = self._head
        if "integral" in dict(head.named_children()):
            distributions = _rows(reg, reg.shape[1])
            sides = head.integral(distributions).view(*distributions.shape[:2], 4) * stride[0]
            priors = head.anchor_center(priors)
        else:
            sides = _rows(reg, 4)
        rows = priors.expand(sides.shape[0], -1, -1).flatten(0, 1)
        boxes: Tensor = head.bbox_coder.decode(rows, sides.flatten(0, 1))
        return boxes.view(sides.shape)


def _rows(x: Tensor, dim: int) -> Tensor:
    """A map (B, A * dim, h, w) as (B, h * w * A, dim), in mmdet's order of priors."""
    batch, channels, height, width = x.shape
    return x.view(batch, channels // dim, dim, height, width).permute(0, 3, 4, 1, 2).flatten(1, 3)


def _is_known(head: Any) -> bool:
    """Whether a dense head decodes with mmdet's shared code, or as GFL does."""
    from mmdet.models.dense_heads import GFLHead
    from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
    from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder, DistancePointBBoxCoder

    kind: Any = type(head)
    shared = kind.predict_by_feat is BaseDenseHead.predict_by_feat and head.use_sigmoid_cls
    alone = kind._predict_by_feat_single in (BaseDenseHead._predict_by_feat_single, GFLHead._predict_by_feat_single)
    return shared and alone and isinstance(head.bbox_coder, DeltaXYWHBBoxCoder | DistancePointBBoxCoder)
