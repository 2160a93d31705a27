# SPDX-License-Identifier: Apache-2.0
"""CrossKD: the student's features, half-way through its head, must mean to the teacher's head what its own do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features
from kdlvfm.core.align import align_scale, check_levels, match_size, promote
from kdlvfm.core.boxes import giou_of_distances
from kdlvfm.core.detector import boxes_per_position
from kdlvfm.core.features import level_taps
from kdlvfm.core.projectors import Projector, build_projector
from kdlvfm.core.split_head import HeadTails, split_head
from kdlvfm.distillers.score_kd import score_kd_loss


def crosskd_cls_loss(
    student: Tensor, teacher: Tensor, beta: float = 1.0, *, avg_factor: Tensor | None = None
) -> Tensor:
    r"""Binary cross-entropy to the teacher's class probabilities, weighted by how far off the student's are.

    .. math::
        L = \frac{1}{A} \sum_{i,k} |\sigma(z_S) - \sigma(z_T)|^\beta \,
            \mathrm{BCE}\big(\sigma(z_S), \sigma(z_T)\big)_{i,k}

    over positions i and classes k: the quality focal loss of Li et al. (2020) with the teacher for ground truth, as in
    `score_kd_loss`.

    Args:
        student: scores before the sigmoid, (B, K, H, W), that the teacher's head gave the student's features.
        teacher: (B, K, H, W), the teacher's own; receives no gradient.
        beta: β; 1 in the authors' code.
        avg_factor: A; `None` for the number of positions.

    Returns:
        A scalar, 0 where the probabilities are equal.

    Raises:
        ValueError: the shapes differ, or β is below 1, whose gradient has no bound.

    Source:
        Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", CVPR 2024.

    Example:
        >>> student, teacher = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 100.0)
        >>> round(crosskd_cls_loss(student, teacher).item(), 6)  # half of ln 2
        0.346574
    """
    return score_kd_loss(student, teacher, beta, avg_factor=avg_factor)


def crosskd_kl_loss(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    temperature: float = 1.0,
    *,
    avg_factor: Tensor | None = None,
) -> Tensor:
    r"""Kullback-Leibler divergence between the distributions of a box's sides, for heads such as GFL's.

    .. math::
        L = \frac{T^2}{A} \sum_i w_i \, \frac{1}{4} \sum_{e=1}^4
            \mathrm{KL}\big(\sigma(z_T^{i,e} / T) \,\|\, \sigma(z_S^{i,e} / T)\big)

    Args:
        student: (B, 4 (n + 1), H, W) that the teacher's head gave the student's features.
        teacher: (B, 4 (n + 1), H, W), the teacher's own; receives no gradient.
        weight: w, (B, H, W); receives no gradient.
        temperature: T; 1 in the authors' code.
        avg_factor: A; `None` for the number of positions.

    Returns:
        A scalar: the weighted sum over positions of the mean over sides, divided by A.

    Raises:
        ValueError: the shapes do not fit, or there are no distributions.

    Source:
        Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", CVPR 2024.

    Example:
        >>> student, teacher = torch.zeros(1, 8, 1, 1), torch.tensor([0.25, 0.75]).log().repeat(4).view(1, 8, 1, 1)
        >>> round(crosskd_kl_loss(student, teacher, torch.ones(1, 1, 1)).item(), 6)
        0.130812
    """
    _check(student, teacher, weight)
    if student.shape[1] % 4 or student.shape[1] < 8:
        raise ValueError(f"{student.shape[1]} channels are no distributions of four sides; GIoU is for plain numbers.")
    sides = [promote(x).reshape(len(x), 4, -1, *x.shape[2:]) for x in (student, teacher.detach())]
    if temperature != 1:  # a division copies both maps, a tenth of the whole
        sides = [x / temperature for x in sides]
    own, goal = (F.log_softmax(x, dim=2) for x in sides)
    divergence = F.kl_div(own, goal, log_target=True, reduction="none").sum(2).mean(1)
    total = temperature**2 * (divergence * weight.detach()).sum()
    return total / (weight.numel() if avg_factor is None else avg_factor)


def crosskd_giou_loss(student: Tensor, teacher: Tensor, weight: Tensor, *, avg_factor: Tensor | None = None) -> Tensor:
    r"""One minus the generalised IoU of two boxes around one position, for heads that predict distances.

    .. math:: L = \frac{1}{A} \sum_i w_i \Big(1 - \frac{|S \cap T|}{|S \cup T|} + \frac{|H| - |S \cup T|}{|H|}\Big)_i

    with boxes S and T and the smallest box H around both. The unit of length does not matter.

    Args:
        student: (B, 4, H, W), distances from the position to the left, top, right and bottom side, that the teacher's
            head gave the student's features.
        teacher: (B, 4, H, W), the teacher's own; receives no gradient.
        weight: w, (B, H, W); receives no gradient.
        avg_factor: A; `None` for the number of positions.

    Returns:
        A scalar: the weighted sum over positions divided by A.

    Raises:
        ValueError: the shapes do not fit.

    Source:
        Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", CVPR 2024.

    Example:
        >>> student, teacher = torch.ones(1, 4, 1, 1), torch.full((1, 4, 1, 1), 2.0)
        >>> crosskd_giou_loss(student, teacher, torch.ones(1, 1, 1)).item()
        0.75
    """
    _check(student, teacher, weight)
    if student.shape[1] != 4:
        raise ValueError(f"a box has four distances, not {student.shape[1]}; take KL for distributions.")
    loss = 1 - giou_of_distances(promote(student), promote(teacher.detach()))
    return (loss * weight.detach()).sum() / (weight.numel() if avg_factor is None else avg_factor)


def _check(student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"predictions must have one shape, not {tuple(student.shape)} (student) and {tuple(teacher.shape)} "
            "(teacher)."
        )
    if weight is not None and weight.shape != student[:, 0].shape:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit predictions {tuple(student.shape)}.")


class CrossKD(Distiller):
    """Cross-head distillation; the positions of all levels count together.

    At every level, for classes and for boxes, the student's map inside its head takes on the scale of the teacher's and
    goes through the rest of the teacher's head, which is frozen and lets gradients flow. What comes out is compared
    with the teacher's own predictions, while the student's are free to follow the ground truth. No labels are read.

    A position weighs, for boxes, as much as the teacher's highest class probability there, and the sum of these over
    the batch divides both terms. For classes the authors divide by the number of positions that the student's training
    calls positive instead; that the teacher says where objects are is ours.

    Args:
        tails: the rest of the teacher's head at each level. They are no sub-modules: neither trained nor saved here.
            They say how boxes are compared: distributions (GFL) by `crosskd_kl_loss`, others by `crosskd_giou_loss`.
        student_dim: channels of the student's head.
        teacher_dim: channels of the teacher's head.
        cls_weight: weight of the term for classes; 1 in the authors' code.
        reg_weight: weight of the term for boxes; `None` for the authors' 4 on distributions and 1 on boxes.
        beta: exponent of the term for classes.
        temperature: of the distributions.
        projector: see `kdlvfm.core.projectors.build_projector`; one for classes and one for boxes, of all levels.
            `None` builds them only where the heads differ in channels, which they do not in the paper.

    Raises:
        ValueError: there are no tails.

    Example:
        >>> tails = HeadTails(cls=torch.nn.Conv2d(8, 3, 1), reg=torch.nn.Conv2d(8, 4 * 17, 1))
        >>> crosskd = CrossKD([tails], student_dim=8, teacher_dim=8)
        >>> middles = {"cls_mid.0": torch.rand(2, 8, 4, 4), "reg_mid.0": torch.rand(2, 8, 4, 4)}
        >>> predictions = {"cls.0": tails.cls(middles["cls_mid.0"]), "reg.0": tails.reg(middles["reg_mid.0"])}
        >>> list(crosskd(middles, {**middles, **predictions}))
        ['crosskd_cls', 'crosskd_reg']
    """

    calls_teacher = True

    def __init__(
        self,
        tails: Sequence[HeadTails],
        student_dim: int,
        teacher_dim: int,
        *,
        cls_weight: float = 1.0,
        reg_weight: float | None = None,
        beta: float = 1.0,
        temperature: float = 1.0,
        projector: Projector | None = None,
    ) -> None:
        super().__init__()
        check_levels(tails=tails)
        self.tails = tuple(tails)
        self.cls_weight = cls_weight
        usual = 4.0 if tails[0].boxes is None else 1.0
        self.reg_weight = usual if reg_weight is None else reg_weight
        self.beta = beta
        self.temperature = temperature
        self.projectors = nn.ModuleDict(
            {kind: build_projector(projector, student_dim, teacher_dim) for kind in ("cls", "reg")}
        )
        self.student_taps, self.teacher_taps = (
            tuple(f"{kind}.{i}" for kind in kinds for i in range(len(self.tails)))
            for kinds in (("cls_mid", "reg_mid"), ("cls_mid", "reg_mid", "cls", "reg"))
        )

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """Takes the teacher's head, and reads how wide both are and whether boxes are distributions.

        Raises:
            TapError: a network has no head that can be entered half-way.
            ValueError: the pyramids differ in the number of levels, or the head does not say what its boxes mean.
        """
        student, teacher = context.student, context.require_teacher().model
        head = split_head(teacher)
        counts = [len(level_taps(model, "cls_mid")) for model in (student, teacher)]
        if counts[0] != counts[1]:
            raise ValueError(
                f"CrossKD needs as many levels in both pyramids: {student.card.name} has {counts[0]}, "
                f"{teacher.card.name} has {counts[1]}."
            )
        tails = [head.head_tails(i) for i in range(counts[1])]
        sides = teacher.tap_info("reg.0").dim
        several = boxes_per_position(teacher, context.num_classes) > 1
        if tails[0].boxes is None and (sides % 4 or sides < 8 or several):
            raise ValueError(
                f"CrossKD does not know how the head of {teacher.card.name} describes boxes: its {sides} channels are "
                "no distributions of four sides. Choose a teacher such as GFL."
            )
        widths = [model.tap_info("cls_mid.0").dim for model in (student, teacher)]
        return cls(**{"tails": tails, "student_dim": widths[0], "teacher_dim": widths[1], **hparams})

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The terms `crosskd_cls` and `crosskd_reg`; one whose weight is 0 is left out."""
        del target
        scores, own = self._joined(teacher, "cls"), self._joined(teacher, "reg")
        batch, channels, count = own.shape
        anchors = 1 if self.tails[0].boxes is None else channels // 4
        weight = promote(scores.detach()).sigmoid().reshape(batch, anchors, -1, count).amax(2)
        total = weight.sum().clamp(min=1)
        terms = {}
        if self.cls_weight:
            crossed = self._crossed(student, teacher, "cls")
            loss = crosskd_cls_loss(crossed, scores, self.beta, avg_factor=total)
            terms["crosskd_cls"] = self.cls_weight * loss
        if self.reg_weight:
            crossed = self._crossed(student, teacher, "reg")
            if self.tails[0].boxes is None:
                loss = crosskd_kl_loss(crossed, own, weight[:, 0], self.temperature, avg_factor=total)
            else:
                crossed, own = (x.reshape(batch, anchors, 4, count).transpose(1, 2) for x in (crossed, own))
                loss = crosskd_giou_loss(crossed, own, weight, avg_factor=total)
            terms["crosskd_reg"] = self.reg_weight * loss
        return terms

    def _joined(self, features: Features, kind: Literal["cls", "reg"]) -> Tensor:
        """Scores, and distributions or distances, of all levels as one map of a single row, (B, C, N)."""
        levels = []
        for i, tails in enumerate(self.tails):
            level = features[f"{kind}.{i}"]
            levels.append(tails.boxes(promote(level)) if kind == "reg" and tails.boxes is not None else level)
        return torch.cat([level.flatten(2) for level in levels], dim=2)

    def _crossed(self, student: Features, teacher: Features, kind: Literal["cls", "reg"]) -> Tensor:
        """What the teacher's head makes of the student's maps, (B, C, N)."""
        predictions = {}
        for i, tails in enumerate(self.tails):
            middle = teacher[f"{kind}_mid.{i}"]
            projected, middle = match_size(self.projectors[kind](student[f"{kind}_mid.{i}"]), middle, "student")
            tail = {"cls": tails.cls, "reg": tails.reg}[kind]
            predictions[f"{kind}.{i}"] = tail(align_scale(projected, middle).to(middle.dtype))
        return self._joined(predictions, kind)
