# SPDX-License-Identifier: Apache-2.0
"""MGD: from a masked student's map, a small network generates the teacher's whole map."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features
from kdlvfm.core.align import Resize, promote
from kdlvfm.core.aligner import Aligner, Target
from kdlvfm.core.projectors import Projector

Unit = Literal["position", "channel"]


def mgd_loss(generated: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared distance of a generated map to the teacher's, summed over each sample.

    .. math:: L = \frac{1}{B} \sum_{b,c,i} \big(G(F_S \cdot M) - F_T\big)^2_{b,c,i}

    The value grows with the number of elements C H W of a map.

    Args:
        generated: (B, C, H, W): what the generator G made of the masked student.
        teacher: (B, C, H, W); receives no gradient.

    Returns:
        A scalar: the sum over channels and positions, the mean over samples.

    Raises:
        ValueError: the shapes differ.

    Source:
        Yang et al., "Masked Generative Distillation", ECCV 2022.

    Example:
        >>> mgd_loss(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)).item()
        12.0
    """
    if generated.shape != teacher.shape:
        raise ValueError(
            f"features must have one shape, not {tuple(generated.shape)} (generated) and "
            f"{tuple(teacher.shape)} (teacher)."
        )
    return F.mse_loss(promote(generated), promote(teacher.detach()), reduction="sum") / generated.shape[0]


def random_mask(x: Tensor, drop_ratio: float, unit: Unit = "position") -> Tensor:
    """A mask for (B, C, H, W) that is 0 with probability `drop_ratio` and 1 otherwise, drawn for each sample.

    Args:
        x: the map to be masked.
        drop_ratio: expected share of what is dropped, from 0 to 1.
        unit: whole positions, (B, 1, H, W), the paper's choice for dense tasks; or whole channels, (B, C, 1, 1), its
            choice for classification.

    Raises:
        ValueError: the unit is unknown.
    """
    batch, channels, height, width = x.shape
    shapes = {"position": (batch, 1, height, width), "channel": (batch, channels, 1, 1)}
    if unit not in shapes:
        raise ValueError(f"unit must be 'position' or 'channel', not {unit!r}.")
    return (torch.rand(shapes[unit], device=x.device) >= drop_ratio).to(x.dtype)


def mgd_generator(dim: int) -> nn.Sequential:
    """What makes a whole map (B, `dim`, H, W) of a masked one: two 3x3 convolutions and a ReLU."""
    return nn.Sequential(
        nn.Conv2d(dim, dim, kernel_size=3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, kernel_size=3, padding=1)
    )


class MGD(Distiller):
    """Generation of the teacher's map from the student's, most of which is masked.

    For segmentation the authors add CWD on the logits (weight 3, temperature 4), which is a distiller of its own here.
    A detector's pyramid has one for each level, see `kdlvfm.core.levels`.

    Args:
        student_dim: channels of the student's map.
        teacher_dim: channels of the teacher's map, and of the generator: two 3x3 convolutions and a ReLU.
        loss_weight: weight of the term. In the authors' code 2e-5 for segmentation and one-stage detectors, 5e-7 for
            two-stage detectors, 7e-5 for channels in classification.
        drop_ratio: share that is masked. In the authors' code 0.75 for segmentation, 0.65 for one-stage and 0.45 for
            two-stage detectors, 0.15 for channels in classification.
        unit: what is masked, see `random_mask`.
        student_tap: the student's map.
        teacher_tap: the teacher's map.
        projector: what brings the student's channels to the teacher's, see `kdlvfm.core.projectors.build_projector`; by
            default a 1x1 convolution where they differ.
        resize: who is resized where the maps differ in size, before masking; see `kdlvfm.core.align.match_size`. The
            authors' maps are of one size.
        target: the teacher's features as they are (`"raw"`, the paper) or normalised. The default is ours: the loss
            is a sum of squares, which a ViT's few channels of very large norm would make up almost alone.

    Example:
        >>> mgd = MGD(student_dim=64, teacher_dim=96)
        >>> list(mgd({"map.-1": torch.rand(2, 64, 4, 4)}, {"map.-1": torch.rand(2, 96, 8, 8)}))
        ['mgd']
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        loss_weight: float = 2e-5,
        drop_ratio: float = 0.75,
        unit: Unit = "position",
        student_tap: str = "map.-1",
        teacher_tap: str = "map.-1",
        projector: Projector | None = None,
        resize: Resize = "larger",
        target: Target = "standardize",
    ) -> None:
        super().__init__()
        if not 0 <= drop_ratio < 1:
            raise ValueError(f"drop_ratio must be at least 0 and below 1, not {drop_ratio}: it is the share masked.")
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.loss_weight = loss_weight
        self.drop_ratio = drop_ratio
        self.unit: Unit = unit
        self.align = Aligner(student_dim, teacher_dim, projector=projector, resize=resize, target=target)
        self.generator = mgd_generator(teacher_dim)

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """Reads both channel counts from the taps."""
        return cls(**context.tap_dims(cls, hparams), **hparams)

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The term `mgd`; a new mask at every call."""
        del target
        projected, goal = self.align(student[self.student_taps[0]], teacher[self.teacher_taps[0]])
        masked = projected * random_mask(projected, self.drop_ratio, self.unit)
        return {"mgd": self.loss_weight * mgd_loss(self.generator(masked), goal)}
