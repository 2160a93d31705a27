# SPDX-License-Identifier: Apache-2.0
"""DeiT: a token of its own, beside the class token of a vision transformer, learns from the teacher."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features, TapError
from kdlvfm.core.align import promote
from kdlvfm.distillers.kd import kd_loss

Labels = Literal["hard", "soft"]


def deit_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Labels = "hard", temperature: float = 3.0
) -> Tensor:
    r"""What the distillation token says of an image against what the teacher says.

    .. math::
        L_\mathrm{hard} = \mathrm{CE}\big(z_S, \arg\max_c z_T^c\big), \quad
        L_\mathrm{soft} = T^2\,\mathrm{KL}\big(\sigma(z_T / T) \,\|\, \sigma(z_S / T)\big)

    Args:
        student_logits: (B, K), of the distillation token's classifier.
        teacher_logits: (B, K), or (B, K, H, W) of a dense teacher, of which an image's probabilities are the mean over
            all positions (ours): the share of the image that each class covers. Receive no gradient.
        labels: `"hard"`, the paper's choice, or `"soft"`.
        temperature: T, of soft labels; 3 in the paper.

    Returns:
        A scalar: the mean over images. For soft labels the authors' code divides by K as well.

    Raises:
        ValueError: the logits differ in images or classes, or there are no such labels.

    Source:
        Touvron et al., "Training data-efficient image transformers & distillation through attention", ICML 2021.

    Example:
        >>> import torch
        >>> student, teacher = torch.zeros(1, 4), torch.tensor([[0.0, 5.0, 1.0, 0.0]])
        >>> round(deit_loss(student, teacher).item(), 6)  # ln 4
        1.386294
    """
    if teacher_logits.dim() == 4:
        # The logarithm of the mean probability, which is in turn what a softmax gives back.
        positions = promote(teacher_logits.detach()).log_softmax(dim=1).flatten(2)
        teacher_logits = positions.logsumexp(dim=2) - math.log(positions.shape[2])
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"logits must be (B, K) of one shape, not {tuple(student_logits.shape)} (student) and "
            f"{tuple(teacher_logits.shape)} (teacher)."
        )
    if labels == "hard":
        return F.cross_entropy(promote(student_logits), teacher_logits.argmax(dim=1))
    if labels == "soft":
        return kd_loss(student_logits, teacher_logits, temperature)
    raise ValueError(f"labels must be 'hard' or 'soft', not {labels!r}.")


class DeiT(Distiller):
    """Distillation through a token of the student, which must be a vision transformer that has one.

    timm's distilled DeiTs have the tap `logits_distilled`. The other tokens learn the task as ever and hear of the
    teacher through attention. There is nothing else to train, and labels are not needed.

    Args:
        loss_weight: weight of the term. 1 weighs it like the task, as the paper does for hard labels; for soft ones it
            weighs the task 0.1 to 0.9.
        labels: see `deit_loss`.
        temperature: see `deit_loss`.
        student_tap: tap of the distillation token's logits.
        teacher_tap: tap of the teacher's logits, of images or dense.

    Example:
        >>> import torch
        >>> terms = DeiT()({"logits_distilled": torch.zeros(2, 3)}, {"logits": torch.rand(2, 3, 8, 8)})
        >>> {name: round(term.item(), 6) for name, term in terms.items()}
        {'deit': 1.098612}
    """

    def __init__(
        self,
        *,
        loss_weight: float = 1.0,
        labels: Labels = "hard",
        temperature: float = 3.0,
        student_tap: str = "logits_distilled",
        teacher_tap: str = "logits",
    ) -> None:
        super().__init__()
        if labels not in ("hard", "soft"):
            raise ValueError(f"labels must be 'hard' or 'soft', not {labels!r}.")
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.loss_weight = loss_weight
        self.labels: Labels = labels
        self.temperature = temperature

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """Checks that the student has the token, for the teacher's classes.

        Raises:
            TapError: the student has no such token, or the teacher no logits.
            ValueError: they tell different numbers of classes apart.
        """
        method = cls(**hparams)
        student, teacher = context.student, context.require_teacher()
        classes = teacher.tap_info(method.teacher_taps[0]).dim
        advice = (
            "student=timm_linear student.encoder.name=deit_tiny_distilled_patch16_224 "
            f"student.encoder.model_kwargs.num_classes={classes}"
        )
        try:
            found = student.tap_info(method.student_taps[0]).dim
        except TapError:
            raise TapError(
                f"DeiT needs a student with a distillation token and a classifier on it, and {student.card.name} has "
                f"no tap {method.student_taps[0]!r}: use one of timm's, for example {advice}."
            ) from None
        if found != classes:
            raise ValueError(
                f"the student's distillation token tells {found} classes apart and the teacher {classes}: {advice}."
            )
        return method

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The term `deit`."""
        del target
        pair = student[self.student_taps[0]], teacher[self.teacher_taps[0]]
        return {"deit": self.loss_weight * deit_loss(*pair, self.labels, self.temperature)}
