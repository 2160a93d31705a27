# SPDX-License-Identifier: Apache-2.0
"""OFA: every stage of the student, projected to class logits, learns the teacher's class probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features
from kdlvfm.core.align import Resize, match_size, promote, resize_labels


def ofa_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    epsilon: float = 1.0,
    *,
    ignore_index: int = 255,
) -> Tensor:
    r"""Cross-entropy to the teacher's class probabilities, in which the labelled class may count for more.

    .. math::
        L = - \frac{1}{|V|} \sum_{v \in V} \sum_k \big((p_T^k + y^k)^\epsilon - y^k\big) \log p_S^k, \quad
        p = \sigma(z)

    over the labelled samples or positions V, y being the label as a one-hot vector. With epsilon 1 it is the
    cross-entropy H(p_T, p_S), and labels only say where it is taken; it is least, but not 0, at equality.

    Args:
        student_logits: (B, K) or (B, K, H, W).
        teacher_logits: same shape; receives no gradient.
        target: (B) or (B, H, W) labels; samples or positions below 0 (unlabelled) or equal to `ignore_index` are left
            out.
        epsilon: at least 0; 1 is the default of the authors' code, whose scripts go up to 1.5. Above 1 the labelled
            class counts for more, and the other classes for less.
        ignore_index: the label that is left out.

    Returns:
        A scalar: the mean over labelled samples or positions, 0 if there are none.

    Raises:
        ValueError: the logits differ in shape, `target` does not fit them, or `epsilon` is negative.

    Source:
        Hao et al., "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation",
        NeurIPS 2023. On pixels it is ours: each labelled one is a sample.

    Example:
        >>> student, teacher = torch.zeros(1, 2), torch.tensor([[0.25, 0.75]]).log()
        >>> round(ofa_loss(student, teacher, torch.tensor([0])).item(), 6)
        0.693147
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"logits must have one shape, not {tuple(student_logits.shape)} (student) and "
            f"{tuple(teacher_logits.shape)} (teacher); resize the maps and check the number of classes."
        )
    if target.shape != student_logits[:, 0].shape:
        raise ValueError(
            f"target {tuple(target.shape)} does not fit logits {tuple(student_logits.shape)}: it must be theirs "
            "without the classes."
        )
    if epsilon < 0:
        raise ValueError(f"epsilon must be at least 0, not {epsilon}.")
    labelled = ((target >= 0) & (target != ignore_index)).unsqueeze(1)
    # Replaced before anything is computed: a logit that is not finite would reach the gradient through 0 * inf.
    student = promote(student_logits).masked_fill(~labelled, 0).log_softmax(1)
    teacher = promote(teacher_logits.detach()).masked_fill(~labelled, 0).softmax(1)
    label = torch.zeros_like(teacher).scatter(1, target.unsqueeze(1) * labelled, 1.0)
    weights = ((teacher + label) ** epsilon - label) * labelled
    return -(weights * student).sum() / labelled.sum().clamp(min=1)


class OFA(Distiller):
    """One-for-all distillation of logits: of the student's own and of those that each of its stages predicts.

    In the logits of a teacher nothing is left of its architecture, so that a CNN can learn from a ViT at every depth.
    The projector of a stage is a separable convolution and a classifier; for a classifier's teacher its logits are
    averaged over positions, as in the paper, whose projectors for CNNs also shrink the map on the way. Keeping it, and
    so distilling pixels, is ours.

    Args:
        stages: channels of the student's maps by tap, such as `{"map.-2": 256, "map.-1": 512}`.
        num_classes: channels of the logits.
        loss_weight: weight of the term on the student's own logits; 1 in the authors' code.
        stage_weight: weight of the term on the stages, the sum over them; 1 in the authors' code.
        epsilon: exponent, see `ofa_loss`: one for all, or one for each stage and a last one for the logits.
        ignore_index: label of void pixels.
        student_tap: tap of the student's logits.
        teacher_tap: tap of the teacher's logits.
        resize: who is resized where dense logits differ in size, see `kdlvfm.core.align.match_size`. With `"teacher"`
            each stage is compared on its own grid, which takes the least memory.

    Example:
        >>> ofa = OFA({"map.-2": 8, "map.-1": 16}, num_classes=3)
        >>> student = {tap: torch.rand(2, dim, 4, 4) for tap, dim in (("map.-2", 8), ("map.-1", 16), ("logits", 3))}
        >>> list(ofa(student, {"logits": torch.rand(2, 3, 4, 4)}, torch.zeros(2, 4, 4, dtype=torch.int64)))
        ['ofa', 'ofa_stages']
    """

    needs_truth = True

    def __init__(
        self,
        stages: Mapping[str, int],
        num_classes: int,
        *,
        loss_weight: float = 1.0,
        stage_weight: float = 1.0,
        epsilon: float | Sequence[float] = 1.0,
        ignore_index: int = 255,
        student_tap: str = "logits",
        teacher_tap: str = "logits",
        resize: Resize = "larger",
    ) -> None:
        super().__init__()
        if not stages or student_tap in stages:
            raise ValueError(f"stages must name at least one map, and not {student_tap!r}, which is distilled anyway.")
        epsilons = tuple(epsilon) if isinstance(epsilon, Sequence) else (epsilon,) * (len(stages) + 1)
        if len(epsilons) != len(stages) + 1:
            raise ValueError(
                f"epsilon must be one number or {len(stages) + 1}, for each stage and the logits, not {len(epsilons)}."
            )
        self.student_taps, self.teacher_taps = (*stages, student_tap), (teacher_tap,)
        self.loss_weight = loss_weight
        self.stage_weight = stage_weight
        self.epsilons = epsilons
        self.ignore_index = ignore_index
        self.resize = resize
        self.projectors = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False),
                nn.Conv2d(dim, dim, 1, bias=False),
                nn.BatchNorm2d(dim),
                nn.ReLU(),
                nn.Conv2d(dim, num_classes, 1),
            )
            for dim in stages.values()
        )

    @classmethod
    def from_context(cls, context: Context, *, stage_taps: Sequence[str] | None = None, **hparams: Any) -> Self:
        """Reads the channels of `stage_taps`, or of the student's last four maps, and the number of classes."""
        if stage_taps is None:
            stage_taps = [tap for tap in context.student.taps() if tap.startswith("map.")][-4:]
        stages = {tap: context.student.tap_info(tap).dim for tap in stage_taps}
        return cls(stages, context.num_classes, **hparams)

    def forward(self, student: Features, teacher: Features, target: Tensor | None = None) -> dict[str, Tensor]:
        """The terms `ofa` and `ofa_stages`; `target` is (B, H, W), or (B) for a classifier."""
        if target is None:
            raise ValueError("OFA needs labels, and there is no target; KD needs none.")
        *stages, own = self.student_taps
        logits = [projector(student[tap]) for tap, projector in zip(stages, self.projectors, strict=True)]
        losses = [
            self._compare(found, teacher[self.teacher_taps[0]], target, epsilon)
            for found, epsilon in zip([*logits, student[own]], self.epsilons, strict=True)
        ]
        return {
            "ofa": self.loss_weight * losses[-1],
            "ofa_stages": self.stage_weight * torch.stack(losses[:-1]).sum(),
        }

    def _compare(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, epsilon: float) -> Tensor:
        if teacher_logits.dim() == 4:
            student_logits, teacher_logits = match_size(student_logits, teacher_logits, self.resize)
            target = resize_labels(target, student_logits.shape[-2:])
        elif student_logits.dim() == 4:
            student_logits = student_logits.mean((2, 3))
        return ofa_loss(student_logits, teacher_logits, target, epsilon, ignore_index=self.ignore_index)
