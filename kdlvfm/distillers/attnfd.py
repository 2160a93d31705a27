# SPDX-License-Identifier: Apache-2.0
"""AttnFD: maps that attention has refined agree in direction, each taken as one long vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features
from kdlvfm.core.align import Resize, check_levels, match_size, promote, unit_vectors
from kdlvfm.core.aligner import Target, Targets

LEVELS = ("map.-3", "map.-2", "map.-1")


def attnfd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared distance of two refined maps, each divided by its norm over the whole batch.

    .. math::
        L = \frac{1}{B} \sum \Big(\frac{A_S}{\|A_S\|} - \frac{A_T}{\|A_T\|}\Big)^2
          = \frac{2}{B} \big(1 - \cos(A_S, A_T)\big)

    The norm is that of all B C H W elements together, as in the authors' code: a positive scale of either side changes
    nothing, a sample or channel of large values weighs more than another.

    Args:
        student: (B, C, H, W): one level of the student, refined and projected.
        teacher: (B, C, H, W): the same level of the teacher, refined; receives no gradient.

    Returns:
        A scalar from 0 to 4 / B: the sum over elements, divided by the batch size.

    Raises:
        ValueError: the shapes differ.

    Source:
        Mansourian et al., "Attention-guided Feature Distillation for Semantic Segmentation", 2024.

    Example:
        >>> x = torch.rand(2, 3, 4, 4)
        >>> round(attnfd_loss(-x, x).item(), 4)
        2.0
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"features must have one shape, not {tuple(student.shape)} (student) and {tuple(teacher.shape)} (teacher)."
        )
    first, second = (unit_vectors(promote(x).flatten(), dim=0) for x in (student, teacher.detach()))
    return F.mse_loss(first, second, reduction="sum") / student.shape[0]


def refine(x: Tensor) -> Tensor:
    r"""Channel attention, then spatial attention, both without parameters: what the teacher's maps go through.

    .. math::
        x' = x \, \sigmaig(\mathrm{mean}_i\, x + \max_i xig), \quad
        x'' = x' \, \sigmaig(\mathrm{mean}_c\, x' + \max_c x'ig)

    with i over positions and c over channels.

    Args:
        x: (B, C, H, W); so is the result.
    """
    x = x * torch.sigmoid(x.mean((2, 3), keepdim=True) + x.amax((2, 3), keepdim=True))
    return x * torch.sigmoid(x.mean(1, keepdim=True) + x.amax(1, keepdim=True))


class CBAM(nn.Module):
    """Channel attention, then spatial attention, both learned: what the student's maps go through.

    Woo et al., "CBAM: Convolutional Block Attention Module", ECCV 2018.

    Args:
        dim: channels.
        reduction: the perceptron of the channel attention has `dim / reduction` hidden units, at least one; 16 is the
            paper's value.
    """

    def __init__(self, dim: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(dim // reduction, 1)
        self.channel = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.spatial = nn.Sequential(nn.Conv2d(2, 1, kernel_size=7, padding=3, bias=False), nn.BatchNorm2d(1))

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) to the same shape."""
        gate = self.channel(x.mean((2, 3))) + self.channel(x.amax((2, 3)))
        x = x * torch.sigmoid(gate)[:, :, None, None]
        pooled = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.spatial(pooled))


class AttnFD(Distiller):
    """Directions of refined maps at several levels; the terms of all levels are added.

    The student's map goes through CBAM, a 1x1 convolution without bias and batch normalisation, the teacher's through
    the same attention without parameters. In the authors' code CBAM is part of the student network, as a side branch;
    here it is part of the distiller, and never ships.

    Args:
        student_dims: channels of the student's maps.
        teacher_dims: channels of the teacher's maps.
        loss_weight: weight of the term; 2 in the paper, for every level.
        student_taps: the student's maps. The paper's levels are the last map of the backbone, the output of ASPP and
            the decoder's, in both networks; the default, fit for a teacher without a decoder, is ours.
        teacher_taps: the teacher's maps, one for each of the student's. All maps of a ViT are of one stride: any will
            do, and one may be named several times.
        resize: who is resized where the refined maps differ in size, see `kdlvfm.core.align.match_size`. The authors'
            maps are of one size.
        target: the teacher's features as they are (`"raw"`, the paper) or normalised, before they are refined. The
            default is ours: a ViT's few channels of very large norm would otherwise give the direction alone.

    Example:
        >>> attnfd = AttnFD([64, 128], [96, 96], student_taps=["map.1", "map.2"], teacher_taps=["map.5", "map.11"])
        >>> student = {"map.1": torch.rand(2, 64, 8, 8), "map.2": torch.rand(2, 128, 4, 4)}
        >>> teacher = {"map.5": torch.rand(2, 96, 4, 4), "map.11": torch.rand(2, 96, 4, 4)}
        >>> list(attnfd(student, teacher))
        ['attnfd']
    """

    def __init__(
        self,
        student_dims: Sequence[int],
        teacher_dims: Sequence[int],
        *,
        loss_weight: float = 2.0,
        student_taps: Sequence[str] = LEVELS,
        teacher_taps: Sequence[str] = LEVELS,
        resize: Resize = "larger",
        target: Target = "standardize",
    ) -> None:
        super().__init__()
        check_levels(
            student_dims=student_dims, teacher_dims=teacher_dims, student_taps=student_taps, teacher_taps=teacher_taps
        )
        self.student_taps, self.teacher_taps = tuple(student_taps), tuple(teacher_taps)
        self.loss_weight = loss_weight
        self.resize = resize
        self.targets = nn.ModuleList(Targets(dim, target) for dim in teacher_dims)
        self.projectors = nn.ModuleList(
            nn.Sequential(
                CBAM(student_dim),
                nn.Conv2d(student_dim, teacher_dim, kernel_size=1, bias=False),
                nn.BatchNorm2d(teacher_dim),
            )
            for student_dim, teacher_dim in zip(student_dims, teacher_dims, strict=True)
        )

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """Reads all channel counts from the taps."""
        return cls(**context.level_dims(cls, hparams), **hparams)

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The term `attnfd`, the sum over levels."""
        del target
        losses = []
        for student_tap, teacher_tap, projector, targets in zip(
            self.student_taps, self.teacher_taps, self.projectors, self.targets, strict=True
        ):
            projected = promote(projector(student[student_tap]))
            goal = refine(targets(teacher[teacher_tap]))
            losses.append(attnfd_loss(*match_size(projected, goal, self.resize)))
        return {"attnfd": self.loss_weight * torch.stack(losses).sum()}
