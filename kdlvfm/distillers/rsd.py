# SPDX-License-Identifier: Apache-2.0
"""RSD: each dimension of the student's embedding, through a head, correlates with the teacher's same one only."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features
from kdlvfm.core.align import Resize, match_size, promote
from kdlvfm.core.distributed import gather_batch


def rsd_loss(
    student: Tensor, teacher: Tensor, kappa: float = 0.01, *, reduction: Literal["sum", "per_dim"] = "sum"
) -> Tensor:
    r"""Distance of the cross-correlation matrix of two embeddings from the identity.

    .. math::
        L = \sum_i (C_{ii} - 1)^2 + \kappa \sum_{i \ne j} C_{ij}^2, \quad
        C = \tfrac{1}{B} \tilde Z_T^\top \tilde Z_S

    where each column of :math:`\tilde Z` has zero mean and unit (biased) variance over the B samples. The second sum
    also punishes what the teacher itself holds twice, so the loss of two equal embeddings is not 0 unless their
    dimensions are uncorrelated.

    Args:
        student: (B, D), already mapped to the teacher's dimension; at least 2 samples, and about 64, the authors'
            least, for correlations that mean something. Between 2 samples every correlation is 1 or -1: what the
            student does changes nothing but signs, and where one changes the gradient has hardly a bound.
        teacher: (B, D); receives no gradient.
        kappa: weight of the off-diagonal entries; 0.01 in the paper.
        reduction: `"sum"` is the paper's; `"per_dim"`, ours, divides by D, so that one weight fits all teachers.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ, are not (B, D), or there is one sample.

    Source:
        Zhang et al., "Cross-Architecture Distillation Made Simple with Redundancy Suppression", ICCV 2025.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0], [-1.0], [0.0]])
        >>> round(rsd_loss(x, -x).item(), 3)
        4.0
    """
    if student.shape != teacher.shape or student.dim() != 2:
        raise ValueError(
            f"embeddings must have one shape (B, D), not {tuple(student.shape)} (student) and "
            f"{tuple(teacher.shape)} (teacher)."
        )
    if len(student) < 2:
        raise ValueError("one sample has no correlations: RSD needs a batch of at least 3, better 64.")
    if reduction not in ("sum", "per_dim"):
        raise ValueError(f"reduction must be 'sum' or 'per_dim', not {reduction!r}.")
    first, second = _standardise(promote(student)), _standardise(promote(teacher.detach()))
    with torch.autocast(student.device.type, enabled=False):
        correlation = second.mT @ first / student.shape[0]
    diagonal = correlation.diagonal()
    loss = (diagonal - 1).square().sum() + kappa * (correlation - diagonal.diag()).square().sum()
    return loss if reduction == "sum" else loss / student.shape[1]


def _standardise(embedding: Tensor) -> Tensor:
    std, mean = torch.std_mean(embedding, dim=0, correction=0)
    # 1e-5 is the authors'; the floor, ours, keeps the gradient of a dimension that is constant from growing 10^5 times.
    return (embedding - mean) / (std.clamp(min=1e-3) + 1e-5)


class AAD(nn.Sequential):
    """The architecture-agnostic decoupling head: (N, D_S) to (N, D_T), through a wider layer with batch statistics.

    Args:
        student_dim: D_S.
        teacher_dim: D_T.
        expansion: width of the hidden layer over D_S; 2 in the paper.
    """

    def __init__(self, student_dim: int, teacher_dim: int, expansion: int = 2) -> None:
        hidden = expansion * student_dim
        super().__init__(
            nn.Linear(student_dim, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.GELU(),
            nn.Linear(hidden, teacher_dim, bias=False),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)


class RSD(Distiller):
    """Redundancy suppression between image embeddings (the paper) or between positions of two maps (ours).

    Args:
        student_dim: channels of the student's tap.
        teacher_dim: channels of the teacher's tap.
        mode: `"pooled"`: one sample is an image, of which a batch must have 3, and maps are averaged over positions;
            `"dense"`, not in the paper: one sample is a position of the two maps on one grid.
        loss_weight: weight of the term; 0.1 in the authors' code, for teachers of 384 to 1024 dimensions.
        kappa: weight of the off-diagonal entries.
        expansion: width of the head's hidden layer over `student_dim`.
        reduction: see `rsd_loss`.
        positions: at most so many positions of each image, drawn at random, in mode `"dense"`; 256 is ours.
        student_tap: a map, or (B, D) such as `pooled` in mode `"pooled"`.
        teacher_tap: the same of the teacher.
        resize: who is resized where maps differ in size, in mode `"dense"`; see `kdlvfm.core.align.match_size`.
        gather: correlate over the batches of all processes, which the head's batch normalisation then sees too. The
            authors correlate over each process's own.

    Example:
        >>> import torch
        >>> rsd = RSD(student_dim=64, teacher_dim=192)
        >>> list(rsd({"map.-1": torch.rand(8, 64, 4, 4)}, {"map.-1": torch.rand(8, 192, 8, 8)}))
        ['rsd']
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        mode: Literal["pooled", "dense"] = "pooled",
        loss_weight: float = 0.1,
        kappa: float = 0.01,
        expansion: int = 2,
        reduction: Literal["sum", "per_dim"] = "sum",
        positions: int = 256,
        student_tap: str = "map.-1",
        teacher_tap: str = "map.-1",
        resize: Resize = "larger",
        gather: bool = False,
    ) -> None:
        super().__init__()
        if mode not in ("pooled", "dense"):
            raise ValueError(f"mode must be 'pooled' or 'dense', not {mode!r}.")
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.mode = mode
        self.loss_weight = loss_weight
        self.kappa = kappa
        self.reduction: Literal["sum", "per_dim"] = reduction
        self.positions = positions
        self.resize = resize
        self.gather = gather
        self.projector = AAD(student_dim, teacher_dim, expansion)

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """Reads both channel counts from the taps.

        Raises:
            ValueError: batches of 1 or 2 images in pooled mode, between which correlations say nothing.
        """
        distiller = cls(**context.tap_dims(cls, hparams), **hparams)
        if distiller.mode == "pooled" and context.batch_shape is not None and context.batch_shape[0] < 3:
            raise ValueError(
                f"RSD correlates over samples, and {context.batch_shape[0]} of them have no correlations but 1 and -1: "
                "it needs at least 3, better 64. Pass a larger batch, or mode=dense, whose samples are positions."
            )
        return distiller

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The term `rsd`."""
        del target
        first, second = promote(student[self.student_taps[0]]), promote(teacher[self.teacher_taps[0]])
        if self.mode == "dense":
            first, second = self._positions(*match_size(first, second, self.resize))
        else:
            first, second = (x.mean(dim=(2, 3)) if x.dim() == 4 else x for x in (first, second))
        if self.gather:
            first, second = gather_batch(first), gather_batch(second)
        if len(first) < 2:  # here as well: the head's batch normalisation comes before the loss
            raise ValueError("one sample has no correlations: pass a batch of at least 3, or mode=dense.")
        loss = rsd_loss(self.projector(first), second, self.kappa, reduction=self.reduction)
        return {"rsd": self.loss_weight * loss}

    def _positions(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The same random positions of both maps, as rows."""
        rows = [x.flatten(2).transpose(1, 2) for x in (student, teacher)]
        count = rows[0].shape[1]
        if count > self.positions:
            chosen = torch.rand(len(student), count, device=student.device).argsort(dim=1)[:, : self.positions, None]
            rows = [x.take_along_dim(chosen, dim=1) for x in rows]
        return rows[0].flatten(0, 1), rows[1].flatten(0, 1)
