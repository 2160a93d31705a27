# SPDX-License-Identifier: Apache-2.0
"""AT: where the student's activations are strong, the teacher's are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features
from kdlvfm.core.align import Resize, match_size, normalise_target, promote
from kdlvfm.core.blocks import check_first_derivative


def attention_transfer_loss(student: Tensor, teacher: Tensor, power: int = 2) -> Tensor:
    r"""Mean squared difference between two spatial attention maps.

    .. math::
        L = \frac{1}{B H W} \sum_b \big\| Q_S^b - Q_T^b \big\|_2^2, \quad
        Q = \frac{A}{\|A\|_2}, \quad A_i = \frac{1}{C} \sum_c |F_{c,i}|^p

    with i over the H W positions. The scale of a sample, the sign and the order of channels change nothing.

    Args:
        student: (B, C_S, H, W); no projector is needed, the numbers of channels may differ.
        teacher: (B, C_T, H, W); receives no gradient.
        power: p; 2 in the authors' code.

    Returns:
        A scalar: the mean over samples and positions, as in the re-runs of mdistiller and CIRKD. The paper has the norm
        of the difference for each sample instead of the mean of its square.

    Raises:
        ValueError: batch or size differ, or `power` is below 1.

    Source:
        Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[[[3.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]], [[0.0, 2.0]]]])
        >>> attention_transfer_loss(student, teacher).item()
        1.0
    """
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"maps must have one batch and size, not {tuple(student.shape)} (student) and {tuple(teacher.shape)} "
            "(teacher); only the channels may differ."
        )
    if power < 1:
        raise ValueError(f"power must be at least 1, not {power}.")
    return F.mse_loss(_attention(promote(student), power), _attention(promote(teacher.detach()), power))


def _attention(x: Tensor, power: int) -> Tensor:
    """Attention over the positions of each sample, (B, H W), of unit length; 0 where all is 0."""
    mean: Tensor = _PowerMean.apply(x.flatten(2), power)
    return F.normalize(mean, dim=1)


class _PowerMean(Function):
    """Mean of |x|^p over the channels of (B, C, N), in units of each sample's peak, which has no gradient.

    The scale of a sample cancels in its attention; taken out, no power of it over- or underflows. As one function it
    holds the map itself for the backward pass, and nothing else of that size.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, power: int) -> Tensor:
        peak = torch.maximum(-x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True))
        unit = peak.reciprocal().masked_fill(peak < torch.finfo(x.dtype).tiny, 0)
        ctx.save_for_backward(x, unit)
        ctx.power = power
        return (x * unit).abs_().pow_(power).mean(1)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        check_first_derivative()
        x, unit = ctx.saved_tensors
        scaled = x * unit
        if ctx.power != 2:
            scaled = scaled.abs().pow_(ctx.power - 1).mul_(scaled.sign())
        return scaled.mul_(ctx.power / x.shape[1] * slope.unsqueeze(1) * unit), None


class AT(Distiller):
    """Attention transfer at one or several pairs of maps, the sum over the pairs.

    Args:
        loss_weight: weight of the term. 1000 is mdistiller's for each pair on CIFAR-100, whose maps have about as many
            positions as a ViT's; CIRKD's re-run for segmentation uses 10 000 on maps of 64 x 128. The loss is about as
            small as its number of positions is large: for detection `from_context` takes 10 (ours), since the coarsest
            levels of a pyramid have few.
        power: exponent of the activations.
        student_taps: the student's maps.
        teacher_taps: the teacher's maps, one for each of the student's; one map may be named several times.
        resize: who is resized where maps differ in size, see `kdlvfm.core.align.match_size`.
        target: `"standardize"` (ours) brings each channel of the teacher to zero mean and unit variance over the batch
            first, since the few channels of very large norm in a ViT otherwise are the whole attention, nearly the same
            at all positions. `"raw"` is the paper, for CNN teachers.

    Example:
        >>> import torch
        >>> at = AT(student_taps=("map.-2", "map.-1"), teacher_taps=("map.5", "map.-1"))
        >>> student = {"map.-2": torch.rand(2, 8, 8, 8), "map.-1": torch.rand(2, 16, 4, 4)}
        >>> list(at(student, {"map.5": torch.rand(2, 12, 6, 6), "map.-1": torch.rand(2, 12, 6, 6)}))
        ['attention_transfer']
    """

    def __init__(
        self,
        *,
        loss_weight: float = 1000.0,
        power: int = 2,
        student_taps: Sequence[str] = ("map.-1",),
        teacher_taps: Sequence[str] = ("map.-1",),
        resize: Resize = "larger",
        target: Literal["raw", "standardize"] = "standardize",
    ) -> None:
        super().__init__()
        if len(student_taps) != len(teacher_taps) or not student_taps:
            raise ValueError(
                f"student_taps {list(student_taps)} and teacher_taps {list(teacher_taps)} must pair up: as many of "
                "one as of the other, and at least one."
            )
        if target not in ("raw", "standardize"):
            raise ValueError(
                f"target must be 'raw' or 'standardize', not {target!r}; after a layernorm all positions have one "
                "length, and there is no attention left."
            )
        self.pairs = tuple(zip(student_taps, teacher_taps, strict=True))
        self.student_taps, self.teacher_taps = tuple(dict.fromkeys(student_taps)), tuple(dict.fromkeys(teacher_taps))
        self.loss_weight = loss_weight
        self.power = power
        self.resize = resize
        self.target = target

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """As the constructor, with a weight of its own for detection."""
        return cls(**{**({"loss_weight": 10.0} if context.task.truth == "boxes" else {}), **hparams})

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The term `attention_transfer`."""
        del target
        losses = []
        for student_tap, teacher_tap in self.pairs:
            goal = normalise_target(promote(teacher[teacher_tap]), self.target)
            pair = match_size(promote(student[student_tap]), goal, self.resize)
            losses.append(attention_transfer_loss(*pair, self.power))
        return {"attention_transfer": self.loss_weight * torch.stack(losses).sum()}
