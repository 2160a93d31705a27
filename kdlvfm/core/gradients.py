# SPDX-License-Identifier: Apache-2.0
"""Gradients of single terms, to compare them: how long they are and whether they agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdlvfm.core.align import promote
from kdlvfm.core.distributed import average

_SCALE = 2.0**10
"""Terms are multiplied by this on the way back, so that small gradients do not vanish where they are in float16."""


def gradients(term: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of a scalar at each of `inputs`, `None` where it does not depend on one.

    Nothing is added to any `.grad`, and the graph stays for the backward pass of the training step.

    Args:
        term: a scalar; one without a graph has gradients of 0.
        inputs: parameters or features that require a gradient.

    Returns:
        Tensors in the shapes of `inputs`, of float32 where they are in half precision.

    Example:
        >>> x, y = torch.tensor([3.0, 4.0], requires_grad=True), torch.ones(2, requires_grad=True)
        >>> gradients(x.square().sum(), [x, y])
        [tensor([6., 8.]), None]
    """
    if not term.requires_grad:
        return [torch.zeros_like(promote(x)) for x in inputs]
    found = torch.autograd.grad(promote(term) * _SCALE, inputs, retain_graph=True, allow_unused=True)
    return [None if gradient is None else promote(gradient) / _SCALE for gradient in found]


def inner_products(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> Tensor:
    """⟨a, b⟩, ⟨a, a⟩ and ⟨b, b⟩ of two gradients a and b, as one tensor (3,) without gradient.

    In a distributed run each is the mean over the processes, and so the same for all of them: their gradients are taken
    as parts of one, which for gradients at features they are.

    Args:
        first: a, in as many tensors as one likes; `None` stands for 0.
        second: b, in tensors of the same shapes.

    Raises:
        ValueError: the two have not the same shapes.

    Example:
        >>> inner_products([torch.tensor([3.0, 4.0]), None], [torch.tensor([1.0, 0.0]), torch.ones(2)])
        tensor([ 3., 25.,  3.])
    """
    for a, b in zip(first, second, strict=True):
        if a is not None and b is not None and a.shape != b.shape:
            raise ValueError(f"gradients must be of the same inputs, not {tuple(a.shape)} and {tuple(b.shape)}.")
    device = next((x.device for x in (*first, *second) if x is not None), None)

    def dot(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> Tensor:
        # Not matrix products, which autocast would take to half precision.
        products = [(a * b).sum() for a, b in zip(left, right, strict=True) if a is not None and b is not None]
        return torch.stack(products).sum() if products else torch.zeros((), device=device)

    return average(torch.stack([dot(first, second), dot(first, first), dot(second, second)]))
