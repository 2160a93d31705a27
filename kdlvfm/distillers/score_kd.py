# SPDX-License-Identifier: Apache-2.0
"""ScoreKD: a detector's class scores follow the teacher's, each of them a question of yes or no."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features
from kdlvfm.core.align import Resize, check_levels, check_resize, match_size, promote
from kdlvfm.core.detector import boxes_per_position
from kdlvfm.core.levels import level_pairs


def score_kd_loss(student: Tensor, teacher: Tensor, beta: float = 1.0, *, avg_factor: Tensor | None = None) -> Tensor:
    r"""Binary cross-entropy to the teacher's class probabilities, weighted by how far off the student's are.

    .. math::
        L = \frac{1}{A} \sum_{i,k} |\sigma(z_S) - \sigma(z_T)|^\beta \,
            \mathrm{BCE}\big(\sigma(z_S), \sigma(z_T)\big)_{i,k}

    over positions i and classes k. Detectors are trained with a sigmoid for each class, and most positions belong to
    none; a softmax over the classes, as in KD, would tell apart classes where there is no object. The weight, through
    which gradients flow too, keeps the many positions that both networks take for background from drowning the few that
    they do not.

    Args:
        student: scores before the sigmoid, (B, C, ...).
        teacher: the same shape; receives no gradient.
        beta: β; 1 in the authors' code.
        avg_factor: A; `None` for the number of positions.

    Returns:
        A scalar, 0 where the probabilities are equal.

    Raises:
        ValueError: the shapes differ, or β is below 1, whose gradient has no bound.

    Source:
        Yang et al., "Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection", ICCV 2023;
        the form is that of the quality focal loss of Li et al. (2020).

    Example:
        >>> student, teacher = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 100.0)
        >>> round(score_kd_loss(student, teacher).item(), 6)  # half of ln 2
        0.346574
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"predictions must have one shape, not {tuple(student.shape)} (student) and {tuple(teacher.shape)} "
            "(teacher)."
        )
    if beta < 1:
        raise ValueError(f"beta must be at least 1, not {beta}.")
    student, goal = promote(student), promote(teacher.detach()).sigmoid()
    entropy = F.binary_cross_entropy_with_logits(student, goal, reduction="none")
    apart = (student.sigmoid() - goal).abs()
    total = ((apart if beta == 1 else apart.pow(beta)) * entropy).sum()
    return total / (student[:, 0].numel() if avg_factor is None else avg_factor)


class ScoreKD(Distiller):
    """Distillation of a detector's class scores; the positions of all levels count together. No labels are read.

    What `KD` is for a segmenter: with the detection task `distiller=kd` is this. Each network may have its own features
    and boxes, but both heads must score as many boxes at a position.

    The sum over positions is divided by the sum, over the batch, of the teacher's highest probability for each box:
    about the number of boxes that it takes for objects, at least 1. The authors divide by the number that the student's
    training calls positive.

    Args:
        num_classes: K; a head with several boxes at each position has their scores one box after the other.
        loss_weight: weight of the term; 1 in the authors' code.
        beta: see `score_kd_loss`.
        student_taps: the student's scores at each level.
        teacher_taps: the teacher's, one for each of the student's.
        resize: who is resized where scores differ in size, see `kdlvfm.core.align.match_size`.

    Raises:
        ValueError: taps are not equally many, or an option is none of those there are.

    Example:
        >>> score_kd = ScoreKD(num_classes=3)
        >>> list(score_kd({"cls.0": torch.rand(2, 3, 4, 4)}, {"cls.0": torch.rand(2, 3, 4, 4)}))
        ['kd']
    """

    def __init__(
        self,
        num_classes: int,
        *,
        loss_weight: float = 1.0,
        beta: float = 1.0,
        student_taps: Sequence[str] = ("cls.0",),
        teacher_taps: Sequence[str] = ("cls.0",),
        resize: Resize = "larger",
    ) -> None:
        super().__init__()
        check_levels(student_taps=student_taps, teacher_taps=teacher_taps)
        check_resize(resize)
        if num_classes < 1 or beta < 1:
            raise ValueError(f"num_classes and beta must be at least 1, not {num_classes} and {beta}.")
        self.student_taps, self.teacher_taps = tuple(student_taps), tuple(teacher_taps)
        self.num_classes = num_classes
        self.loss_weight = loss_weight
        self.beta = beta
        self.resize = resize

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """Takes all levels of both heads, those of the nearest strides together.

        Raises:
            TapError: a network has no class scores for every position.
            ValueError: the heads differ in the number of boxes at a position.
        """
        models = context.student, context.require_teacher().model
        if not hparams.keys() & {"student_taps", "teacher_taps"}:
            own, other = zip(*level_pairs(*models, "cls"), strict=True)
            hparams = {"student_taps": own, "teacher_taps": other, **hparams}
        counts = [boxes_per_position(model, context.num_classes) for model in models]
        if counts[0] != counts[1]:
            raise ValueError(
                f"ScoreKD compares the scores of both heads box by box, and {models[0].card.name} has {counts[0]} at a "
                f"position, {models[1].card.name} has {counts[1]}: choose a teacher with the student's head, or a "
                "distiller of features such as pkd."
            )
        return cls(**{"num_classes": context.num_classes, **hparams})

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The term `kd`."""
        del target
        rows: tuple[list[Tensor], list[Tensor]] = ([], [])
        for own, other in zip(self.student_taps, self.teacher_taps, strict=True):
            pair = match_size(promote(student[own]), promote(teacher[other].detach()), self.resize)
            for row, level in zip(rows, pair, strict=True):
                boxes = level.reshape(len(level), -1, self.num_classes, *level.shape[2:])
                row.append(boxes.transpose(1, 2).flatten(2))
        scores, goal = (torch.cat(row, dim=2) for row in rows)
        objects = goal.sigmoid().amax(1).sum().clamp(min=1)
        return {"kd": self.loss_weight * score_kd_loss(scores, goal, self.beta, avg_factor=objects)}
