# SPDX-License-Identifier: Apache-2.0
"""Projectors: small networks that bring the student's channels to the teacher's. They train and never ship."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlvfm.core.align import promote, resize_map

Projector = Literal["linear", "mlp", "conv_bn", "orthogonal", "attention"]


class MLPProjector(nn.Sequential):
    """Two linear maps over channels with a GELU between them, at each position by itself.

    Args:
        student_dim: channels that enter.
        teacher_dim: channels that leave, and of the hidden layer.
    """

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__(
            nn.Conv2d(student_dim, teacher_dim, kernel_size=1),
            nn.GELU(),
            nn.Conv2d(teacher_dim, teacher_dim, kernel_size=1),
        )


class ConvBNProjector(nn.Sequential):
    """A 3x3 convolution, batch normalisation, a ReLU and a linear map: it sees a neighbourhood of each position.

    Args:
        student_dim: channels that enter.
        teacher_dim: channels that leave, and of the hidden layer.
        bias: whether the last map has an offset.
    """

    def __init__(self, student_dim: int, teacher_dim: int, bias: bool = True) -> None:
        super().__init__(
            nn.Conv2d(student_dim, teacher_dim, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(teacher_dim),
            nn.ReLU(),
            nn.Conv2d(teacher_dim, teacher_dim, kernel_size=1, bias=bias),
        )


class OrthogonalProjector(nn.Module):
    """A linear map over channels whose matrix P is orthogonal at every step of training.

    P^T P = I, so that lengths and angles of the student's features are kept and it is the student that must change. A
    student with more channels than the teacher cannot be embedded so: then P P^T = I.

    P is the orthogonal factor of a free matrix (QR decomposition with a positive diagonal, which is unique and smooth).
    The authors' code uses torch's parametrization, whose default map stores signs in the parameter it trains: weight
    decay moves them off 1 and P becomes 0.

    Miles, Elezi, Deng, "VkD: Improving Knowledge Distillation using Orthogonal Projections", CVPR 2024.

    Args:
        student_dim: channels that enter.
        teacher_dim: channels that leave.
    """

    def __init__(self, student_dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(nn.init.orthogonal_(torch.empty(teacher_dim, student_dim)))

    @property
    def weight(self) -> Tensor:
        """P, (C_T, C_S), in single precision at least."""
        matrix = promote(self.matrix)
        wide = matrix.shape[0] < matrix.shape[1]
        orthogonal, triangle = torch.linalg.qr(matrix.T if wide else matrix)
        signed: Tensor = orthogonal * triangle.diagonal().sgn()
        return signed.T if wide else signed

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C_S, ...) to (B, C_T, ...)."""
        # Also under autocast in single precision: a matrix rounded to half is not orthogonal.
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(promote(x).movedim(1, -1), self.weight).movedim(-1, 1)


class AttentionProjector(nn.Module):
    """Learned queries, one for each position that leaves, attend to all positions of the student's map.

    A CNN's position knows its surroundings, a ViT's the whole image: attention lets what leaves draw on everything.
    Queries, and the places added to the keys, are learned on a grid of `grid` x `grid` and interpolated to the size at
    hand. After attention comes a residual perceptron, as in a transformer's decoder.

    After the cross-attention projector of Fan et al., "ScaleKD: Strong Vision Transformers Could Be Excellent
    Teachers", NeurIPS 2024.

    Args:
        student_dim: channels that enter.
        teacher_dim: channels that leave.
        heads: attention heads; `None` for one for every 64 channels, or the nearest number that divides them.
        grid: side of the learned grid.
    """

    def __init__(self, student_dim: int, teacher_dim: int, heads: int | None = None, grid: int = 14) -> None:
        super().__init__()
        wanted = max(teacher_dim // 64, 1)
        self.heads = heads or max(count for count in range(1, wanted + 1) if teacher_dim % count == 0)
        if teacher_dim % self.heads:
            raise ValueError(f"{self.heads} heads do not divide {teacher_dim} channels.")
        self.queries = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, teacher_dim, grid, grid), std=0.02))
        self.places = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, teacher_dim, grid, grid), std=0.02))
        self.key = nn.Linear(student_dim, teacher_dim, bias=False)
        self.value = nn.Linear(student_dim, teacher_dim)
        self.out = nn.Linear(teacher_dim, teacher_dim)
        self.norm = nn.LayerNorm(teacher_dim)
        self.perceptron = nn.Sequential(
            nn.Linear(teacher_dim, 2 * teacher_dim), nn.GELU(), nn.Linear(2 * teacher_dim, teacher_dim)
        )

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Features (B, C_S, H, W) to (B, C_T, h, w).

        Args:
            x: the student's map.
            size: (h, w), the grid of what leaves; `None` for that of `x`.
        """
        height, width = size or (int(x.shape[2]), int(x.shape[3]))
        tokens = x.flatten(2).mT
        queries = resize_map(self.queries, (height, width)).flatten(2).mT.expand(len(x), -1, -1)
        keys = self.key(tokens) + resize_map(self.places, x.shape[2:]).flatten(2).mT
        query, key, value = (self._split(part) for part in (queries.to(keys.dtype), keys, self.value(tokens)))
        attended = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2)) + queries
        out = out + self.perceptron(self.norm(out))
        return out.mT.reshape(len(x), -1, height, width)

    def _split(self, tokens: Tensor) -> Tensor:
        """(B, N, C) to (B, heads, N, C / heads)."""
        batch, count, _ = tokens.shape
        return tokens.view(batch, count, self.heads, -1).transpose(1, 2)


def build_projector(kind: Projector | None, student_dim: int, teacher_dim: int, *, bias: bool = True) -> nn.Module:
    """A projector of maps (B, C_S, H, W) to (B, C_T, H, W).

    Args:
        kind: `"linear"` (a 1x1 convolution), `"mlp"`, `"conv_bn"`, `"orthogonal"` or `"attention"`; `None` for as
            little as will do: nothing where the channels agree, a 1x1 convolution where they differ.
        student_dim: C_S.
        teacher_dim: C_T.
        bias: `False` for methods to which an offset of a channel means nothing; it would never learn.

    Raises:
        ValueError: there is no such kind.
    """
    if kind is None and student_dim == teacher_dim:
        return nn.Identity()
    if kind is None or kind == "linear":
        return nn.Conv2d(student_dim, teacher_dim, kernel_size=1, bias=bias)
    if kind == "conv_bn":
        return ConvBNProjector(student_dim, teacher_dim, bias=bias)
    if kind == "mlp":
        return MLPProjector(student_dim, teacher_dim)
    if kind == "orthogonal":
        return OrthogonalProjector(student_dim, teacher_dim)
    if kind == "attention":
        return AttentionProjector(student_dim, teacher_dim)
    raise ValueError(f"projector must be 'linear', 'mlp', 'conv_bn', 'orthogonal' or 'attention', not {kind!r}.")
