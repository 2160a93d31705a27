# SPDX-License-Identifier: Apache-2.0
"""VkD: the student's features, turned by an orthogonal projector, regress the teacher's normalised ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features
from kdlvfm.core.align import Resize, TargetNorm, normalise_target, promote
from kdlvfm.core.aligner import Aligner, Target
from kdlvfm.core.projectors import Projector


def vkd_loss(projected: Tensor, teacher: Tensor, normalization: TargetNorm = "layernorm") -> Tensor:
    r"""Smooth L1 distance of projected features to the teacher's normalised features.

    .. math::
        L = \mathrm{mean}\; \rho\big(P F_S - \mathrm{norm}(F_T)\big), \quad
        \rho(d) = \begin{cases} d^2 / 2 & |d| < 1 \\ |d| - 1/2 & \text{otherwise} \end{cases}

    Args:
        projected: (B, C, H, W) or (B, C): the student's features through an orthogonal projector P.
        teacher: same shape; receives no gradient.
        normalization: `"layernorm"` (each position over its channels, without affine parameters; the paper's choice for
            classification), `"standardize"` (each channel over batch and positions; the paper's choice for detection)
            or `"raw"`.

    Returns:
        A scalar: the mean over all elements.

    Raises:
        ValueError: the shapes differ, or the normalisation is unknown.

    Source:
        Miles, Elezi, Deng, "VkD: Improving Knowledge Distillation using Orthogonal Projections", CVPR 2024.

    Example:
        >>> import torch
        >>> vkd_loss(torch.zeros(1, 2), torch.tensor([[-3.0, 3.0]]), normalization="raw").item()
        2.5
    """
    if projected.shape != teacher.shape:
        raise ValueError(
            f"features must have one shape, not {tuple(projected.shape)} (projected student) and "
            f"{tuple(teacher.shape)} (teacher)."
        )
    return F.smooth_l1_loss(promote(projected), normalise_target(promote(teacher.detach()), normalization))


class VkD(Distiller):
    """Feature regression through an orthogonal projector, against a normalised teacher.

    The paper distils one vector of each image or the feature maps of a detector; this applies it to every position of a
    map.

    Args:
        student_dim: channels of the student's map.
        teacher_dim: channels of the teacher's map.
        loss_weight: weight of the term; 1 in the authors' code.
        student_tap: the student's map, or `pooled`.
        teacher_tap: the teacher's map, or `pooled`.
        projector: `"orthogonal"` is the method; another one shows what orthogonality brings, see
            `kdlvfm.core.projectors.build_projector`.
        resize: who is resized where the maps differ in size, see `kdlvfm.core.align.match_size`.
        target: normalisation of the teacher, see `vkd_loss` and `kdlvfm.core.aligner.Targets`.

    Example:
        >>> import torch
        >>> vkd = VkD(student_dim=64, teacher_dim=192)
        >>> terms = vkd({"map.-1": torch.rand(2, 64, 4, 4)}, {"map.-1": torch.rand(2, 192, 8, 8)})
        >>> list(terms)
        ['vkd']
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        loss_weight: float = 1.0,
        student_tap: str = "map.-1",
        teacher_tap: str = "map.-1",
        projector: Projector | None = "orthogonal",
        resize: Resize = "larger",
        target: Target = "layernorm",
    ) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.loss_weight = loss_weight
        self.align = Aligner(student_dim, teacher_dim, projector=projector, resize=resize, target=target)

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """Reads both channel counts from the taps."""
        return cls(**context.tap_dims(cls, hparams), **hparams)

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The term `vkd`."""
        del target
        projected, goal = self.align(student[self.student_taps[0]], teacher[self.teacher_taps[0]])
        return {"vkd": self.loss_weight * vkd_loss(projected, goal, normalization="raw")}
