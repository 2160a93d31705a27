# SPDX-License-Identifier: Apache-2.0
"""Adaptive average pooling of maps of any size, in operations that ONNX has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class ExportablePooling(TorchFunctionMode):
    """Within the context, adaptive average pooling is computed by `pool`.

    ONNX has no such operator, and torch's exporter puts in its place the positions that the traced size had.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `torch.overrides.TorchFunctionMode`."""
        del types
        return (pool if func is F.adaptive_avg_pool2d else func)(*args, **(kwargs or {}))


def pool(input: Tensor, output_size: int | tuple[int | None, int | None]) -> Tensor:
    """What `torch.nn.functional.adaptive_avg_pool2d` gives: (..., H, W) to (..., *output_size), as two products."""
    rows, columns = output_size if isinstance(output_size, tuple) else (output_size, output_size)
    x = input if rows is None else _means(input.shape[-2], rows, input) @ input
    return x if columns is None else x @ _means(input.shape[-1], columns, input).T


def _means(length: int, parts: int, like: Tensor) -> Tensor:
    """The matrix (parts, length) that takes the mean of each part of a line; parts overlap where they do not fit."""
    part, position = torch.arange(parts, device=like.device)[:, None], torch.arange(length, device=like.device)
    start, end = part * length // parts, ((part + 1) * length + parts - 1) // parts
    return ((position >= start) & (position < end)).to(like) / (end - start).to(like)
