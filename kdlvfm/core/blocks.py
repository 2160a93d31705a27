# SPDX-License-Identifier: Apache-2.0
"""A sum over blocks whose intermediate tensors are never held for more than one block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def check_first_derivative() -> None:
    """For the backward pass of a function whose gradient is made of constants: a second derivative would be wrong.

    Raises:
        RuntimeError: one is asked for, by `create_graph=True`.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("this loss can be differentiated once: its gradient has no graph (create_graph=True).")


def block_length(x: Tensor, entries: int) -> int:
    """How many slices of so many entries make a block: 1 MiB of single precision, which a processor's cache holds.

    On a GPU, where each block costs launches and not the cache decides, 256 MiB.
    """
    return max((2**26 if x.is_cuda else 2**18) // max(entries, 1), 1)


def sum_over_blocks(function: Callable[[Tensor, Tensor], Tensor], own: Tensor, goal: Tensor, size: int) -> Tensor:
    """The sum of `function(own, goal)`, a scalar, over blocks of `size` along the first dimension of both.

    The gradient for `own` is made in the forward pass, while a block is there, so that nothing is computed twice, as
    it is with checkpoints. It can be differentiated once. Nothing else that `function` reads gets a gradient.
    """
    total: Tensor = _Sum.apply(own, goal.detach(), function, size, torch.is_grad_enabled())
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        own: Tensor,
        goal: Tensor,
        function: Callable[[Tensor, Tensor], Tensor],
        size: int,
        differentiable: bool,
    ) -> Tensor:
        wanted = differentiable and ctx.needs_input_grad[0]
        found = own.new_empty(own.shape) if wanted else None
        total = own.new_zeros(())
        for start in range(0, len(own), size):
            part = slice(start, start + size)
            with torch.set_grad_enabled(wanted):
                block = own[part].detach().requires_grad_(wanted)
                value = function(block, goal[part])
            if found is not None:
                (found[part],) = torch.autograd.grad(value, block)
            total += value.detach()
        ctx.save_for_backward(found)
        return total

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative()
        (found,) = ctx.saved_tensors
        return found * factor, None, None, None, None
