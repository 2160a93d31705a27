# SPDX-License-Identifier: Apache-2.0
"""LD: where objects are, the student's distributions of a box's sides follow the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

from kdlvfm.core import Context, Distiller, Features
from kdlvfm.core.align import check_levels, promote
from kdlvfm.core.boxes import labelled_images, read_boxes
from kdlvfm.core.detector import boxes_per_position
from kdlvfm.core.features import level_taps


def localization_loss(
    student_bins: Tensor,
    teacher_bins: Tensor,
    weight: Tensor,
    temperature: float = 10.0,
    *,
    avg_factor: float | None = None,
) -> Tensor:
    r"""Kullback-Leibler divergence between softened distributions over the bins that a side of a box may fall in.

    .. math::
        L = \frac{T^2}{A} \sum_e w_e \, \frac{1}{n + 1}
            \mathrm{KL}\big(\sigma(z_T^e / T) \,\|\, \sigma(z_S^e / T)\big)

    over the sides e of boxes. The mean over the n + 1 bins, where others have a sum, is the paper's code's.

    Args:
        student_bins: (B, 4, n + 1), of B boxes; or (B, n + 1), of B sides.
        teacher_bins: same shape; receives no gradient.
        weight: w, (B, 4), or (B) for all sides of a box alike; receives no gradient.
        temperature: T; 10 in the paper.
        avg_factor: A; `None` for the number of sides, which makes it a mean. `LD` says what the authors take.

    Returns:
        A scalar: the weighted sum over sides divided by A; 0 if there are none.

    Raises:
        ValueError: the shapes do not fit.

    Source:
        Zheng et al., "Localization Distillation for Dense Object Detection", CVPR 2022.

    Example:
        >>> student, teacher = torch.zeros(1, 4, 2), torch.tensor([0.25, 0.75]).log().expand(1, 4, 2)
        >>> round(localization_loss(student, teacher, torch.ones(1), temperature=1.0).item(), 6)
        0.065406
    """
    if student_bins.shape != teacher_bins.shape:
        raise ValueError(
            f"distributions must have one shape, not {tuple(student_bins.shape)} (student) and "
            f"{tuple(teacher_bins.shape)} (teacher); both heads must have the same bins and strides."
        )
    sides = student_bins.shape[:-1]
    if weight.shape == sides[:-1]:
        weight = weight.unsqueeze(-1).expand(sides)
    if weight.shape != sides:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit distributions {tuple(student_bins.shape)}.")
    student_bins, teacher_bins = promote(student_bins), promote(teacher_bins.detach())
    divergence = F.kl_div(
        F.log_softmax(student_bins / temperature, dim=-1),
        F.log_softmax(teacher_bins / temperature, dim=-1),
        log_target=True,
        reduction="none",
    ).mean(-1)
    total = (divergence * weight.detach()).sum() * temperature**2
    return total / (max(divergence.numel(), 1) if avg_factor is None else avg_factor)


def localization_regions(
    target: Any,
    sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    *,
    scale: float = 8.0,
    nearest: int = 9,
    gamma: float = 0.25,
) -> tuple[list[Tensor], list[Tensor]]:
    """Where a detector's boxes are worth learning: the main region and the valuable localisation region.

    Both come from the boxes as in GFL, whose rule of assignment is ATSS (Zhang et al., CVPR 2020), on square anchors:
    the one of the position (i, j) of a level is of side `scale` x stride around the pixel (j, i) x stride. An object's
    candidates are the anchors nearest to its centre, `nearest` of each level; its threshold t is the mean plus the
    standard deviation of their IoU.

    - Main: candidates with IoU of at least t whose centre is inside the object. A GFL student is itself trained there.
    - Valuable: all anchors whose DIoU, which is IoU less the squared distance of the centres over the squared diagonal
      of the box around both, is below t but at least `gamma` t.

    Args:
        target: for each of B images `"boxes"` (n, 4) and `"size"` (2,), see `kdlvfm.core.boxes.read_boxes`. Positions
            in padding belong to no region.
        sizes: height and width (H, W) of the map of each level.
        strides: pixels between the positions of each level.
        scale: of anchors; 8 in GFL and ATSS.
        nearest: 9 in GFL and ATSS.
        gamma: 0.25 in the paper.

    Returns:
        For each level the main region, booleans (B, H, W), and the valuable one as the largest IoU with an object whose
        region it is, 0 outside.

    Example:
        >>> target = [{"boxes": torch.tensor([[0.0, 0.0, 16.0, 16.0]]), "size": torch.tensor([16, 16])}]
        >>> (main,), (valuable,) = localization_regions(target, [(4, 4)], [4], scale=4.0)
        >>> main.nonzero().tolist()
        [[0, 2, 2]]
    """
    mains, valuables = [], []
    for boxes, size in read_boxes(target, len(target)):
        anchors = [_anchors(grid, stride, scale * stride, boxes) for grid, stride in zip(sizes, strides, strict=True)]
        seen = [((level[:, :2] + level[:, 2:]) / 2 < size.flip(0).to(boxes)).all(1) for level in anchors]
        inside = [level[known] for level, known in zip(anchors, seen, strict=True)]
        main, valuable = _assign(inside, boxes, nearest, gamma)
        known = torch.cat(seen)
        mains.append(torch.zeros_like(known).masked_scatter(known, main))
        valuables.append(boxes.new_zeros(len(known)).masked_scatter(known, valuable))
    counts = [height * width for height, width in sizes]
    grids = [(-1, *grid) for grid in sizes]
    main_levels, valuable_levels = (torch.split(torch.stack(found), counts, dim=1) for found in (mains, valuables))
    return (
        [level.view(grid) for level, grid in zip(main_levels, grids, strict=True)],
        [level.view(grid) for level, grid in zip(valuable_levels, grids, strict=True)],
    )


def _anchors(grid: tuple[int, int], stride: int, side: float, like: Tensor) -> Tensor:
    """Squares (H W, 4) of a level, row by row."""
    y, x = (torch.arange(n, device=like.device, dtype=like.dtype) * stride for n in grid)
    centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).view(-1, 2)
    return torch.cat([centres - side / 2, centres + side / 2], dim=1)


def _assign(levels: Sequence[Tensor], boxes: Tensor, nearest: int, gamma: float) -> tuple[Tensor, Tensor]:
    """Main region, booleans (A,), and valuable region, (A,), of the anchors of all levels and boxes (n, 4)."""
    anchors = torch.cat(list(levels))
    if not len(boxes) or not len(anchors):
        return torch.zeros(len(anchors), dtype=torch.bool, device=boxes.device), boxes.new_zeros(len(anchors))
    iou, diou = _overlaps(anchors, boxes)
    centres, middles = ((rows[:, :2] + rows[:, 2:]) / 2 for rows in (anchors, boxes))
    distances = (centres[:, None] - middles).square().sum(-1)
    start, found = 0, []
    for distance in torch.split(distances, [len(level) for level in levels]):
        found.append(start + distance.topk(min(nearest, len(distance)), dim=0, largest=False).indices)
        start += len(distance)
    candidates = torch.cat(found)
    overlap = iou.gather(0, candidates)
    threshold = overlap.mean(0) + (overlap.std(0) if len(overlap) > 1 else 0)
    points = centres[candidates]
    # By a hundredth of a pixel, as MMDetection has it.
    within = ((points - boxes[:, :2] > 0.01) & (boxes[:, 2:] - points > 0.01)).all(-1)
    main = torch.zeros_like(iou, dtype=torch.bool).scatter(0, candidates, (overlap >= threshold) & within)
    valuable = iou * ((diou < threshold) & (diou >= gamma * threshold))
    return main.any(1), valuable.amax(1)


def _overlaps(anchors: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and DIoU (A, n) of anchors (A, 4) and boxes (n, 4)."""
    first, second = anchors[:, None], boxes[None]
    shared = (torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])).clamp(0)
    hull = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])
    apart = (first[..., :2] + first[..., 2:] - second[..., :2] - second[..., 2:]) / 2
    areas = [(rows[..., 2:] - rows[..., :2]).prod(-1) for rows in (first, second)]
    intersection = shared.prod(-1)
    iou = intersection / (areas[0] + areas[1] - intersection)
    return iou, iou - apart.square().sum(-1) / hull.square().sum(-1)


class LD(Distiller):
    """Localisation distillation, in the main and in the valuable region; the terms of all levels are added.

    For detectors whose heads predict the sides of boxes as distributions, as GFL's does, teacher and student with the
    same bins and strides. The regions are found from the boxes of the target by the rule that the student's own
    training follows, since no head hands out its assignment; see `localization_regions`.

    In the main region a position weighs as much as the student's highest class score there, in the valuable one as its
    anchor's IoU (authors' code). The authors add distillation of class scores, which is a distiller of its own here.
    Unlabelled images have no regions and are not counted.

    Args:
        strides: pixels between the positions of each level.
        main_weight: weight of the main region; 0.25 in the paper. The authors divide the sum over a process's batch of
            3 images by 4, and thus warn of larger batches; here it is divided by 4 for every 3 images.
        valuable_weight: weight of the valuable region; 0.25 in the paper. Likewise divided by 16 for every 3 images.
        temperature: softmax temperature; 10 in the paper.
        scale: side of the anchors in strides.
        nearest: candidates of each level.
        gamma: the smaller, the larger the valuable region.

    Raises:
        ValueError: there are no levels.

    Example:
        >>> ld = LD([8])
        >>> target = [{"boxes": torch.tensor([[3.0, 5.0, 20.0, 30.0]]), "size": torch.tensor([32, 32])}]
        >>> student = {"reg.0": torch.rand(1, 4 * 17, 4, 4), "cls.0": torch.rand(1, 3, 4, 4)}
        >>> list(ld(student, {"reg.0": torch.rand(1, 4 * 17, 4, 4)}, target))
        ['ld_main', 'ld_valuable']
    """

    needs_truth = True

    def __init__(
        self,
        strides: Sequence[int],
        *,
        main_weight: float = 0.25,
        valuable_weight: float = 0.25,
        temperature: float = 10.0,
        scale: float = 8.0,
        nearest: int = 9,
        gamma: float = 0.25,
    ) -> None:
        super().__init__()
        check_levels(strides=strides)
        self.strides = tuple(strides)
        self.main_weight = main_weight
        self.valuable_weight = valuable_weight
        self.temperature = temperature
        self.scale = scale
        self.nearest = nearest
        self.gamma = gamma
        self.teacher_taps = tuple(f"reg.{i}" for i in range(len(self.strides)))
        self.student_taps = (*self.teacher_taps, *(f"cls.{i}" for i in range(len(self.strides))))

    @classmethod
    def from_context(cls, context: Context, **hparams: Any) -> Self:
        """Reads the strides of the student's levels.

        Raises:
            TapError: a network is no detector.
            ValueError: a head predicts no distributions, or the two differ in bins or strides.
        """
        models = context.student, context.require_teacher().model
        student, teacher = ([model.tap_info(tap) for tap in level_taps(model, "reg")] for model in models)
        for model, levels in zip(models, (student, teacher), strict=True):
            # More scores than classes: several boxes for each position, and so numbers for several anchors.
            several = boxes_per_position(model, context.num_classes) > 1
            if levels[0].dim % 4 or levels[0].dim < 8 or several:
                raise ValueError(
                    f"LD needs distributions of the four sides of a box, which the head of {model.card.name} does not "
                    f"predict (it has {levels[0].dim} channels); choose GFL, or distiller=crosskd."
                )
        if student != teacher:
            facts = [", ".join(f"{level.dim // 4} at {level.stride}" for level in half) for half in (student, teacher)]
            raise ValueError(
                "LD needs the same bins and strides in both heads; bins at each stride are "
                f"{facts[0]} (student) and {facts[1]} (teacher)."
            )
        return cls(**{"strides": [level.stride for level in student], **hparams})

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The terms `ld_main` and `ld_valuable`; one whose weight is 0 is left out."""
        count = len(self.strides)
        sides, goals = ([half[tap] for tap in self.teacher_taps] for half in (student, teacher))
        scores = [student[tap] for tap in self.student_taps[count:]]
        read_boxes(target, len(sides[0]))
        images = max(len(labelled_images(target)), 1)
        sizes = [(int(level.shape[2]), int(level.shape[3])) for level in sides]
        main, valuable = localization_regions(
            target, sizes, self.strides, scale=self.scale, nearest=self.nearest, gamma=self.gamma
        )
        best = [promote(level.detach()).sigmoid().amax(1) for level in scores]
        parts = {
            "ld_main": (self.main_weight, [w * m for w, m in zip(best, main, strict=True)], 4 / 3),
            "ld_valuable": (self.valuable_weight, valuable, 16 / 3),
        }
        terms = {}
        for name, (loss_weight, weights, divisor) in parts.items():
            if not loss_weight:
                continue
            chosen = [level > 0 for level in weights]
            own, goal = (
                torch.cat([_bins(x)[at] for x, at in zip(half, chosen, strict=True)]) for half in (sides, goals)
            )
            weight = torch.cat([level[at] for level, at in zip(weights, chosen, strict=True)])
            loss = localization_loss(own, goal, weight, self.temperature, avg_factor=divisor * images)
            terms[name] = loss_weight * loss
        return terms


def _bins(sides: Tensor) -> Tensor:
    """(B, 4 (n + 1), H, W) to (B, H, W, 4, n + 1)."""
    batch, _, height, width = sides.shape
    return sides.reshape(batch, 4, -1, height, width).permute(0, 3, 4, 1, 2)
