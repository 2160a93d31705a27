# SPDX-License-Identifier: Apache-2.0
"""SP: images that are alike to the teacher are alike to the student."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlvfm.core import Distiller, Features
from kdlvfm.core.align import promote, standardise
from kdlvfm.core.distributed import gather_batch
from kdlvfm.core.similarity import scaled_product


def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared distance between the two networks' similarities of the samples of a batch.

    .. math::
        L = \frac{1}{B^2} \big\| \bar{G}_S - \bar{G}_T \big\|_F^2, \quad G = F F^\top, \quad
        \bar{G}_{i,:} = \frac{G_{i,:}}{\|G_{i,:}\|_2}

    with F the features as a matrix of B rows. The scale and any rotation of either side change nothing. A batch of one
    has no similarities: the loss is 0. It can be differentiated once.

    Args:
        student: (B, ...), for example (B, D) or (B, C_S, H, W).
        teacher: (B, ...); channels and size may differ from the student's; receives no gradient.

    Returns:
        A scalar: the sum over pairs divided by their number, at most 4 / B.

    Raises:
        ValueError: the batches differ.

    Source:
        Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019.

    Example:
        >>> import torch
        >>> student, teacher = torch.eye(2), torch.ones(2, 3)
        >>> round(sp_loss(student, teacher).item(), 6)
        0.292893
    """
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"both must hold one batch, not {student.shape[0]} samples (student) and {teacher.shape[0]} (teacher)."
        )
    difference = _similarity(promote(student)) - _similarity(promote(teacher.detach()))
    return difference.square().mean()


def _similarity(x: Tensor) -> Tensor:
    """Inner products of all pairs of samples, (B, B), each row of unit length."""
    flat = x.flatten(1)
    # One scale for the batch cancels; taken out first, and so without a gradient, squares of squares stay in range.
    least, most = flat.detach().aminmax()
    peak = torch.maximum(-least, most)
    scale = peak.reciprocal().masked_fill(peak < torch.finfo(x.dtype).tiny, 0)
    # Autocast would multiply in half precision, whose sums over all channels and positions lose the small differences.
    with torch.autocast(x.device.type, enabled=False):
        return F.normalize(scaled_product(flat, scale), dim=1)


class SP(Distiller):
    """Similarity-preserving distillation: relations between images, so no projector and no common size.

    Args:
        loss_weight: weight of the term. 3000 is the paper's, for the large batches of CIFAR; the loss is about as
            small as its batch is large, so that an eighth of the images calls for about an eighth of the weight.
        student_tap: the student's features.
        teacher_tap: the teacher's features.
        standardize: bring each channel of both to zero mean and unit variance over batch and positions first. Not in
            the paper (`False`); the few channels of very large norm in a ViT otherwise make all images alike.
        gather: compare the images of all processes, whose batches must be of one size. The paper's code compares those
            of one GPU (`False`).

    Example:
        >>> import torch
        >>> terms = SP()({"map.-1": torch.rand(4, 16, 4, 4)}, {"map.-1": torch.rand(4, 12, 8, 8)})
        >>> list(terms)
        ['similarity_preserving']
    """

    def __init__(
        self,
        *,
        loss_weight: float = 3000.0,
        student_tap: str = "map.-1",
        teacher_tap: str = "map.-1",
        standardize: bool = True,
        gather: bool = False,
    ) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.loss_weight = loss_weight
        self.standardize = standardize
        self.gather = gather

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The term `similarity_preserving`."""
        del target
        pair = promote(student[self.student_taps[0]]), promote(teacher[self.teacher_taps[0]].detach())
        if self.gather:
            pair = gather_batch(pair[0]), gather_batch(pair[1])
        if self.standardize:
            pair = standardise(pair[0]), standardise(pair[1])
        return {"similarity_preserving": self.loss_weight * sp_loss(*pair)}
