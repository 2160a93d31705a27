# SPDX-License-Identifier: Apache-2.0
"""FitNet: the student's feature map, projected, regresses the teacher's."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features
from kdlvfm.core.align import Resize, promote
from kdlvfm.core.aligner import Aligner, Target
from kdlvfm.core.projectors import Projector


def fitnet_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Mean squared error between two feature maps of one shape.

    .. math:: L = \mathrm{mean}\,\big((F_S - F_T)^2\big)

    Args:
        student: (B, C, H, W), already projected to the teacher's channels.
        teacher: (B, C, H, W); receives no gradient.

    Returns:
        A scalar: the mean over all elements.

    Raises:
        ValueError: the shapes differ.

    Source:
        Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015.

    Example:
        >>> import torch
        >>> fitnet_loss(torch.zeros(1, 2, 3, 3), torch.full((1, 2, 3, 3), 2.0)).item()
        4.0
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"features must have one shape, not {tuple(student.shape)} (student) and {tuple(teacher.shape)} (teacher)."
        )
    return F.mse_loss(promote(student), promote(teacher.detach()))


class FitNet(Distiller):
    """Feature regression through a projector, trained together with the task.

    The paper trains the hint layer in a stage of its own; like later re-runs, this trains both at once.

    Args:
        student_dim: channels of the student's map.
        teacher_dim: channels of the teacher's map.
        loss_weight: weight of the term. 10 is CIRKD's value for segmentation; mdistiller uses 100 on CIFAR-100.
        student_tap: the student's map.
        teacher_tap: the teacher's map.
        projector: what brings the student's channels to the teacher's, see `kdlvfm.core.projectors.build_projector`.
        resize: who is resized where the maps differ in size, see `kdlvfm.core.align.match_size`.
        target: the teacher's features normalised, which keeps the few channels of very large norm in a ViT from
            dominating, or as they are (`"raw"`, the paper); see `kdlvfm.core.aligner.Targets`.

    Example:
        >>> import torch
        >>> fitnet = FitNet(student_dim=64, teacher_dim=192)
        >>> terms = fitnet({"map.-1": torch.rand(2, 64, 4, 4)}, {"map.-1": torch.rand(2, 192, 8, 8)})
        >>> list(terms)
        ['fitnet']
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        loss_weight: float = 10.0,
        student_tap: str = "map.-1",
        teacher_tap: str = "map.-1",
        projector: Projector | None = "linear",
        resize: Resize = "larger",
        target: Target = "standardize",
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
        """The term `fitnet`."""
        del target
        projected, goal = self.align(student[self.student_taps[0]], teacher[self.teacher_taps[0]])
        return {"fitnet": self.loss_weight * fitnet_loss(projected, goal)}
