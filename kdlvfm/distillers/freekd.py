# SPDX-License-Identifier: Apache-2.0
"""FreeKD: the wavelet bands of the teacher's map are regressed where learned masks say that they matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlvfm.core import Features, Step
from kdlvfm.core.align import Resize, promote
from kdlvfm.core.aligner import Aligner, Target
from kdlvfm.core.learned_masks import MaskedTask, MaskLearner, ReceptiveTokens, mask_diversity_loss
from kdlvfm.core.projectors import Projector


def haar_bands(x: Tensor, levels: int) -> list[Tensor]:
    """The Haar wavelet transform of a map (B, C, H, W), which keeps lengths and is undone by `haar_inverse`.

    Sides that cannot be halved gain a copy of their last row or column; the released code adds zeros there, which make
    an edge of their own.

    Args:
        x: the map.
        levels: how often the low band is split further, at least 1.

    Returns:
        The low band (B, C, 1, h, w), then from the coarsest level to the finest the changes downwards, to the right and
        along the diagonal (B, C, 3, h, w).

    Raises:
        ValueError: `levels` is below 1.

    Example:
        >>> low, high = haar_bands(torch.tensor([[1.0, 3.0], [1.0, 3.0]]).view(1, 1, 2, 2), levels=1)
        >>> low.flatten().tolist(), high.flatten().tolist()
        ([4.0], [0.0, -2.0, 0.0])
    """
    if levels < 1:
        raise ValueError(f"levels must be at least 1, not {levels}.")
    low, bands = promote(x), []
    for _ in range(levels):
        batch, channels, height, width = low.shape
        even = F.pad(low, (0, width % 2, 0, height % 2), mode="replicate")
        squares = F.pixel_unshuffle(even, 2).view(batch, channels, 4, (height + 1) // 2, (width + 1) // 2)
        mixed = _mix(squares)
        low = mixed[:, :, 0]
        bands.append(mixed[:, :, 1:])
    return [low.unsqueeze(2), *reversed(bands)]


def haar_inverse(bands: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """The map (B, C, H, W) of `size` = (H, W) whose `haar_bands` these are."""
    low = bands[0].squeeze(2)
    for number, high in enumerate(bands[1:], start=1):
        squares = _mix(torch.cat([low.unsqueeze(2), high], dim=2))
        height, width = bands[number + 1].shape[3:] if number + 1 < len(bands) else size
        low = F.pixel_shuffle(squares.flatten(1, 2), 2)[..., :height, :width]
    return low


def _mix(squares: Tensor) -> Tensor:
    """Sums and differences of the four pixels of each square (B, C, 4, h, w); its own inverse."""
    signs = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]).to(squares)
    with torch.autocast(squares.device.type, enabled=False):
        return torch.einsum("pq,bcqhw->bcphw", signs / 2, squares)


def freekd_loss(student: Tensor, teacher: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
    r"""Absolute difference between the wavelet bands of two maps, inside masks.

    .. math:: L = \sum_\ell \mathrm{mean}_{b,t,c,o,i}\, m^\ell_{bti} \left| W^\ell(F_S) - W^\ell(F_T) \right|_{bcoi}

    over the bands of the Haar wavelet transform: first the low one, then the levels from the coarsest to the finest,
    each of which has three directions o.

    Args:
        student: (B, C, H, W), already projected to the teacher's channels.
        teacher: (B, C, H, W); receives no gradient.
        masks: one (B, T, h, w) for each band, from 0 to 1, on its grid; `None` leaves a band out, as the released code
            does with the low one. They receive no gradient.

    Returns:
        A scalar: the sum over bands of means over samples, masks, channels, directions and positions.

    Raises:
        ValueError: the shapes do not fit, or no level has a mask to go with.

    Source:
        Zhang et al., "FreeKD: Knowledge Distillation via Semantic Frequency Prompt", CVPR 2024, as in the released
        code.

    Example:
        >>> student, teacher = torch.zeros(1, 1, 2, 2), torch.tensor([[1.0, 3.0], [1.0, 3.0]]).view(1, 1, 2, 2)
        >>> round(freekd_loss(student, teacher, [None, torch.ones(1, 1, 1, 1)]).item(), 6)
        0.666667
    """
    if student.dim() != 4 or student.shape != teacher.shape:
        raise ValueError(
            f"maps must have one shape (B, C, H, W), not {tuple(student.shape)} (student) and "
            f"{tuple(teacher.shape)} (teacher)."
        )
    # The transform is linear.
    bands = haar_bands(promote(student) - promote(teacher.detach()), len(masks) - 1)
    losses = []
    for band, mask in zip(bands, masks, strict=True):
        if mask is None:
            continue
        if mask.dim() != 4 or (len(mask), *mask.shape[2:]) != (len(band), *band.shape[3:]):
            grid = (len(band), "T", *band.shape[3:])
            raise ValueError(f"a mask {tuple(mask.shape)} does not fit its band, which needs {grid}.")
        # Masks are not negative, so that the mean over masks may come first.
        inside = promote(mask.detach()).mean(dim=1)[:, None, None]
        losses.append((inside * band.abs()).mean())
    if not losses:
        raise ValueError("every mask is None, so no band is compared.")
    return torch.stack(losses).sum()


class FreeKD(MaskLearner):
    """Regression of the bands of the teacher's map inside masks, which are learned with the task's loss and then kept.

    A mask shows how much a band at each position, its directions summed, points the way of a learned token (a frequency
    prompt). In the first part of the run each step moves the masks, a group of parameters of their own, on two kinds
    of terms: the task's loss on the teacher's map put together again from bands under their masks, and how much the
    masks of a band overlap. The student distils from its first step on: before they have learned, masks are near 1/2
    everywhere. `recipe.groups.masks` gives the group an optimizer of its own.

    The authors learn the masks in a run of its own, through the teacher's head. Where the teacher has a head for the
    task that reads `teacher_tap` (`decoder` of a teacher from a run), that is what happens here, too. A foundation
    model has none: then a linear head is learned along with the masks. That head is ours, as is learning the masks in
    the first part of the run that distils.

    This is the released code. The paper weighs channels and positions besides, which the code does not.

    Args:
        student_dim: channels of the student's map.
        teacher_dim: channels of the teacher's map.
        num_classes: classes of the linear head; `None` where the teacher's own head reads the map.
        loss_weight: weight of the term `freekd`; 1 in the released code.
        map_weight: weight of the term `freekd_map`, the mean squared error of the maps themselves; 5 in the released
            code. 0 leaves it out.
        levels: of the wavelet transform; 3 in the released code.
        low: compare the low band, too. The released code learns its masks and leaves it to `freekd_map`.
        num_tokens: masks of each band; 6 in the released code.
        diversity_weight: weight of the masks' overlap, see `kdlvfm.core.learned_masks.mask_diversity_loss`.
        mask_share: share of the run in which masks are learned; ours.
        student_tap: the student's map.
        teacher_tap: the teacher's map.
        projector: what brings the student's channels to the teacher's, see `kdlvfm.core.projectors.build_projector`.
        resize: who is resized where the maps differ in size, see `kdlvfm.core.align.match_size`.
        target: how the teacher's features are normalised, for the losses and for the tokens; see
            `kdlvfm.core.aligner.Targets`. `"raw"` is the paper; a ViT's channels of very large norm would fill or empty
            all masks.

    Raises:
        ValueError: no token or level, a share that is none, or an option is none of those there are.

    Example:
        >>> freekd = FreeKD(student_dim=64, teacher_dim=96, num_classes=5)
        >>> list(freekd({"map.-1": torch.rand(2, 64, 4, 4)}, {"map.-1": torch.rand(2, 96, 8, 8)}))
        ['freekd', 'freekd_map']
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        num_classes: int | None = None,
        *,
        loss_weight: float = 1.0,
        map_weight: float = 5.0,
        levels: int = 3,
        low: bool = False,
        num_tokens: int = 6,
        diversity_weight: float = 1.0,
        mask_share: float = 0.25,
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
        if num_tokens < 1 or levels < 1:
            raise ValueError(f"num_tokens and levels must be at least 1, not {num_tokens} and {levels}.")
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.loss_weight = loss_weight
        self.map_weight = map_weight
        self.low = low
        self.diversity_weight = diversity_weight
        self.prompts = nn.ModuleList(ReceptiveTokens(num_tokens, teacher_dim) for _ in range(levels + 1))

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The terms `freekd`, by the masks as they are, and `freekd_map`."""
        del target
        projected, goal = self.align(student[self.student_taps[0]], teacher[self.teacher_taps[0]])
        with torch.no_grad():
            masks: list[Tensor | None] = list(self._masks(goal))
        if not self.low:
            masks[0] = None
        terms = {"freekd": self.loss_weight * freekd_loss(projected, goal, masks)}
        if self.map_weight:
            terms["freekd_map"] = self.map_weight * F.mse_loss(projected, goal)
        return terms

    def mask_terms(self, step: Step, features: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The task's on the map put together again from masked bands, and the overlap of the masks of each band."""
        goal = self.align.targets(features)
        masks = self._masks(goal)
        shown = self.masked_task.shown(features, goal)
        bands = haar_bands(shown, len(masks) - 1)
        inside = [band * mask.sum(dim=1)[:, None, None] for band, mask in zip(bands, masks, strict=True)]
        overlap = {}
        if masks[0].shape[1] > 1 and self.diversity_weight:
            each = torch.stack([mask_diversity_loss(mask) for mask in masks])
            overlap["mask_diversity"] = self.diversity_weight * each.sum()
        return self.masked_task(step, haar_inverse(inside, shown.shape[2:])), overlap

    def _masks(self, x: Tensor) -> list[Tensor]:
        """Those of each band of a map, (B, T, h, w)."""
        bands = haar_bands(x, len(self.prompts) - 1)
        return [prompt(band.sum(dim=2)) for prompt, band in zip(self.prompts, bands, strict=True)]
