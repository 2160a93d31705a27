# SPDX-License-Identifier: Apache-2.0
"""MasKD: the teacher's map is regressed where learned masks say that it matters for the task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdlvfm.core import Features, Step
from kdlvfm.core.align import Resize, promote
from kdlvfm.core.aligner import Aligner, Target
from kdlvfm.core.learned_masks import MaskedTask, MaskLearner, ReceptiveTokens, mask_diversity_loss
from kdlvfm.core.projectors import Projector


def maskd_loss(student: Tensor, teacher: Tensor, masks: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""Squared distance of two feature maps inside masks, relative to the size of each mask.

    .. math:: L = \frac{1}{B} \sum_{b,t} w_{bt} \, \frac{1}{C} \sum_c
        \frac{\sum_i \big(m_{bti} (F_S - F_T)_{bci}\big)^2}{\sum_i m_{bti}}

    Args:
        student: (B, C, H, W), already projected to the teacher's channels.
        teacher: (B, C, H, W); receives no gradient.
        masks: (B, T, H, W) from 0 to 1; they receive no gradient.
        weights: (B, T), w; `None` weighs the T masks alike, with 1 / T. They receive no gradient.

    Returns:
        A scalar: the mean over samples and channels, the weighted sum over masks.

    Raises:
        ValueError: the shapes do not fit.

    Source:
        Huang et al., "Masked Distillation with Receptive Tokens", ICLR 2023.

    Example:
        >>> student, teacher = torch.zeros(1, 2, 1, 2), torch.tensor([3.0, 1.0]).expand(1, 2, 1, 2)
        >>> maskd_loss(student, teacher, torch.eye(2).view(1, 2, 1, 2)).item()
        5.0
    """
    if student.dim() != 4 or student.shape != teacher.shape:
        raise ValueError(
            f"maps must have one shape (B, C, H, W), not {tuple(student.shape)} (student) and "
            f"{tuple(teacher.shape)} (teacher)."
        )
    batch, _, *size = student.shape
    if masks.dim() != 4 or (len(masks), *masks.shape[2:]) != (batch, *size):
        raise ValueError(f"masks {tuple(masks.shape)} do not fit maps {tuple(student.shape)}: make them (B, T, H, W).")
    if weights is not None and weights.shape != masks.shape[:2]:
        raise ValueError(f"weights {tuple(weights.shape)} do not fit masks {tuple(masks.shape)}: make them (B, T).")
    error = (promote(student) - promote(teacher.detach())).square().mean(dim=1, keepdim=True)
    inside = promote(masks.detach())
    losses = (inside.square() * error).sum((2, 3)) / inside.sum((2, 3)).clamp(min=1e-5)
    if weights is None:
        return losses.mean()
    return (promote(weights.detach()) * losses).sum() / batch


class MasKD(MaskLearner):
    """Regression of the teacher's map inside masks, which are learned with the task's loss and then kept.

    A mask shows how much the features at each position point the way of a learned token. In the first part of the run
    each step moves the masks, a group of parameters of their own, on the task's loss on the teacher's map under all of
    them, and on their overlap. The student distils from its first step on: before they have learned, masks are near 1/2
    everywhere, and the loss is a plain regression. `recipe.groups.masks` gives the group an optimizer of its own: the
    authors' is SGD with a learning rate of 0.1 for segmenters.

    The authors learn the masks in a run of its own, through the teacher's head. Where the teacher has a head for the
    task that reads `teacher_tap` (`decoder` of a teacher from a run), that is what happens here, too. A foundation
    model has none: then a linear head is learned along with the masks. That head is ours, as is learning the masks in
    the first part of the run that distils.

    Args:
        student_dim: channels of the student's map.
        teacher_dim: channels of the teacher's map.
        num_classes: classes of the linear head; `None` where the teacher's own head reads the map.
        loss_weight: weight of the term `maskd`; 1 in the authors' code for detectors' maps, 0.5 for segmenters' logits.
        num_tokens: masks; 8 in the authors' code for segmentation, 6 for detection.
        diversity_weight: weight of the masks' overlap, see `kdlvfm.core.learned_masks.mask_diversity_loss`.
        mask_share: share of the run in which masks are learned; the authors' 10 000 steps are to 40 000 of distillation
            what this is to the whole.
        weighted: weigh the masks for each image by a small network, learned with them, as in the authors' code for
            detectors; not in theirs for segmentation.
        customised: multiply the masks by those that the tokens make of the student's own map, as in the authors' code
            for detectors after an epoch; not in theirs for segmentation.
        student_tap: the student's map.
        teacher_tap: the teacher's map.
        projector: what brings the student's channels to the teacher's, see `kdlvfm.core.projectors.build_projector`.
        resize: who is resized where the maps differ in size, see `kdlvfm.core.align.match_size`.
        target: how the teacher's features are normalised, for the loss and for the tokens; see
            `kdlvfm.core.aligner.Targets`. `"raw"` is the paper; a ViT's channels of very large norm would fill or empty
            all masks.

    Raises:
        ValueError: no token, a share that is none, or an option is none of those there are.

    Example:
        >>> maskd = MasKD(student_dim=64, teacher_dim=96, num_classes=5)
        >>> list(maskd({"map.-1": torch.rand(2, 64, 4, 4)}, {"map.-1": torch.rand(2, 96, 8, 8)}))
        ['maskd']
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        num_classes: int | None = None,
        *,
        loss_weight: float = 1.0,
        num_tokens: int = 8,
        diversity_weight: float = 1.0,
        mask_share: float = 0.25,
        weighted: bool = False,
        customised: bool = False,
        student_tap: str = "map.-1",
        teacher_tap: str = "map.-1",
        projector: Projector | None = "linear",
        resize: Resize = "larger",
        target: Target = "standardize",
    ) -> None:
        super().__init__(
            Aligner(student_dim, teacher_dim, projector=projector, resize=resize, target=target),
            MaskedTask(teacher_tap, teacher_dim, num_classes),
            mask_share,
        )
        if num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, not {num_tokens}.")
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.loss_weight = loss_weight
        self.diversity_weight = diversity_weight
        self.customised = customised
        self.tokens = ReceptiveTokens(num_tokens, teacher_dim)
        self.weigher: nn.Sequential | None = None
        if weighted:
            self.weigher = nn.Sequential(
                nn.Conv2d(teacher_dim, teacher_dim, kernel_size=3, padding=1),
                nn.AdaptiveAvgPool2d(1),
                nn.Conv2d(teacher_dim, num_tokens, kernel_size=1),
                nn.Flatten(),
            )

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The term `maskd`, by the masks as they are."""
        del target
        projected, goal = self.align(student[self.student_taps[0]], teacher[self.teacher_taps[0]])
        with torch.no_grad():
            masks, weights = self.tokens(goal), self._weights(goal)
            if self.customised:
                masks = masks * self.tokens(projected)
        return {"maskd": self.loss_weight * maskd_loss(projected, goal, masks, weights)}

    def mask_terms(self, step: Step, features: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The task's on the map under all masks, and the masks' overlap."""
        goal = self.align.targets(features)
        masks, weights = self.tokens(goal), self._weights(goal)
        share = masks if weights is None else masks * weights[:, :, None, None]
        masked = self.masked_task.shown(features, goal) * share.sum(dim=1, keepdim=True)
        overlap = {}
        if masks.shape[1] > 1 and self.diversity_weight:
            overlap["mask_diversity"] = self.diversity_weight * mask_diversity_loss(masks)
        return self.masked_task(step, masked), overlap

    def _weights(self, features: Tensor) -> Tensor | None:
        """How much each mask counts in an image, (B, T), 1 in all; `None` for all alike."""
        return None if self.weigher is None else promote(self.weigher(features)).softmax(dim=1)
