# SPDX-License-Identifier: Apache-2.0
"""KD: the student's class probabilities follow the teacher's, softened by a temperature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlvfm.core import Context, Distiller, Features
from kdlvfm.core.align import Resize, match_size, promote, resize_labels
from kdlvfm.distillers.score_kd import ScoreKD


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 4.0,
    target: Tensor | None = None,
    ignore_index: int | None = 255,
    *,
    standardize: bool = False,
) -> Tensor:
    r"""Kullback-Leibler divergence between softened class probabilities.

    .. math::
        L = T^2 \, \frac{1}{|V|} \sum_{v \in V}
            \mathrm{KL}\big(\sigma(z_T^v / T) \,\|\, \sigma(z_S^v / T)\big)

    over the valid samples or positions V. The factor :math:`T^2` keeps the size of the gradient independent of T.

    Args:
        student_logits: (B, K) or (B, K, H, W).
        teacher_logits: same shape; receives no gradient.
        temperature: T. 4 is the value of Zhao et al. (2022) on CIFAR-100; CIRKD (Yang et al., 2022) uses 1 on pixels.
        target: (B) or (B, H, W); samples or positions equal to `ignore_index` are left out. `None` keeps all.
        ignore_index: the label that is left out; `None` keeps all.
        standardize: first bring each sample's or position's logits to zero mean and unit standard deviation over the
            classes (Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024), which makes the loss
            invariant to a positive affine change of either network's logits.

    Returns:
        A scalar: the mean over valid samples or positions, 0 if there are none.

    Raises:
        ValueError: the logits differ in shape, or `target` does not fit them.

    Source:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.

    Example:
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[0.25, 0.75]]).log()
        >>> round(kd_loss(student, teacher, temperature=1.0).item(), 6)
        0.130812
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"logits must have one shape, not {tuple(student_logits.shape)} (student) and "
            f"{tuple(teacher_logits.shape)} (teacher); resize the maps and check the number of classes."
        )
    student_logits, teacher_logits = promote(student_logits), promote(teacher_logits.detach())
    count: Tensor | int = student_logits[:, 0].numel()
    ignored = None
    if target is not None and ignore_index is not None:
        if target.shape != student_logits[:, 0].shape:
            raise ValueError(
                f"target {tuple(target.shape)} does not fit logits {tuple(student_logits.shape)}: it must be theirs "
                "without the classes; ignore_index=None distils everywhere and needs no target."
            )
        ignored = (target == ignore_index).unsqueeze(1)
        count = (~ignored).sum().clamp(min=1)
    if standardize:
        student_logits, teacher_logits = (_standardise_logits(x, ignored) for x in (student_logits, teacher_logits))
    own, goal = (F.log_softmax(_soften(x, temperature, ignored), dim=1) for x in (student_logits, teacher_logits))
    return temperature**2 * F.kl_div(own, goal, log_target=True, reduction="sum") / count


def _soften(logits: Tensor, temperature: float, ignored: Tensor | None) -> Tensor:
    """Logits over the temperature, 0 where they are ignored."""
    scaled = logits / temperature
    # Before the softmax, since a logit that is not finite would reach the gradient through 0 * inf; in place, since
    # nobody else holds the quotient.
    return scaled if ignored is None else scaled.masked_fill_(ignored, 0)


def _standardise_logits(logits: Tensor, ignored: Tensor | None) -> Tensor:
    """Zero mean and unit standard deviation over the classes, 0 where they are ignored."""
    known = logits if ignored is None else logits.masked_fill(ignored, 0)
    std, mean = torch.std_mean(known, dim=1, keepdim=True)
    # The paper's code adds 1e-7 instead, which multiplies the gradient of logits that are still equal by 10^7.
    return (known - mean) / std.clamp(min=1e-3)


class KD(Distiller):
    """Logit distillation, for classification and, pixel by pixel, for segmentation.

    Void pixels are left out; pixels of unlabelled images are not, since the teacher has an opinion on them.

    Class scores of a detector are no logits of a softmax: for them `from_context` gives `ScoreKD`, with its arguments.

    Args:
        loss_weight: weight of the term. 1 is CIRKD's value for segmentation.
        temperature: softmax temperature.
        standardize: standardise the logits of both networks first; the paper then uses `temperature=2`,
            `loss_weight=9`.
        ignore_index: label of void pixels; `None` distils on them too, as the public segmentation code does.
        student_tap: tap of the student's logits.
        teacher_tap: tap of the teacher's logits.
        resize: who is resized where dense logits differ in size, see `kdlvfm.core.align.match_size`.

    Example:
        >>> terms = KD()({"logits": torch.zeros(2, 3, 4, 4)}, {"logits": torch.zeros(2, 3, 4, 4)})
        >>> {name: term.item() for name, term in terms.items()}
        {'kd': 0.0}
    """

    def __init__(
        self,
        *,
        loss_weight: float = 1.0,
        temperature: float = 4.0,
        standardize: bool = False,
        ignore_index: int | None = 255,
        student_tap: str = "logits",
        teacher_tap: str = "logits",
        resize: Resize = "larger",
    ) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.loss_weight = loss_weight
        self.temperature = temperature
        self.standardize = standardize
        self.ignore_index = ignore_index
        self.resize = resize

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Distiller:
        """For detection a `ScoreKD`."""
        return ScoreKD.from_context(context, **hparams) if context.task.truth == "boxes" else cls(**hparams)

    def forward(self, student: Features, teacher: Features, target: Tensor | None = None) -> dict[str, Tensor]:
        """The term `kd`; `target` (B, H, W), or (B) for a classifier, only says what is void."""
        student_logits, teacher_logits = student[self.student_taps[0]], teacher[self.teacher_taps[0]]
        if student_logits.dim() == 4:
            student_logits, teacher_logits = match_size(student_logits, teacher_logits, self.resize)
            if target is not None and self.ignore_index is not None:
                target = resize_labels(target, student_logits.shape[-2:])
        loss = kd_loss(
            student_logits,
            teacher_logits,
            self.temperature,
            target,
            self.ignore_index,
            standardize=self.standardize,
        )
        return {"kd": self.loss_weight * loss}
