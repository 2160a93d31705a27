# SPDX-License-Identifier: Apache-2.0
"""A network as a constant, for as long as something else learns through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Within the context `network` is a constant: without statistics that move or parameters that take a gradient.

    What is computed within it passes a gradient on to its inputs, also later. Afterwards everything is as it was.

    Example:
        >>> import torch
        >>> network, x = nn.Linear(2, 1), torch.rand(3, 2, requires_grad=True)
        >>> with frozen(network):
        ...     y = network(x).sum()
        >>> y.backward()
        >>> network.weight.grad is None, x.grad is None
        (True, False)
    """
    # Heads of detectors may predict in other units when not in training: what has parts of its own keeps its mode.
    layers = [module for module in network.modules() if [*module.buffers(recurse=False)] or not [*module.children()]]
    modes = [module.training for module in layers]
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for module in layers:
        module.training = False
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in zip(layers, modes, strict=True):
            module.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)
