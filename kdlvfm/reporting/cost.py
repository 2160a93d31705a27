# SPDX-License-Identifier: Apache-2.0
"""What a network costs: its parameters, and the multiply-accumulates of one image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """Number of scalars in the parameters of `model`, trainable or not; a shared parameter counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, size: tuple[int, int], *, forward: Callable[[Tensor], Any] | None = None) -> int:
    """Multiply-accumulates of one image in the convolutions, linear layers and attention of `model`.

    Normalisation, activations and resizing are not counted, as usual in the field. The model runs once, in evaluation
    mode and without gradient, on a black image; its modes and the random state are left as they were.

    Args:
        model: the network; it gives the device and is the default `forward`.
        size: (height, width) of the image in pixels.
        forward: what to count, from images (1, 3, H, W), if it is not `model` itself: for instance
            `lambda images: student(images, ["logits"])`.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    images = torch.zeros(1, 3, *size, device=device)
    with _evaluating(model), _countable_attention(), FlopCounterMode(display=False) as counter:
        (forward or model)(images)
    return int(counter.get_total_flops()) // 2


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _countable_attention() -> Iterator[None]:
    """Attention as matrix products: the fused kernels of the CPU are opaque to the counter and count as nothing."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
