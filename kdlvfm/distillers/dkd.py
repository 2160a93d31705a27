# SPDX-License-Identifier: Apache-2.0
"""DKD: logit distillation in two parts, the labelled class against the rest and the rest among themselves."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlvfm.core import Distiller, Features
from kdlvfm.core.align import Resize, match_size, promote, resize_labels


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    ignore_index: int = 255,
) -> Tensor:
    r"""Weighted sum of the two parts of Kullback-Leibler divergence between softened class probabilities.

    .. math::
        L = \frac{T^2}{|V|} \sum_{v \in V} \alpha \, \mathrm{KL}(b_T \,\|\, b_S)
            + \beta \, \mathrm{KL}(\hat{p}_T \,\|\, \hat{p}_S), \quad
        b = (p_y, 1 - p_y), \quad \hat{p}_k = \frac{p_k}{1 - p_y} \;\; (k \ne y), \quad p = \sigma(z / T)

    over the labelled samples or positions V, y being the label. Plain KD is the case in which alpha is 1 and beta is
    1 - p_y of the teacher, which is nearly 0 where the teacher is sure.

    Args:
        student_logits: (B, K) or (B, K, H, W).
        teacher_logits: same shape; receives no gradient.
        target: (B) or (B, H, W) labels; samples or positions below 0 (unlabelled) or equal to `ignore_index` are left
            out.
        alpha: weight of the labelled class against the rest (TCKD); 1 in the authors' configurations.
        beta: weight of the rest among themselves (NCKD); 8 is theirs for ResNet32x4 to ResNet8x4 on CIFAR-100, 0.5 to 2
            for ImageNet, 0.25 for detection.
        temperature: T; 4 for CIFAR-100, 1 for ImageNet and detection.
        ignore_index: the label that is left out.

    Returns:
        A scalar: the mean over labelled samples or positions, 0 if there are none.

    Raises:
        ValueError: the logits differ in shape or have fewer than 2 classes, or `target` does not fit them.

    Source:
        Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022. On pixels it is ours: each labelled one is a sample.

    Example:
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[0.25, 0.75]]).log()
        >>> round(dkd_loss(student, teacher, torch.tensor([0]), temperature=1.0).item(), 6)
        0.130812
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"logits must have one shape, not {tuple(student_logits.shape)} (student) and "
            f"{tuple(teacher_logits.shape)} (teacher); resize the maps and check the number of classes."
        )
    if student_logits.shape[1] < 2:
        raise ValueError("DKD compares classes: logits need at least 2 of them in dimension 1.")
    if target.shape != student_logits[:, 0].shape:
        raise ValueError(
            f"target {tuple(target.shape)} does not fit logits {tuple(student_logits.shape)}: it must be theirs "
            "without the classes."
        )
    labelled = ((target >= 0) & (target != ignore_index)).unsqueeze(1)
    index = target.unsqueeze(1) * labelled
    parts = []
    for logits in (student_logits, teacher_logits.detach()):
        # Replaced before the softmax: a logit that is not finite would reach the gradient through 0 * inf.
        parts.append(_decouple((promote(logits) / temperature).masked_fill_(~labelled, 0), index))
    target_part, other_part = (
        F.kl_div(student, teacher, log_target=True, reduction="sum") for student, teacher in zip(*parts, strict=True)
    )
    return temperature**2 * (alpha * target_part + beta * other_part) / labelled.sum().clamp(min=1)


def _decouple(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of the label's probability and that of the rest, and of the rest's probabilities given that it is one.

    The second has K entries too, with 0 in place of the label.
    """
    rest = logits.scatter(1, index, -math.inf)
    binary = torch.cat([logits.gather(1, index), rest.logsumexp(1, keepdim=True)], dim=1)
    return binary.log_softmax(1), rest.log_softmax(1).scatter(1, index, 0)


class DKD(Distiller):
    """Decoupled logit distillation on labelled samples or pixels; void and unlabelled ones are left out.

    The authors let the weight grow linearly over the first 20 epochs on CIFAR-100; here it is constant.

    Args:
        loss_weight: weight of the term; 1 in the authors' code.
        alpha: weight of the labelled class against the rest.
        beta: weight of the rest among themselves.
        temperature: softmax temperature.
        ignore_index: label of void pixels.
        student_tap: tap of the student's logits.
        teacher_tap: tap of the teacher's logits.
        resize: who is resized where dense logits differ in size, see `kdlvfm.core.align.match_size`.

    Example:
        >>> terms = DKD()(
        ...     {"logits": torch.rand(2, 3, 4, 4)},
        ...     {"logits": torch.rand(2, 3, 4, 4)},
        ...     torch.zeros(2, 4, 4, dtype=torch.int64),
        ... )
        >>> list(terms)
        ['dkd']
    """

    needs_truth = True

    def __init__(
        self,
        *,
        loss_weight: float = 1.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        ignore_index: int = 255,
        student_tap: str = "logits",
        teacher_tap: str = "logits",
        resize: Resize = "larger",
    ) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.loss_weight = loss_weight
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.resize = resize

    def forward(self, student: Features, teacher: Features, target: Tensor | None = None) -> dict[str, Tensor]:
        """The term `dkd`; `target` is (B, H, W), or (B) for a classifier."""
        if target is None:
            raise ValueError("DKD needs labels, and there is no target; KD needs none.")
        student_logits, teacher_logits = student[self.student_taps[0]], teacher[self.teacher_taps[0]]
        if student_logits.dim() == 4:
            student_logits, teacher_logits = match_size(student_logits, teacher_logits, self.resize)
            target = resize_labels(target, student_logits.shape[-2:])
        loss = dkd_loss(
            student_logits, teacher_logits, target, self.alpha, self.beta, self.temperature, self.ignore_index
        )
        return {"dkd": self.loss_weight * loss}
