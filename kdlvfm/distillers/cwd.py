# SPDX-License-Identifier: Apache-2.0
"""CWD: each channel's map, read as a distribution over positions, follows the teacher's."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features
from kdlvfm.core.align import Resize, promote, standardise
from kdlvfm.core.aligner import Aligner, Target
from kdlvfm.core.blocks import block_length, sum_over_blocks
from kdlvfm.core.projectors import Projector


def cwd_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    r"""Kullback-Leibler divergence between softmaxes over positions, channel by channel.

    .. math::
        L = \frac{T^2}{B C} \sum_{b,c} \mathrm{KL}\big(\phi(F_T^{b,c}) \,\|\, \phi(F_S^{b,c})\big), \quad
        \phi(x)_i = \frac{e^{x_i / T}}{\sum_j e^{x_j / T}}

    with i, j over the H W positions. A constant added to a channel changes nothing; the scale of a channel matters.
    It can be differentiated once.

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
    own, goal = (promote(x).flatten(2).flatten(0, 1) for x in (student, teacher.detach()))

    def divergence(own: Tensor, goal: Tensor) -> Tensor:
        first, second = (F.log_softmax(x / temperature, dim=1) for x in (own, goal))
        return F.kl_div(first, second, log_target=True, reduction="sum")

    total = sum_over_blocks(divergence, own, goal, block_length(own, own.shape[1]))
    return total * temperature**2 / len(own)


class CWD(Distiller):
    """Channel-wise distillation of logits (the default, as in the authors' code) or of feature maps.

    Args:
        student_dim: channels of the student's map; needed, with `teacher_dim`, for a projector.
        teacher_dim: channels of the teacher's map.
        loss_weight: weight of the term: 3 for logits (authors' code); CIRKD's re-run uses 50 for feature maps.
        temperature: softmax temperature.
        student_tap: the student's logits or map.
        teacher_tap: the teacher's logits or map.
        projector: what brings the student's channels to the teacher's, see `kdlvfm.core.projectors.build_projector`; by
            default a 1x1 convolution where they differ.
        resize: who is resized where the maps differ in size, see `kdlvfm.core.align.match_size`.
        target: how the teacher's map is normalised by itself, see `kdlvfm.core.aligner.Targets`; as it is in the paper.
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
        projector: Projector | None = None,
        resize: Resize = "larger",
        target: Target = "raw",
        standardize: bool = False,
    ) -> None:
        super().__init__()
        if (student_dim is None) != (teacher_dim is None):
            raise ValueError("pass both student_dim and teacher_dim, or neither.")
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.loss_weight = loss_weight
        self.temperature = temperature
        self.standardize = standardize
        if student_dim is None and (projector is not None or target == "phi_s"):
            raise ValueError("a projector and PHI-S need to know the channels: pass student_dim and teacher_dim.")
        # An offset of a channel changes nothing, so there is no bias.
        self.align = Aligner(
            student_dim or 0, teacher_dim or 0, projector=projector, resize=resize, target=target, bias=False
        )

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """Reads both channel counts from the taps.

        Where the task is not one of masks, or the teacher has no classes and so no logits, maps are distilled,
        standardised; the last ones if no tap is given.
        """
        if context.task.truth != "masks" or "logits" not in context.require_teacher().taps():
            hparams = {"standardize": True, **hparams}
            if not hparams.keys() & {"student_tap", "teacher_tap"}:
                hparams |= {"student_tap": "map.-1", "teacher_tap": "map.-1"}
        return cls(**context.tap_dims(cls, hparams), **hparams)

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The term `cwd`."""
        del target
        projected, goal = self.align(student[self.student_taps[0]], teacher[self.teacher_taps[0]])
        if self.standardize:
            projected, goal = standardise(projected), standardise(goal)
        return {"cwd": self.loss_weight * cwd_loss(projected, goal, self.temperature)}
