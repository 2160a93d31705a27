# SPDX-License-Identifier: Apache-2.0
"""ReviewKD: each level of the student, joined with all deeper ones, regresses the teacher's map at several scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features
from kdlvfm.core.align import Resize, check_levels, match_size, promote
from kdlvfm.core.aligner import Target, Targets

LEVELS = ("map.-3", "map.-2", "map.-1")


def hcl_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Hierarchical context loss: squared error at full size and of the means over 4x4, 2x2 and 1x1 fields.

    .. math::
        L = \frac{\sum_k 2^{-k} \, \mathrm{mean}\big((\mathrm{pool}_k F_S - \mathrm{pool}_k F_T)^2\big)}
                 {\sum_k 2^{-k}}

    with k = 0 for the full size and k = 1, 2, 3 for the fields, which `adaptive_avg_pool2d` makes. As in the authors'
    code, a number of fields that is not below the height of the map is passed over, and k counts what is left.

    Args:
        student: (B, C, H, W): one level of the student, fused and with the teacher's channels.
        teacher: (B, C, H, W): the same level of the teacher; receives no gradient.

    Returns:
        A scalar: a weighted mean of means over all elements.

    Raises:
        ValueError: the shapes differ.

    Source:
        Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021.

    Example:
        >>> hcl_loss(torch.zeros(1, 2, 8, 8), torch.full((1, 2, 8, 8), 3.0)).item()
        9.0
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"features must have one shape, not {tuple(student.shape)} (student) and {tuple(teacher.shape)} (teacher)."
        )
    student, teacher = promote(student), promote(teacher.detach())
    scales = [F.mse_loss(student, teacher)]
    for size in (4, 2, 1):
        if size < student.shape[2]:
            scales.append(F.mse_loss(F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)))
    weights = [2.0**-k for k in range(len(scales))]
    errors = [weight * scale for weight, scale in zip(weights, scales, strict=True)]
    return torch.stack(errors).sum() / sum(weights)


class ABF(nn.Module):
    """Attention-based fusion: two gates at each position weigh one level of the student and what the deeper hand on.

    Args:
        dim: channels of both.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gates = nn.Sequential(nn.Conv2d(2 * dim, 2, kernel_size=1), nn.Sigmoid())

    def forward(self, x: Tensor, deeper: Tensor) -> Tensor:
        """The fused map, (B, C, H, W), from this level's, (B, C, H, W), and the deeper levels', of any size."""
        deeper = F.interpolate(deeper, x.shape[-2:], mode="nearest")
        gates = self.gates(torch.cat([x, deeper], dim=1))
        fused: Tensor = x * gates[:, :1] + deeper * gates[:, 1:]
        return fused


def _convolution(in_dim: int, out_dim: int, size: int) -> nn.Sequential:
    """Convolution, initialised as in the authors' code, and batch normalisation."""
    convolution = nn.Conv2d(in_dim, out_dim, size, padding=size // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_dim))


class ReviewKD(Distiller):
    """Feature regression at several levels, each of which reviews the deeper ones; the terms of all are added.

    The authors raise the weight over the first 20 epochs on CIFAR-100; here it is constant.

    Args:
        student_dims: channels of the student's maps.
        teacher_dims: channels of the teacher's maps.
        loss_weight: weight of the term. In the authors' code 1.2 for a ResNet18 detector, 0.6 to 8 on CIFAR-100.
        hidden_dim: channels in which levels are fused; `None` takes those of the student's deepest map, at most 512, as
            the authors do.
        student_taps: the student's maps, from shallow to deep. The authors take all stages, for classifiers the pooled
            features too; the default is ours.
        teacher_taps: the teacher's maps, one for each of the student's. All maps of a ViT are of one stride: any will
            do, and one may be named several times.
        resize: who is resized where a fused map and the teacher's differ in size, see `kdlvfm.core.align.match_size`.
            The authors resize the student's, to the nearest position instead of bilinearly.
        target: the teacher's features as they are (`"raw"`, the paper) or normalised. The default is ours: a ViT's few
            channels of very large norm would otherwise dominate.

    Example:
        >>> review = ReviewKD([64, 128], [96, 96], student_taps=["map.1", "map.2"], teacher_taps=["map.5", "map.11"])
        >>> student = {"map.1": torch.rand(2, 64, 8, 8), "map.2": torch.rand(2, 128, 4, 4)}
        >>> teacher = {"map.5": torch.rand(2, 96, 4, 4), "map.11": torch.rand(2, 96, 4, 4)}
        >>> list(review(student, teacher))
        ['review_kd']
    """

    def __init__(
        self,
        student_dims: Sequence[int],
        teacher_dims: Sequence[int],
        *,
        loss_weight: float = 1.2,
        hidden_dim: int | None = None,
        student_taps: Sequence[str] = LEVELS,
        teacher_taps: Sequence[str] = LEVELS,
        resize: Resize = "student",
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
        hidden = min(student_dims[-1], 512) if hidden_dim is None else hidden_dim
        self.entries = nn.ModuleList(_convolution(dim, hidden, 1) for dim in student_dims)
        self.fusions = nn.ModuleList(ABF(hidden) for _ in student_dims[1:])
        self.projectors = nn.ModuleList(_convolution(hidden, dim, 3) for dim in teacher_dims)

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """Reads all channel counts from the taps."""
        return cls(**context.level_dims(cls, hparams), **hparams)

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The term `review_kd`, the sum over levels."""
        del target
        losses: list[Tensor] = []
        fused: Tensor | None = None
        for level in reversed(range(len(self.student_taps))):
            entered = self.entries[level](student[self.student_taps[level]])
            fused = entered if fused is None else self.fusions[level](entered, fused)
            goal = self.targets[level](teacher[self.teacher_taps[level]])
            resized, goal = match_size(promote(fused), goal, self.resize)
            losses.append(hcl_loss(self.projectors[level](resized), goal))
        return {"review_kd": self.loss_weight * torch.stack(losses).sum()}
