# SPDX-License-Identifier: Apache-2.0
"""Statistics over all processes of a distributed run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes; 1 outside a distributed run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0; 0 outside a distributed run."""
    return dist.get_rank() if world_size() > 1 else 0


class _GatherBatch(torch.autograd.Function):
    """All processes' batches in the order of their ranks; backward sums the gradients that all have for one's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total.chunk(world_size())[dist.get_rank()]


def gather_batch(x: Tensor) -> Tensor:
    """The batches of all processes, (B, ...) to (world_size * B, ...), with gradient to each process's own part.

    Every process must hold the same shape. The gradient sums the losses of all processes; where each computes the same
    loss on what was gathered, DDP's mean over processes makes it the gradient of that one loss.
    """
    if world_size() == 1:
        return x
    gathered: Tensor = _GatherBatch.apply(x)
    return gathered


@torch.no_grad()
def average(x: Tensor) -> Tensor:
    """The mean of `x` over all processes, the same for all of them, without gradient."""
    if world_size() == 1:
        return x.detach()
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / world_size()
