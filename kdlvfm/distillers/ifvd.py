# SPDX-License-Identifier: Apache-2.0
"""IFVD: how alike a pixel and the prototype of its class are in the student follows the teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features
from kdlvfm.core.align import (
    Resize,
    TargetNorm,
    class_masks,
    match_size,
    normalise_target,
    promote,
    unit_vectors,
)


def ifvd_loss(
    student: Tensor, teacher: Tensor, target: Tensor, num_classes: int, ignore_index: int | None = 255
) -> Tensor:
    r"""Mean squared difference of intra-class feature variation.

    .. math::
        L = \frac{1}{|V|} \sum_{v \in V} \big(\cos(f^S_v, p^S_{y_v}) - \cos(f^T_v, p^T_{y_v})\big)^2

    where V are the labelled pixels and :math:`p_k` is the mean feature vector of class k in the pixel's own image and
    network, so the channels of the two networks need not agree. The authors' code divides by all pixels, of which those
    without a label contribute 0. The gradient flows through the prototypes too, as it does there.

    Args:
        student: (B, C_S, H, W).
        teacher: (B, C_T, H, W); receives no gradient.
        target: (B, H', W') labels, resized to the maps' grid by nearest neighbour; void pixels (`ignore_index`) and
            unlabelled ones (negative) are left out.
        num_classes: classes of the task.
        ignore_index: label of void pixels; `None` if there is none.

    Returns:
        A scalar: the mean over labelled pixels, 0 if there are none.

    Raises:
        ValueError: the maps differ in batch or size, or the target is of another batch.

    Source:
        Wang et al., "Intra-class Feature Variation Distillation for Semantic Segmentation", ECCV 2020.

    Example:
        >>> student = torch.eye(2).view(1, 2, 1, 2)
        >>> round(ifvd_loss(student, torch.ones(1, 3, 1, 2), torch.tensor([[[0, 0]]]), num_classes=1).item(), 6)
        0.085786
    """
    if (student.shape[0], *student.shape[2:]) != (teacher.shape[0], *teacher.shape[2:]) or len(target) != len(student):
        raise ValueError(
            f"maps (B, C, H, W) must agree in B, H and W, not {tuple(student.shape)} (student) and "
            f"{tuple(teacher.shape)} (teacher), and with the B of target {tuple(target.shape)}."
        )
    masks = class_masks(target, num_classes, student.shape[2:], ignore_index).flatten(2)
    student, teacher = promote(student), promote(teacher.detach())
    difference = _variation(student, masks) - _variation(teacher, masks)
    return difference.square().sum() / masks.sum().clamp(min=1)


def _variation(features: Tensor, masks: Tensor) -> Tensor:
    """Cosine (B, M) of each pixel of (B, C, H, W) to its class's mean, 0 where it has no class in (B, K, M)."""
    vectors, weights = features.flatten(2), masks.to(features.dtype)
    with torch.autocast(features.device.type, enabled=False):
        prototypes = weights @ vectors.mT / weights.sum(dim=2, keepdim=True).clamp(min=1)
        cosines = unit_vectors(prototypes, dim=2) @ unit_vectors(vectors)
    return (cosines * weights).sum(dim=1)


class IFVD(Distiller):
    """Intra-class feature variation. There is nothing to project and nothing else to train.

    Args:
        num_classes: classes of the task.
        loss_weight: weight of the term: 20 in CIRKD's re-run; 200 in the authors' code, beside other terms.
        ignore_index: label of void pixels; `None` if there is none.
        student_tap: the student's map.
        teacher_tap: the teacher's map.
        resize: who is resized where the maps differ in size, see `kdlvfm.core.align.match_size`.
        target: the teacher's features as they are (`"raw"`, the paper) or normalised, which keeps the few channels of
            very large norm in a ViT from deciding all cosines; see `kdlvfm.core.align.normalise_target`.

    Example:
        >>> ifvd = IFVD(num_classes=3)
        >>> labels = torch.randint(0, 3, (2, 32, 32))
        >>> list(ifvd({"map.-1": torch.rand(2, 64, 4, 4)}, {"map.-1": torch.rand(2, 192, 8, 8)}, labels))
        ['ifvd']
    """

    needs_truth = True

    def __init__(
        self,
        num_classes: int,
        *,
        loss_weight: float = 20.0,
        ignore_index: int | None = 255,
        student_tap: str = "map.-1",
        teacher_tap: str = "map.-1",
        resize: Resize = "larger",
        target: TargetNorm = "raw",
    ) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.num_classes = num_classes
        self.loss_weight = loss_weight
        self.ignore_index = ignore_index
        self.resize = resize
        self.target = target

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """Reads the number of classes from the task."""
        return cls(**{"num_classes": context.num_classes, **hparams})

    def forward(self, student: Features, teacher: Features, target: Tensor | None = None) -> dict[str, Tensor]:
        """The term `ifvd`; `target` (B, H, W) holds the labels."""
        if target is None:
            raise ValueError("IFVD compares pixels to their class and needs labels: pass target (B, H, W).")
        goal = normalise_target(promote(teacher[self.teacher_taps[0]]), self.target)
        first, second = match_size(promote(student[self.student_taps[0]]), goal, self.resize)
        return {"ifvd": self.loss_weight * ifvd_loss(first, second, target, self.num_classes, self.ignore_index)}
