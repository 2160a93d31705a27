# SPDX-License-Identifier: Apache-2.0
"""Standardisation of each channel by statistics of all batches so far, rather than of the one at hand."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdlvfm.core.align import promote
from kdlvfm.core.distributed import world_size


class RunningNorm(nn.Module):
    r"""y = (x - μ) / σ for each channel, with running estimates of mean and standard deviation.

    Batch n moves the estimates by m = max(1 / n, `momentum`):

    .. math::
        \delta = \mu_n - \mu, \quad \mu \leftarrow \mu + m\,\delta, \quad
        \sigma^2 \leftarrow (1 - m)\,\big(\sigma^2 + m\,\delta^2\big) + m\,\sigma_n^2

    so that they are the statistics of all features seen, and later of the recent ones. Means differ less from batch to
    batch than those of the batch at hand, which matters where batches are small.

    After Sariyildiz et al., "UNIC: Universal Classification Models via Multi-teacher Distillation", ECCV 2024, whose
    code lets m fall from 1 to 0.001 along a cosine over the run and averages σ instead of σ²; m = 1/n is ours.

    Args:
        dim: channels.
        momentum: the least m; 0.001 is UNIC's.
        min_std: a channel of a smaller standard deviation is divided by this instead.

    Example:
        >>> norm, x = RunningNorm(3), torch.randn(8, 3, 4, 4) * 5 + 1
        >>> norm.observe(x)
        >>> bool((norm(x).std(dim=(0, 2, 3), unbiased=False) - 1).abs().max() < 1e-4)
        True
    """

    seen: Tensor
    mean: Tensor
    var: Tensor

    def __init__(self, dim: int, *, momentum: float = 1e-3, min_std: float = 1e-3) -> None:
        super().__init__()
        self.momentum = momentum
        self.min_std = min_std
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))

    @torch.no_grad()
    def observe(self, features: Tensor) -> None:
        """Move the estimates by a batch of features (B, C, ...), over all processes."""
        rows = promote(features).movedim(1, -1).flatten(0, -2)
        var, mean = (moment.double() for moment in torch.var_mean(rows, dim=0, unbiased=False))
        if world_size() > 1:
            moments = torch.stack([mean, var + mean.square()])
            dist.all_reduce(moments)
            mean, square = moments / world_size()
            var = (square - mean.square()).clamp(min=0)
        self.seen += 1
        momentum = (1 / self.seen.double()).clamp(min=self.momentum)
        shift = mean - self.mean.double()
        self.var.copy_((1 - momentum) * (self.var.double() + momentum * shift.square()) + momentum * var)
        self.mean.copy_(self.mean.double() + momentum * shift)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, C, ...) to the same shape."""
        shape = (-1, *(1 for _ in features.shape[2:]))
        std = self.var.clamp(min=self.min_std**2).sqrt()
        return (features - self.mean.view(shape)) / std.view(shape)
