# SPDX-License-Identifier: Apache-2.0
"""I2CKD: class prototypes of the student go to the teacher's of the same class, and away from those of the others."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features
from kdlvfm.core.align import Resize, class_means, unit_vectors
from kdlvfm.core.aligner import Aligner, Target
from kdlvfm.core.distributed import gather_batch
from kdlvfm.core.projectors import Projector

Distance = Literal["l2", "squared", "cosine"]
Network = Literal["student", "teacher"]
Reduction = Literal["mean", "sum", "hardest"]
Scope = Literal["batch", "image"]


def class_prototypes(
    features: Tensor, target: Tensor, num_classes: int, ignore_index: int | None = 255
) -> tuple[Tensor, Tensor]:
    """The mean feature vector of each class over the whole batch.

    Args:
        features: (B, C, H, W).
        target: (B, H', W') labels, resized to the features' grid by nearest neighbour; void pixels (`ignore_index`)
            and unlabelled ones (negative) are left out.
        num_classes: K.
        ignore_index: label of void pixels; `None` if there is none.

    Returns:
        Prototypes (K, C), zero for a class that is absent, and which classes are present, (K,) booleans.
    """
    means, present = class_means(features, target, num_classes, ignore_index)
    return means[0], present[0]


def i2ckd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    num_classes: int,
    margin: float = 1.0,
    ignore_index: int | None = 255,
    *,
    distance: Distance = "l2",
    anchor: Network = "student",
    negatives: Network = "teacher",
    reduction: Reduction = "mean",
    prototypes: Scope = "batch",
    normalise: bool = False,
) -> Tensor:
    r"""Triplet loss on class prototypes, with every pair of present classes.

    .. math::
        L = \operatorname{mean}_{k \ne j} \max\big(0, d(p^S_k, p^T_k) - d(p^S_k, p^T_j) + m\big)

    The paper states prototypes of intermediate features and a triplet loss between those of teacher and student. Its
    full text and code were not at hand: distance, margin, reduction and all other choices here are ours.

    Args:
        student: (B, C, H, W), already projected to the teacher's channels.
        teacher: (B, C, H', W'); receives no gradient.
        target: (B, H'', W'') labels, see `class_prototypes`.
        num_classes: K.
        margin: m.
        ignore_index: label of void pixels; `None` if there is none.
        distance: d: Euclidean, its square, or one minus the cosine.
        anchor: whose prototype is the anchor; the other network's of the same class is the positive.
        negatives: whose prototypes of the other classes are the negatives.
        reduction: `"mean"` or `"sum"` over all pairs of classes, or `"hardest"`: the mean over classes of the largest.
        prototypes: one of each class in the whole batch, or one in each image, averaged over images with two classes.
        normalise: bring prototypes to length 1 first.

    Returns:
        A scalar; 0 where fewer than two classes are present.

    Raises:
        ValueError: batch or channels differ, the target is of another batch, or an option is none of those listed.

    Source:
        After Karine et al., "I2CKD: Intra- and Inter-Class Knowledge Distillation for Semantic Segmentation", 2024
        (Neurocomputing 2025).

    Example:
        >>> student, teacher = torch.tensor([0.0, 3.0]).view(1, 1, 1, 2), torch.tensor([1.0, 3.5]).view(1, 1, 1, 2)
        >>> i2ckd_loss(student, teacher, torch.tensor([[[0, 1]]]), num_classes=2, margin=3.0).item()
        1.0
    """
    if student.dim() != 4 or student.shape[:2] != teacher.shape[:2] or len(target) != len(student):
        raise ValueError(
            f"maps (B, C, H, W) must agree in B and C, not {tuple(student.shape)} (student) and "
            f"{tuple(teacher.shape)} (teacher), and with the B of target {tuple(target.shape)}."
        )
    for name, value, choices in (
        ("distance", distance, Distance),
        ("anchor", anchor, Network),
        ("negatives", negatives, Network),
        ("reduction", reduction, Reduction),
        ("prototypes", prototypes, Scope),
    ):
        if value not in get_args(choices):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, not {value!r}.")
    teacher = teacher.detach()
    losses, counts = [], []
    of_student, of_teacher = (
        class_means(x, target, num_classes, ignore_index, of_images=prototypes == "image") for x in (student, teacher)
    )
    for own, present, goal, seen in zip(*of_student, *of_teacher, strict=True):
        # Each network on its own grid; a class that only one of them sees there makes no triplet.
        if normalise:
            own, goal = unit_vectors(own), unit_vectors(goal)
        first, second = (own, goal) if anchor == "student" else (goal, own)
        attract = _distances(first, second, distance).diagonal().unsqueeze(1)
        repel = _distances(first, own if negatives == "student" else goal, distance)
        valid = (present & seen).unsqueeze(1) & (present & seen) & ~torch.eye(len(own), dtype=torch.bool).to(own.device)
        hinge = (attract - repel + margin).relu() * valid
        if reduction == "hardest":
            hinge, valid = hinge.amax(dim=1), valid.any(dim=1)
        counts.append(valid.sum())
        losses.append(hinge.sum() if reduction == "sum" else hinge.sum() / counts[-1].clamp(min=1))
    return torch.stack(losses).sum() / (torch.stack(counts) > 0).sum().clamp(min=1)


def _distances(x: Tensor, y: Tensor, distance: Distance) -> Tensor:
    """Between each row of x (K, C) and each of y (K, C)."""
    if distance == "cosine":
        with torch.autocast(x.device.type, enabled=False):
            return 1 - unit_vectors(x) @ unit_vectors(y).mT
    if distance == "squared":
        return (x.unsqueeze(1) - y).square().sum(dim=2)
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


class I2CKD(Distiller):
    """Class prototypes in the teacher's feature space.

    Args:
        student_dim: channels of the student's map.
        teacher_dim: channels of the teacher's map.
        num_classes: classes of the task.
        loss_weight: weight of the term; 1 is ours, the paper's is not known to us.
        margin: see `i2ckd_loss`.
        ignore_index: label of void pixels; `None` if there is none.
        distance: see `i2ckd_loss`.
        anchor: see `i2ckd_loss`.
        negatives: see `i2ckd_loss`.
        reduction: see `i2ckd_loss`.
        prototypes: see `i2ckd_loss`.
        normalise: bring prototypes to length 1 first. On by default, since the norms of a ViT's features would
            otherwise set the scale against which the margin is measured.
        student_tap: the student's map.
        teacher_tap: the teacher's map.
        projector: what brings the student's channels to the teacher's, see `kdlvfm.core.projectors.build_projector`; by
            default a 1x1 convolution where they differ.
        resize: who is resized where the maps differ in size, see `kdlvfm.core.align.match_size`.
        target: the teacher's features as they are, or normalised; see `kdlvfm.core.aligner.Targets`.
        gather: prototypes over the batches of all processes; by default each process has its own.

    Example:
        >>> i2ckd = I2CKD(student_dim=64, teacher_dim=192, num_classes=3)
        >>> target = torch.randint(0, 3, (2, 32, 32))
        >>> list(i2ckd({"map.-1": torch.rand(2, 64, 4, 4)}, {"map.-1": torch.rand(2, 192, 8, 8)}, target))
        ['i2ckd']
    """

    needs_truth = True

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        num_classes: int,
        *,
        loss_weight: float = 1.0,
        margin: float = 1.0,
        ignore_index: int | None = 255,
        distance: Distance = "l2",
        anchor: Network = "student",
        negatives: Network = "teacher",
        reduction: Reduction = "mean",
        prototypes: Scope = "batch",
        normalise: bool = True,
        student_tap: str = "map.-1",
        teacher_tap: str = "map.-1",
        projector: Projector | None = None,
        resize: Resize = "larger",
        target: Target = "raw",
        gather: bool = False,
    ) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.num_classes = num_classes
        self.loss_weight = loss_weight
        self.margin = margin
        self.ignore_index = ignore_index
        self.distance: Distance = distance
        self.anchor: Network = anchor
        self.negatives: Network = negatives
        self.reduction: Reduction = reduction
        self.prototypes: Scope = prototypes
        self.normalise = normalise
        self.gather = gather
        self.align = Aligner(student_dim, teacher_dim, projector=projector, resize=resize, target=target)

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """Reads both channel counts from the taps and the number of classes from the task."""
        return cls(**{"num_classes": context.num_classes, **context.tap_dims(cls, hparams), **hparams})

    def forward(self, student: Features, teacher: Features, target: Tensor | None = None) -> dict[str, Tensor]:
        """The term `i2ckd`; `target` (B, H, W) holds the labels."""
        if target is None:
            raise ValueError("I2CKD makes prototypes of classes and needs labels: pass target (B, H, W).")
        first, second = student[self.student_taps[0]], teacher[self.teacher_taps[0]].detach()
        if self.gather:
            first, second, target = gather_batch(first), gather_batch(second), gather_batch(target)
        projected, goal = self.align(first, second)
        loss = i2ckd_loss(
            projected,
            goal,
            target,
            self.num_classes,
            self.margin,
            self.ignore_index,
            distance=self.distance,
            anchor=self.anchor,
            negatives=self.negatives,
            reduction=self.reduction,
            prototypes=self.prototypes,
            normalise=self.normalise,
        )
        return {"i2ckd": self.loss_weight * loss}
