# SPDX-License-Identifier: Apache-2.0
"""PHI-S: the teacher's features, turned and scaled so that every channel has variance 1 and no distance is bent."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from kdlvfm.core.distributed import world_size


class PHISTransform(nn.Module):
    r"""An affine map y = W (x - μ) of C channels, fitted to features, whose W is a rotation times one scale.

    .. math::
        \Sigma = U \Lambda U^\top, \quad \bar\alpha = \sqrt{\mathrm{mean}\, \lambda_i}, \quad
        W = \frac{1}{\bar\alpha} R \, U^\top

    with Σ the covariance of the features and R a rotation that spreads every eigenvalue evenly over the channels. Each
    channel of y has variance 1, as after standardisation; but distances keep their ratios, so that what is large in
    the teacher stays large. R is the orthonormal Hadamard matrix where one is known for C channels (the paper); else
    it is built of plane rotations, which do the same for any C (ours).

    Ranzinger et al., "PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation", ICLR 2025.

    Args:
        dim: C.

    Example:
        >>> x = torch.randn(1000, 12) @ torch.randn(12, 12)
        >>> phi = PHISTransform(12).fit(x)
        >>> bool((phi(x).var(dim=0, unbiased=False) - 1).abs().max() < 1e-3)
        True
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor
    weight: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scatter", torch.zeros(dim, dim))
        self.register_buffer("weight", torch.eye(dim))

    @torch.no_grad()
    def observe(self, features: Tensor) -> None:
        """Add features (B, C, ...) to mean and covariance, over all processes; `refit` then renews the map."""
        rows = features.movedim(1, -1).flatten(0, -2).float()
        sums = torch.cat([rows.new_tensor([float(len(rows))]), rows.sum(dim=0)]).double()
        if world_size() > 1:
            dist.all_reduce(sums)
        count, mean = sums[0], sums[1:] / sums[0]
        centred = rows - mean.float()
        scatter = centred.mT @ centred
        if world_size() > 1:
            dist.all_reduce(scatter)
        total = self.count + count
        shift = mean - self.mean.double()
        self.scatter += scatter + (torch.outer(shift, shift) * (self.count * count / total)).float()
        self.mean.copy_(self.mean.double() + shift * (count / total))
        self.count.copy_(total)

    @torch.no_grad()
    def refit(self) -> None:
        """Take the map from what was observed.

        Raises:
            ValueError: all features were equal, or there were none.
        """
        values, vectors = torch.linalg.eigh(self.scatter.double() / self.count.clamp(min=1))
        values = values.clamp(min=0)
        if not values.mean() > 0:
            raise ValueError("PHI-S needs features that vary; all of those observed are equal.")
        self.weight.copy_(balancing_rotation(values) @ vectors.mT / values.mean().sqrt())

    def fit(self, features: Tensor) -> PHISTransform:
        """Fit to features (N, C) or (B, C, ...) alone; returns itself."""
        for statistic in (self.count, self.mean, self.scatter):
            statistic.zero_()
        self.observe(features)
        self.refit()
        return self

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, C, ...) to the same shape."""
        with torch.autocast(features.device.type, enabled=False):
            weight, mean = self.weight.to(features.dtype), self.mean.to(features.dtype)
            return F.linear(features.movedim(1, -1) - mean, weight).movedim(-1, 1)

    def inverse(self, transformed: Tensor) -> Tensor:
        """What `forward` made, (B, C, ...), back as features."""
        with torch.autocast(transformed.device.type, enabled=False):
            weight, mean = self.weight.to(transformed.dtype), self.mean.to(transformed.dtype)
            # W is a rotation times a scale s: its inverse is its transpose over s squared.
            inverse = weight.mT / weight.square().sum(dim=0).mean()
            features: Tensor = F.linear(transformed.movedim(1, -1), inverse) + mean
        return features.movedim(-1, 1)


def balancing_rotation(values: Tensor) -> Tensor:
    """An orthogonal R (C, C) such that R diag(values) Rᵀ has the mean of `values` (C,) everywhere on its diagonal."""
    hadamard = _hadamard(len(values))
    if hadamard is not None:
        return hadamard.to(values) / math.sqrt(len(values))
    return _plane_rotations(values)


def _hadamard(order: int) -> Tensor | None:
    """A Hadamard matrix, of entries 1 and -1 and orthogonal rows, by Sylvester's and Paley's constructions."""
    if order in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]])[:order, :order]
    if order % 4:
        return None
    if _is_prime(order - 1):
        return _paley(order - 1)
    if order % 8 == 0 or order == 4:
        half = _hadamard(order // 2)
        if half is not None:
            return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])
    return None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _paley(prime: int) -> Tensor:
    """The Hadamard matrix of order `prime` + 1, for a prime that is 3 modulo 4."""
    squares = {number * number % prime for number in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if number in squares else -1.0 for number in range(1, prime)])
    places = torch.arange(prime)
    skew = torch.zeros(prime + 1, prime + 1)
    skew[0, 1:], skew[1:, 0] = 1.0, -1.0
    skew[1:, 1:] = character[(places[:, None] - places) % prime]
    return skew + torch.eye(prime + 1)


def _plane_rotations(values: Tensor) -> Tensor:
    """One rotation after another sets one entry of the diagonal to the mean, until all are."""
    rotation = torch.eye(len(values)).to(values)
    diagonal, mean = values.clone(), values.mean()
    # The diagonal of the rest stays diagonal: each rotation meets an axis that no other has touched but one.
    matrix = torch.diag(values)
    open_axes = list(range(len(values)))
    while len(open_axes) > 1:
        diagonal = matrix.diagonal()[open_axes]
        low, high = open_axes[int(diagonal.argmin())], open_axes[int(diagonal.argmax())]
        a, b, c = matrix[low, low], matrix[high, high], matrix[low, high]
        if b - a <= 1e-12 * mean.abs():
            break
        # tan t of the angle that makes the new (low, low) entry the mean: (b - m) t² + 2 c t + (a - m) = 0.
        discriminant = (c * c - (a - mean) * (b - mean)).clamp(min=0).sqrt()
        tangent = (-c + discriminant) / (b - mean) if b > mean else torch.zeros_like(a)
        cosine = 1 / (1 + tangent * tangent).sqrt()
        sine = tangent * cosine
        turn = torch.stack([torch.stack([cosine, sine]), torch.stack([-sine, cosine])])
        for square in (matrix, rotation):
            square[[low, high]] = turn @ square[[low, high]]
        matrix[:, [low, high]] = matrix[:, [low, high]] @ turn.mT
        open_axes.remove(low)
    return rotation
