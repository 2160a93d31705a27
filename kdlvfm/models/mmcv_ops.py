# SPDX-License-Identifier: Apache-2.0
"""Operators for mmcv without its compiled module: `mmcv._ext` from torchvision and torch.

The wheels of `mmcv-lite` hold mmcv's Python code and lack the compiled module that its operators call, for which there
is no wheel for current torch. What detectors of boxes need of it is in torchvision and torch already.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torchvision
from torch import Tensor

from kdlvfm.models.mmcv_focal import (
    sigmoid_focal_loss_backward,
    sigmoid_focal_loss_forward,
    softmax_focal_loss_backward,
    softmax_focal_loss_forward,
)

_NAME = "mmcv._ext"


class MissingOperatorError(ValueError):
    """An operator that only a compiled mmcv has."""

    def __init__(self, operator: str) -> None:
        super().__init__(
            f"this detector needs mmcv's operator {operator!r}, which has to be compiled: choose a configuration "
            "without it, or replace mmcv-lite with an mmcv that was built for this torch."
        )


class _Operators(ModuleType):
    """A module in which every operator exists, so that mmcv can be imported; those not in `_OPERATORS` raise."""

    def __getattr__(self, operator: str) -> Callable[..., Any]:
        if operator.startswith("__"):
            raise AttributeError(operator)

        def missing(*args: Any, **kwargs: Any) -> Any:
            del args, kwargs
            raise MissingOperatorError(operator)

        return missing


def provide_operators() -> bool:
    """Make `mmcv._ext` importable; a compiled one is left alone.

    Returns:
        Whether it is the stand-in of this file.
    """
    if _NAME not in sys.modules and importlib.util.find_spec(_NAME) is None:
        module = _Operators(_NAME, "Stand-in by kdlvfm.")
        vars(module).update(_OPERATORS)
        sys.modules[_NAME] = module
    return isinstance(sys.modules.get(_NAME), _Operators)


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes kept, best first. With `offset` 1, sides are x2 - x1 + 1 pixels long."""
    if offset:
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
    kept: Tensor = torchvision.ops.nms(boxes, scores, iou_threshold)
    return kept


def _soft_nms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (Bodla et al., 2017): boxes and decayed scores into the first rows of `dets` (N, 5); their indices.

    `method` is 0 for the ordinary decision (a score becomes 0), 1 for linear and 2 for Gaussian decay.
    """
    scores = scores.clone()
    alive = torch.ones_like(scores, dtype=torch.bool)
    grown = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
    kept: list[int] = []
    while alive.any():
        best = int(scores.where(alive, -torch.inf).argmax())
        dets[len(kept), :4], dets[len(kept), 4] = boxes[best], scores[best]
        kept.append(best)
        alive[best] = False
        overlap = torchvision.ops.box_iou(grown[best : best + 1], grown)[0].nan_to_num(0.0)
        if method == 2:
            scores = scores.where(~alive, scores * torch.exp(-(overlap**2) / sigma))
        else:
            decay = 1 - overlap if method == 1 else torch.zeros_like(overlap)
            scores = scores.where(~alive | (overlap < iou_threshold), scores * decay)
        alive &= scores >= min_score
    return torch.tensor(kept, dtype=torch.int64)


def _roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Average pooling of regions; the maximum (`pool_mode` 0) is not in torchvision."""
    del argmax_y, argmax_x
    if pool_mode == 0:
        raise MissingOperatorError("roi_align_forward with pool_mode='max'")
    size = (aligned_height, aligned_width)
    output.copy_(torchvision.ops.roi_align(input, rois.to(input), size, spatial_scale, sampling_ratio, aligned))


def _roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient with respect to the input, into `grad_input`."""
    del argmax_y, argmax_x
    if pool_mode == 0:
        raise MissingOperatorError("roi_align_backward with pool_mode='max'")
    batch, channels, height, width = grad_input.shape
    grad = torch.ops.torchvision._roi_align_backward(
        grad_output,
        rois.to(grad_output),
        spatial_scale,
        aligned_height,
        aligned_width,
        batch,
        channels,
        height,
        width,
        sampling_ratio,
        aligned,
    )
    grad_input.copy_(grad)


def _roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Maxima of regions, and where they are."""
    pooled, where = torch.ops.torchvision.roi_pool(input, rois.to(input), spatial_scale, pooled_height, pooled_width)
    output.copy_(pooled)
    argmax.copy_(where)


def _roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Gradient with respect to the input, into `grad_input`."""
    batch, channels, height, width = grad_input.shape
    grad = torch.ops.torchvision._roi_pool_backward(
        grad_output,
        rois.to(grad_output),
        argmax,
        spatial_scale,
        pooled_height,
        pooled_width,
        batch,
        channels,
        height,
        width,
    )
    grad_input.copy_(grad)


def _deform_attention_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention (Zhu et al., 2020) by mmcv's formula in plain torch, which it has for CPUs."""
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    del value_level_start_index, im2col_step
    attended: Tensor = multi_scale_deformable_attn_pytorch(
        value, value_spatial_shapes, sampling_locations, attention_weights
    )
    return attended


def _deform_attention_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Gradients of the three real inputs, into `grad_value`, `grad_sampling_loc` and `grad_attn_weight`."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (value, sampling_locations, attention_weights)]
        attended = _deform_attention_forward(
            inputs[0], value_spatial_shapes, value_level_start_index, inputs[1], inputs[2], im2col_step
        )
    grads = torch.autograd.grad(attended, inputs, grad_output)
    for place, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        place.copy_(grad)


_OPERATORS: dict[str, Callable[..., Any]] = {
    "nms": _nms,
    "softnms": _soft_nms,
    "roi_align_forward": _roi_align_forward,
    "roi_align_backward": _roi_align_backward,
    "roi_pool_forward": _roi_pool_forward,
    "roi_pool_backward": _roi_pool_backward,
    "sigmoid_focal_loss_forward": sigmoid_focal_loss_forward,
    "sigmoid_focal_loss_backward": sigmoid_focal_loss_backward,
    "softmax_focal_loss_forward": softmax_focal_loss_forward,
    "softmax_focal_loss_backward": softmax_focal_loss_backward,
    "ms_deform_attn_forward": _deform_attention_forward,
    "ms_deform_attn_backward": _deform_attention_backward,
}
