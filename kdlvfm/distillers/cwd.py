# SPDX-License-Identifier: Apache-2.0
"""CWD: each channel's map, read as a distribution over positions, follows the teacher's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features
from kdlvfm.core.align import Resize, match_size, promote, standardise


def cwd_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    r"""Kullback-Leibler divergence between softmaxes over positions, channel by channel.

    .. math::
        L = \frac{T^2}{B C} \sum_{b,c} \mathrm{KL}\big(\phi(F_T^{b,c}) \,\|\, \phi(F_S^{b,c})\big), \quad
        \phi(x)_i = \frac{e^{x_i / T}}{\sum_j e^{x_j / T}}

    with i, j over the H W positions. A constant added to a channel changes nothing; the scale of a channel matters.

    Args:
        student: (B, C, H, W) logits or projected features.
        teacher: (B, C, H, W); receives no gradient.
        temperature: T; 4 in the authors' code.

    Returns:
        A scalar: the mean over samples and channels.

    Raises:
        ValueError: the shapes differ.

    Source:
        Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021.

    Example:
        >>> import torch
        >>> x = torch.rand(2, 3, 4, 4)
        >>> cwd_loss(x, x).item()
        0.0
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"maps must have one shape, not {tuple(student.shape)} (student) and {tuple(teacher.shape)} (teacher)."
        )
    student, teacher = promote(student), promote(teacher.detach())
    divergence = F.kl_div(
        F.log_softmax(student.flatten(2) / temperature, dim=2),
        F.log_softmax(teacher.flatten(2) / temperature, dim=2),
        log_target=True,
        reduction="sum",
    )
    return divergence * temperature**2 / (student.shape[0] * student.shape[1])


class CWD(Distiller):
    """Channel-wise distillation of logits (the default, as in the authors' code) or of feature maps.

    Args:
        student_dim: channels of the student's map; with `teacher_dim`, builds a 1x1 convolution where they differ.
        teacher_dim: channels of the teacher's map.
        loss_weight: weight of the term: 3 for logits (authors' code); CIRKD's re-run uses 50 for feature maps.
        temperature: softmax temperature.
        student_tap: the student's logits or map.
        teacher_tap: the teacher's logits or map.
        resize: who is resized where the maps differ in size, see `kdlvfm.core.align.match_size`.
        standardize: bring each channel of both maps to zero mean and unit variance over the batch first. Not in the
            paper; with a ViT's features the softmax over positions otherwise saturates on a few outlier tokens.

    Example:
        >>> import torch
        >>> terms = CWD()({"logits": torch.rand(2, 3, 8, 8)}, {"logits": torch.rand(2, 3, 8, 8)})
        >>> list(terms)
        ['cwd']
    """

    def __init__(
        self,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
        *,
        loss_weight: float = 3.0,
        temperature: float = 4.0,
        student_tap: str = "logits",
        teacher_tap: str = "logits",
        resize: Resize = "larger",
        standardize: bool = False,
    ) -> None:
        super().__init__()
        if (student_dim is None) != (teacher_dim is None):
            raise ValueError("pass both student_dim and teacher_dim, or neither.")
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.loss_weight = loss_weight
        self.temperature = temperature
        self.resize = resize
        self.standardize = standardize
        self.projector: nn.Module = nn.Identity()
        if student_dim is not None and teacher_dim is not None and student_dim != teacher_dim:
            self.projector = nn.Conv2d(student_dim, teacher_dim, kernel_size=1)

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """Reads both channel counts from the taps.

        Where no tap is given and the teacher has no classes, and so no logits, the last maps are taken, standardised.
        """
        if not hparams.keys() & {"student_tap", "teacher_tap"} and "logits" not in context.require_teacher().taps():
            hparams = {"student_tap": "map.-1", "teacher_tap": "map.-1", "standardize": True, **hparams}
        return cls(**context.tap_dims(cls, hparams), **hparams)

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The term `cwd`."""
        del target
        projected = promote(self.projector(student[self.student_taps[0]]))
        goal = promote(teacher[self.teacher_taps[0]])
        projected, goal = match_size(projected, goal, self.resize)
        if self.standardize:
            projected, goal = standardise(projected), standardise(goal)
        return {"cwd": self.loss_weight * cwd_loss(projected, goal, self.temperature)}
