# SPDX-License-Identifier: Apache-2.0
"""PKD: each channel of the student's map correlates with the teacher's, whatever its mean and scale."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features
from kdlvfm.core.align import Resize, promote, standardise
from kdlvfm.core.aligner import Aligner, Target
from kdlvfm.core.distributed import gather_batch
from kdlvfm.core.projectors import Projector


def pkd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""One minus the Pearson correlation of two maps, channel by channel.

    .. math::
        L = \frac{1}{2} \, \mathrm{mean}\,\big((\hat F_S - \hat F_T)^2\big)
          = \frac{m - 1}{m} \Big(1 - \frac{1}{C} \sum_c r_c\Big)

    with :math:`\hat F` the map standardised for each channel over the m = B H W positions of the batch (unbiased
    deviation), and :math:`r_c` the correlation of channel c. A positive affine change of a channel changes nothing.

    A channel that is all but constant (deviation below 1e-3) is divided by 1e-3; the authors' code adds 1e-6 to every
    deviation instead, which multiplies the gradient of a constant channel by 10^6.

    Args:
        student: (B, C, H, W), already projected to the teacher's channels.
        teacher: (B, C, H, W); receives no gradient.

    Returns:
        A scalar from 0 to 2: the mean over channels. 0 for a single position, which correlates with nothing.

    Raises:
        ValueError: the shapes differ.

    Source:
        Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
        NeurIPS 2022.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 2, 2)
        >>> round(pkd_loss(-x, x).item(), 6)
        1.5
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"features must have one shape, not {tuple(student.shape)} (student) and {tuple(teacher.shape)} (teacher)."
        )
    positions = student[:, 0].numel()
    # With biased deviations half the squared distance is 1 - r; the unbiased ones of the paper shrink both sides alike.
    distance = F.mse_loss(standardise(promote(student)), standardise(promote(teacher.detach()))) / 2
    return distance * (positions - 1) / positions


class PKD(Distiller):
    """Correlation of feature maps, insensitive to the mean and the scale of every channel.

    The choice for networks of different kinds: a ViT's few channels of very large norm weigh as much as any other. A
    detector's pyramid has one for each level, see `kdlvfm.core.levels`.

    Args:
        student_dim: channels of the student's map.
        teacher_dim: channels of the teacher's map.
        loss_weight: weight of the term: 6 for a Faster R-CNN, 10 for a RetinaNet in the authors' code.
        student_tap: the student's map.
        teacher_tap: the teacher's map.
        projector: what brings the student's channels to the teacher's, see `kdlvfm.core.projectors.build_projector`; by
            default a 1x1 convolution where they differ.
            The paper distils between pyramids of equal channels and needs none; that it is linear is ours.
        resize: who is resized where the maps differ in size, see `kdlvfm.core.align.match_size`. The authors' code
            resizes the student's map.
        target: the teacher's features before the loss standardises them, see `kdlvfm.core.aligner.Targets`.
        gather: take the statistics over the batches of all processes, which must be of one size. Off in the authors'
            code: each process has its own.

    Example:
        >>> import torch
        >>> pkd = PKD(student_dim=64, teacher_dim=192)
        >>> list(pkd({"map.-1": torch.rand(2, 64, 4, 4)}, {"map.-1": torch.rand(2, 192, 8, 8)}))
        ['pkd']
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        loss_weight: float = 6.0,
        student_tap: str = "map.-1",
        teacher_tap: str = "map.-1",
        projector: Projector | None = None,
        resize: Resize = "larger",
        target: Target = "raw",
        gather: bool = False,
    ) -> None:
        super().__init__()
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.loss_weight = loss_weight
        self.gather = gather
        # An offset of a channel changes nothing, so there is no bias.
        self.align = Aligner(student_dim, teacher_dim, projector=projector, resize=resize, target=target, bias=False)

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """Reads both channel counts from the taps."""
        return cls(**context.tap_dims(cls, hparams), **hparams)

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The term `pkd`."""
        del target
        first, second = student[self.student_taps[0]], teacher[self.teacher_taps[0]].detach()
        if self.gather:
            first, second = gather_batch(first), gather_batch(second)
        return {"pkd": self.loss_weight * pkd_loss(*self.align(first, second))}
