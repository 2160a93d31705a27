# SPDX-License-Identifier: Apache-2.0
"""Pairwise: the similarities between all positions of an image follow those of the teacher (SKDS)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from kdlvfm.core import Distiller, Features
from kdlvfm.core.align import (
    Resize,
    TargetNorm,
    gram_distance,
    match_size,
    normalise_target,
    promote,
    unit_vectors,
)


def pairwise_loss(student: Tensor, teacher: Tensor, pool: int | float | None = None) -> Tensor:
    r"""Mean squared difference of the cosine similarities between the positions of each image.

    .. math::
        L = \frac{1}{B M^2} \sum_b \sum_{i,j} \big(a^S_{ij} - a^T_{ij}\big)^2, \quad
        a_{ij} = \frac{f_i^\top f_j}{\lVert f_i \rVert \, \lVert f_j \rVert}

    over the M positions of the map, or of the pooled map. The M x M matrices are formed only where M is smaller than
    the number of channels; otherwise the distance comes from products of channels. The channels of the two networks
    need not agree. The authors' code holds the norms constant in the backward pass; here the gradient is that of the
    equation.

    Args:
        student: (B, C_S, H, W).
        teacher: (B, C_T, H, W); receives no gradient.
        pool: `None` compares single positions. An integer is the side of max-pooling windows: 2 in CIRKD's code. A
            float is that side as a share of H and W: 0.5, four nodes an image, in the authors' code.

    Returns:
        A scalar: the mean over samples and pairs of positions.

    Raises:
        ValueError: the maps differ in batch or size, or `pool` is not positive.

    Source:
        The pair-wise term of Liu et al., "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019.

    Example:
        >>> import torch
        >>> student = torch.eye(2).view(1, 2, 1, 2)
        >>> round(pairwise_loss(student, torch.ones(1, 3, 1, 2)).item(), 6)
        0.5
    """
    if student.dim() != 4 or (student.shape[0], *student.shape[2:]) != (teacher.shape[0], *teacher.shape[2:]):
        raise ValueError(
            f"maps (B, C, H, W) must agree in B, H and W, not {tuple(student.shape)} (student) and "
            f"{tuple(teacher.shape)} (teacher)."
        )
    first, second = (_nodes(promote(x), pool) for x in (student, teacher.detach()))
    return gram_distance(first, second)


def _nodes(x: Tensor, pool: int | float | None) -> Tensor:
    """Unit vectors (B, M, C) of the positions left by max pooling."""
    if pool is not None:
        if pool <= 0:
            raise ValueError(f"pool must be positive or None, not {pool}.")
        height, width = (max(int(side * pool), 1) if isinstance(pool, float) else pool for side in x.shape[2:])
        x = F.max_pool2d(x, (height, width), ceil_mode=True)
    return unit_vectors(x).flatten(2).transpose(1, 2)


class Pairwise(Distiller):
    """Pair-wise similarities between positions. There is nothing to project and nothing else to train.

    The pixel-wise term of the paper is `KD`; its holistic term, a discriminator, is not part of this class.

    Args:
        loss_weight: weight of the term: 10 in CIRKD's code, 1 in the authors'.
        pool: see `pairwise_loss`. The published code pools to save memory, which is not needed here, and a maximum
            over the signed features of a ViT means little, so by default there is no pooling.
        student_tap: the student's map.
        teacher_tap: the teacher's map.
        resize: who is resized where the maps differ in size, see `kdlvfm.core.align.match_size`.
        target: the teacher's features as they are (`"raw"`, the paper) or normalised, which keeps the few channels of
            very large norm in a ViT from deciding all cosines; see `kdlvfm.core.align.normalise_target`.

    Example:
        >>> import torch
        >>> terms = Pairwise()({"map.-1": torch.rand(2, 64, 4, 4)}, {"map.-1": torch.rand(2, 192, 8, 8)})
        >>> list(terms)
        ['pairwise']
    """

    def __init__(
        self,
        *,
        loss_weight: float = 10.0,
        pool: int | float | None = None,
        student_tap: str = "map.-1",
        teacher_tap: str = "map.-1",
        resize: Resize = "larger",
        target: TargetNorm = "raw",
    ) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.loss_weight = loss_weight
        self.pool = pool
        self.resize = resize
        self.target = target

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The term `pairwise`."""
        del target
        goal = normalise_target(promote(teacher[self.teacher_taps[0]]), self.target)
        first, second = match_size(promote(student[self.student_taps[0]]), goal, self.resize)
        return {"pairwise": self.loss_weight * pairwise_loss(first, second, self.pool)}
