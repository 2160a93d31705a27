# SPDX-License-Identifier: Apache-2.0
"""Agglomerate: the student regresses the features of several teachers at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features
from kdlvfm.core.align import Resize, check_levels, cosines, promote
from kdlvfm.core.aligner import Aligner, Target
from kdlvfm.core.phi_s import PHISTransform
from kdlvfm.core.projectors import Projector

__all__ = ["Agglomerate", "PHISTransform", "cosine_smooth_l1_loss"]


def cosine_smooth_l1_loss(student: Tensor, teacher: Tensor, cosine_weight: float = 0.9) -> Tensor:
    r"""Directions of feature vectors, and a little of their lengths.

    .. math::
        L = w\,\big(1 - \mathrm{mean}\,\cos(F_S, F_T)\big)
            + (1 - w)\,\mathrm{mean}\,\mathrm{smooth}_{L1}(F_S - F_T), \quad
        \mathrm{smooth}_{L1}(d) = \begin{cases} d^2 / 2 & |d| < 1 \\ |d| - 1/2 & \text{else} \end{cases}

    Args:
        student: (B, C) or (B, C, H, W), already projected to the teacher's channels.
        teacher: same shape; receives no gradient.
        cosine_weight: w, from 0 to 1: 0.9 in AM-RADIO, which trains its summary tokens with 1; 0.5 in UNIC.

    Returns:
        A scalar: cosines averaged over samples and positions, smooth L1 over all elements.

    Raises:
        ValueError: the shapes differ.

    Source:
        Ranzinger et al., "AM-RADIO: Agglomerative Vision Foundation Model", CVPR 2024.

    Example:
        >>> student, teacher = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
        >>> round(cosine_smooth_l1_loss(student, teacher).item(), 6)  # 0.9 * 1 + 0.1 * (2.5 + 3.5) / 2
        1.2
    """
    return _by_image(student, teacher, cosine_weight).mean()


def _by_image(student: Tensor, teacher: Tensor, cosine_weight: float) -> Tensor:
    """`cosine_smooth_l1_loss` of each image, (B,)."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"features must have one shape, not {tuple(student.shape)} (student) and {tuple(teacher.shape)} (teacher)."
        )
    student, teacher = promote(student), promote(teacher.detach())
    cosine = cosines(student, teacher)
    distance = F.smooth_l1_loss(student, teacher, reduction="none")
    angle, length = (x.flatten(1).mean(dim=1) for x in (1 - cosine.unsqueeze(1), distance))
    return cosine_weight * angle + (1 - cosine_weight) * length


class Agglomerate(Distiller):
    r"""`cosine_smooth_l1_loss` to the features of each of several teachers, through a projector for each.

    The teacher of the run is then an ensemble (`teacher=ensemble`), and its taps are `<teacher>/<tap>`. The terms
    `agglomerate_<teacher>` add up to

    .. math::
        L = \frac{\sum_{t,b} c_{t b} L_{t b}}{\sum_{t,b} c_{t b}}

    over teachers t and images b, where L_tb is averaged over the taps of a teacher. In *teacher dropping* an image
    hears the teacher that it follows worst, c = 1, and each of the others with a probability only, so that none is left
    behind. A single teacher, of an ensemble or plain, works too; the term of a plain one is `agglomerate`.

    Ranzinger et al., "AM-RADIO: Agglomerative Vision Foundation Model", CVPR 2024, which sums over teachers and drops
    none; targets: Ranzinger et al., "PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation", ICLR
    2025; mean over teachers and teacher dropping: Sariyildiz et al., "UNIC: Universal Classification Models via
    Multi-teacher Distillation", ECCV 2024.

    Args:
        student_dims: channels of the student's feature, for each pair of taps.
        teacher_dims: channels of the teacher's feature, for each pair of taps.
        loss_weight: weight of the terms; 1 in both papers, which have no other loss.
        cosine_weight: see `cosine_smooth_l1_loss`.
        teacher_drop: probability that an image does not hear a teacher which is not its worst; 0.5 in UNIC, 0 turns
            dropping off.
        student_taps: the student's features: maps, or `pooled`.
        teacher_taps: the teachers' features, as many; a map is paired with a map, and `pooled` with `pooled`.
        projector: one for each pair, see `kdlvfm.core.projectors.build_projector`. Both papers have perceptrons.
        resize: who is resized where maps differ in size, see `kdlvfm.core.align.match_size`.
        target: how the teachers' features are normalised, which makes them comparable: `"phi_s"` (RADIO), `"ema"`
            (UNIC) or another, see `kdlvfm.core.aligner.Targets`.

    Raises:
        ValueError: taps and dimensions are not equally many, or an option is none of those there are.

    Example:
        >>> method = Agglomerate([64, 64], [96, 32], student_taps=["map.-1"] * 2, teacher_taps=["a/map.5", "b/map.2"])
        >>> student = {"map.-1": torch.rand(2, 64, 4, 4)}
        >>> teacher = {"a/map.5": torch.rand(2, 96, 8, 8), "b/map.2": torch.rand(2, 32, 2, 2)}
        >>> list(method(student, teacher))
        ['agglomerate_a', 'agglomerate_b']
    """

    def __init__(
        self,
        student_dims: Sequence[int],
        teacher_dims: Sequence[int],
        *,
        loss_weight: float = 1.0,
        cosine_weight: float = 0.9,
        teacher_drop: float = 0.5,
        student_taps: Sequence[str] = ("map.-1",),
        teacher_taps: Sequence[str] = ("map.-1",),
        projector: Projector | None = "mlp",
        resize: Resize = "larger",
        target: Target = "phi_s",
    ) -> None:
        super().__init__()
        check_levels(
            student_dims=student_dims, teacher_dims=teacher_dims, student_taps=student_taps, teacher_taps=teacher_taps
        )
        for name, share in (("cosine_weight", cosine_weight), ("teacher_drop", teacher_drop)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be from 0 to 1, not {share}.")
        self.student_taps, self.teacher_taps = tuple(student_taps), tuple(teacher_taps)
        self.loss_weight = loss_weight
        self.cosine_weight = cosine_weight
        self.teacher_drop = teacher_drop
        self.aligners = nn.ModuleList(
            Aligner(*dims, projector=projector, resize=resize, target=target)
            for dims in zip(student_dims, teacher_dims, strict=True)
        )

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """Reads the channels from the taps: by default the last map of every teacher, and that of the student."""
        if "teacher_taps" not in hparams:
            members = dict.fromkeys(tap.rpartition("/")[0] for tap in context.require_teacher().taps())
            hparams["teacher_taps"] = [f"{member}/map.-1" if member else "map.-1" for member in members]
        if "student_taps" not in hparams:
            hparams["student_taps"] = ["map.-1"] * len(hparams["teacher_taps"])
        return cls(**context.level_dims(cls, hparams), **hparams)

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """One term for each teacher; 0 in a step in which no image of the batch hears it."""
        del target
        by_teacher: dict[str, list[Tensor]] = {}
        for own, other, aligner in zip(self.student_taps, self.teacher_taps, self.aligners, strict=True):
            projected, goal = aligner(student[own], teacher[other])
            by_teacher.setdefault(other.rpartition("/")[0], []).append(_by_image(projected, goal, self.cosine_weight))
        losses = torch.stack([torch.stack(levels).mean(dim=0) for levels in by_teacher.values()])
        heard = self._heard(losses.detach())
        terms = self.loss_weight * (losses * heard).sum(dim=1) / heard.sum()
        names = [f"agglomerate_{name}" if name else "agglomerate" for name in by_teacher]
        return dict(zip(names, terms, strict=True))

    def _heard(self, losses: Tensor) -> Tensor:
        """Which teachers (T, B) each image hears, as 1 and 0, from its losses (T, B)."""
        if not self.training or self.teacher_drop == 0 or len(losses) == 1:
            return torch.ones_like(losses)
        kept = torch.rand_like(losses) >= self.teacher_drop
        return kept.scatter(0, losses.argmax(dim=0, keepdim=True), value=True).to(losses)
