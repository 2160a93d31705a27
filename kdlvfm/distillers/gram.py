# SPDX-License-Identifier: Apache-2.0
"""Gram: the Gram matrix of the student's patch features is anchored to the teacher's."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

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
from kdlvfm.core.distributed import gather_batch

Scope = Literal["image", "batch"]


def gram_loss(student: Tensor, teacher: Tensor, *, scope: Scope = "image") -> Tensor:
    r"""Mean squared difference of the Gram matrices of L2-normalised patch features.

    .. math:: L = \frac{1}{N^2} \big\lVert X_S X_S^\top - X_T X_T^\top \big\rVert_F^2

    where the N rows of X are the unit feature vectors of all patches of an image, and L is averaged over images. The
    paper writes the sum; the authors' code takes the mean, as here. It is the quantity of `pairwise_loss` without
    pooling, from a recipe of its own. With more patches than channels the N x N matrices are never formed. The channels
    of the two networks need not agree.

    Args:
        student: (B, C_S, H, W).
        teacher: (B, C_T, H, W); receives no gradient.
        scope: whose patches are compared: of one `"image"` at a time, as in the published run, or of the whole
            `"batch"`, which the authors' code offers too.

    Returns:
        A scalar: the mean over samples and pairs of patches.

    Raises:
        ValueError: the maps differ in batch or size, or `scope` is neither.

    Source:
        Gram anchoring in Siméoni et al., "DINOv3", 2025.

    Example:
        >>> import torch
        >>> student = torch.eye(2).view(1, 2, 1, 2)
        >>> round(gram_loss(student, torch.ones(1, 3, 1, 2)).item(), 6)
        0.5
    """
    if student.dim() != 4 or (student.shape[0], *student.shape[2:]) != (teacher.shape[0], *teacher.shape[2:]):
        raise ValueError(
            f"maps (B, C, H, W) must agree in B, H and W, not {tuple(student.shape)} (student) and "
            f"{tuple(teacher.shape)} (teacher)."
        )
    if scope not in ("image", "batch"):
        raise ValueError(f"scope must be 'image' or 'batch', not {scope!r}.")
    first, second = (unit_vectors(promote(x)).flatten(2).transpose(1, 2) for x in (student, teacher.detach()))
    if scope == "batch":
        first, second = (x.flatten(0, 1).unsqueeze(0) for x in (first, second))
    return gram_distance(first, second)


class Gram(Distiller):
    """Gram anchoring to another network. There is nothing to project and nothing else to train.

    DINOv3 anchors a network to an earlier state of itself, seen at twice the resolution and resized to its own grid. To
    do the same here, give the teacher a larger `input_size` and set `resize="teacher"`.

    Args:
        loss_weight: weight of the term; 2 in the published run.
        scope: see `gram_loss`.
        student_tap: the student's map.
        teacher_tap: the teacher's map.
        resize: who is resized where the maps differ in size, see `kdlvfm.core.align.match_size`.
        target: the teacher's features as they are (`"raw"`, the paper) or normalised, which keeps the few channels of
            very large norm in a ViT from deciding all cosines; see `kdlvfm.core.align.normalise_target`.
        gather: with `scope="batch"`, compare the patches of all processes too.

    Example:
        >>> import torch
        >>> terms = Gram()({"map.-1": torch.rand(2, 64, 4, 4)}, {"map.-1": torch.rand(2, 192, 8, 8)})
        >>> list(terms)
        ['gram']
    """

    def __init__(
        self,
        *,
        loss_weight: float = 2.0,
        scope: Scope = "image",
        student_tap: str = "map.-1",
        teacher_tap: str = "map.-1",
        resize: Resize = "larger",
        target: TargetNorm = "raw",
        gather: bool = False,
    ) -> None:
        super().__init__()
        if gather and scope != "batch":
            raise ValueError("gather=True compares patches of different processes, so it needs scope='batch'.")
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.loss_weight = loss_weight
        self.scope: Scope = scope
        self.resize = resize
        self.target = target
        self.gather = gather

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The term `gram`."""
        del target
        first, second = promote(student[self.student_taps[0]]), promote(teacher[self.teacher_taps[0]].detach())
        if self.gather:
            first, second = gather_batch(first), gather_batch(second)
        pair = match_size(first, normalise_target(second, self.target), self.resize)
        return {"gram": self.loss_weight * gram_loss(*pair, scope=self.scope)}
