# SPDX-License-Identifier: Apache-2.0
"""Statistics over all processes of a distributed run."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather


def world_size() -> int:
    """Number of processes; 1 outside a distributed run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_batch(x: Tensor) -> Tensor:
    """The batches of all processes, (B, ...) to (world_size * B, ...), with gradient to each process's own part.

    Every process must hold the same shape. The gradient sums the losses of all processes; where each computes the same
    loss on what was gathered, DDP's mean over processes makes it the gradient of that one loss.
    """
    return x if world_size() == 1 else torch.cat(all_gather(x))  # type: ignore[no-untyped-call]
