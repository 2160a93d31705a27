# SPDX-License-Identifier: Apache-2.0
"""Representation: features like a teacher's, learned from images alone, and how much of the teacher's they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from kdlvfm.core.align import match_size
from kdlvfm.core.features import FeatureModel, Features, TapInfo
from kdlvfm.core.task import Task
from kdlvfm.core.teacher import Teacher

Target = Mapping[str, Tensor]


class Representation(Task):
    """An encoder whose features hold what a teacher's do.

    There is no ground truth, and no loss but the distiller's. So a training batch has no target; one of validation is
    its own target, a mapping with `"image"`, (B, 3, H, W) in [0, 1], `"index"`, (B,), and `"repeated"`, bool (B,), true
    for images that count elsewhere.

    Args:
        num_classes: of the data, which nothing here needs.
        class_names: their names, which nothing here needs.
        judge: against whose features the student's are measured; in a run its teacher.
        student_tap: the student's map that is measured.
        judge_taps: the judge's maps; `None` for the last one, of an ensemble for the last one of each member.
        ridge: see `RepresentationMetrics`.

    Raises:
        ValueError: there is no judge, it has no maps, or `ridge` is not positive.
        TapError: the judge has no such tap.
    """

    primary_metric = "teacher_r2"
    truth = "no labels"
    has_loss = False

    def __init__(
        self,
        num_classes: int,
        *,
        class_names: Sequence[str] | None = None,
        judge: Teacher | None,
        student_tap: str = "map.-1",
        judge_taps: Sequence[str] | None = None,
        ridge: float = 0.01,
    ) -> None:
        del num_classes, class_names
        if judge is None:
            raise ValueError(
                "images without labels need a teacher to learn from: pass one, for example teacher=dinov3_vits16."
            )
        if ridge <= 0:
            raise ValueError(f"task.ridge must be above 0, not {ridge}.")
        self.judge = judge
        self.student_tap = student_tap
        self.judge_taps = tuple(_last_maps(judge.taps()) if judge_taps is None else judge_taps)
        if not self.judge_taps:
            raise ValueError(f"{judge.card.name} has no maps to measure features against; choose another teacher.")
        self._dims = [_map_of(tap, judge.tap_info(tap), "task.judge_taps").dim for tap in self.judge_taps]
        self._ridge = ridge

    def student_taps(self, student: FeatureModel) -> tuple[str, ...]:
        """The map that is measured.

        Raises:
            ValueError: the tap is none.
        """
        _map_of(self.student_tap, student.tap_info(self.student_tap), "task.student_tap")
        return (self.student_tap,)

    def solves(self, model: FeatureModel) -> bool:
        """No model: that a teacher has its own features is not worth measuring."""
        del model
        return False

    def unpack(self, batch: Target) -> tuple[Tensor, Target | None, Tensor]:
        """Images (B, 3, H, W), no target or, in validation, the batch itself, and indices (B,)."""
        return batch["image"], batch if "repeated" in batch else None, batch["index"]

    def loss(self, student: FeatureModel, features: Features, target: Target | None) -> dict[str, Tensor]:
        """No terms."""
        del student, features, target
        return {}

    def predict(self, student: FeatureModel, features: Features, target: Target) -> Tensor:
        """The student's map (B, D, h, w)."""
        del student, target
        return features[self.student_tap]

    def metrics(self) -> RepresentationMetrics:
        """Fresh metrics."""
        return RepresentationMetrics(self.judge, dict(zip(self.judge_taps, self._dims, strict=True)), self._ridge)


def _last_maps(taps: Mapping[str, TapInfo]) -> list[str]:
    """The last `map.<i>` of a network, or of each member of an ensemble."""
    last = {}
    for tap in taps:
        owner, _, index = tap.rpartition("map.")
        if index.isdigit() and (not owner or owner.endswith("/")):
            last[owner] = tap
    return list(last.values())


def _map_of(tap: str, info: TapInfo, setting: str) -> TapInfo:
    if info.stride is None or tap.endswith("tokens"):
        raise ValueError(f"{setting} must name maps, which {tap} is not: choose one of map.<i>.")
    return info


class Moments(NamedTuple):
    """Sums over positions, with features x (D) and y (E): of 1, x, y, x xᵀ, x yᵀ and y²."""

    positions: Tensor
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Moments:
        """Those of N positions, x (N, D) and y (N, E)."""
        x, y = x.double(), y.double()
        return cls(x.new_tensor(len(x)), x.sum(0), y.sum(0), x.mT @ x, x.mT @ y, y.square().sum(0))

    def about(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The last three sums with x and y counted from other origins."""
        xx = self.xx - torch.outer(self.x, x) - torch.outer(x, self.x) + self.positions * torch.outer(x, x)
        xy = self.xy - torch.outer(self.x, y) - torch.outer(x, self.y) + self.positions * torch.outer(x, y)
        return xx, xy, self.yy - 2 * self.y * y + self.positions * y.square()


class RepresentationMetrics(Metric):
    r"""How much of a judge's features can be read off a student's, position by position, by a linear map.

    The images are in two halves, even and odd indices. On each half a ridge regression from the student's map to the
    judge's is solved, and measured on the other half, whose images neither it nor, in validation, the student has seen:

    .. math::
        R^2 = \frac{1}{E} \sum_{c=1}^{E} 1 - \frac{\sum_i (y_{ic} - \hat y_{ic})^2}{\sum_i (y_{ic} - \bar y_c)^2}

    over the judge's channels c and the positions i of both halves, with predictions and means of the opposite half.
    Every channel counts alike, since a ViT has a few of large norm that would else decide alone. 1 is all there is to
    read, 0 is what the mean alone says, and less than 0 is possible: the map was misled by too few images. Maps of two
    sizes meet on the grid of the larger one.

    `compute` gives `teacher_r2`, the mean over the judge's taps, and where there are several `r2/<tap>` for each.

    Args:
        judge: a frozen network.
        taps: its maps, with their channels.
        ridge: added to the variances of the student's channels, in units of their mean.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, judge: Teacher, taps: Mapping[str, int], ridge: float) -> None:
        super().__init__()
        self._judge = (judge,)  # not a sub-module: a metric's state is its own
        self._taps = tuple(taps)
        self._ridge = ridge
        # Zeros that take the shape of what is first added: how many channels a student has is not known yet.
        dimensions = (0, 1, 1, 2, 2, 1)
        for i in range(len(taps)):
            for name, count in zip(Moments._fields, dimensions, strict=True):
                start = torch.zeros(2, *[1] * count, dtype=torch.float64)  # of each half
                self.add_state(f"{name}_{i}", start, dist_reduce_fx="sum")

    def update(self, predictions: Tensor, target: Target) -> None:
        """Add one batch of the student's maps (B, D, h, w); images that are repeated are passed over."""
        counted = ~target["repeated"]
        index, images = target["index"][counted], target["image"][counted]
        found = self._judge[0].to(images.device)(images, self._taps)
        for i, tap in enumerate(self._taps):
            maps = match_size(predictions[counted], found[tap])
            halves = []
            for half in range(2):
                x, y = (value[index % 2 == half].movedim(1, -1).flatten(0, -2) for value in maps)
                halves.append(Moments.of(x, y))
            for name, sums in zip(Moments._fields, zip(*halves, strict=True), strict=True):
                setattr(self, f"{name}_{i}", getattr(self, f"{name}_{i}") + torch.stack(sums))

    def compute(self) -> dict[str, Tensor]:
        """Scalars by name; without an image in each half they are not defined."""
        scores = {f"r2/{tap}": self._score(i) for i, tap in enumerate(self._taps)}
        mean = {"teacher_r2": torch.stack([*scores.values()]).mean()}
        return mean if len(scores) == 1 else mean | scores

    def _score(self, i: int) -> Tensor:
        sums = [getattr(self, f"{name}_{i}").cpu() for name in Moments._fields]
        even, odd = (Moments(*(value[half] for value in sums)) for half in range(2))
        tested = [_tested(*halves, self._ridge) for halves in ((even, odd), (odd, even))]
        errors, spreads = (torch.stack(parts).sum(0) for parts in zip(*tested, strict=True))
        # A channel that is always the same has nothing to read; what is left of it is rounding.
        varies = spreads > 1e-12 * spreads.amax()
        return (1 - errors[varies] / spreads[varies]).mean()


def _tested(fitted: Moments, held_out: Moments, ridge: float) -> tuple[Tensor, Tensor]:
    """Squared errors (E) of a linear map on what it was not fitted to, and squared deviations from the mean there."""
    x, y = fitted.x / fitted.positions, fitted.y / fitted.positions
    xx, xy, _ = fitted.about(x, y)
    if not xx.isfinite().all():
        return y * torch.nan, y * torch.nan
    strength = (ridge * xx.diagonal().mean()).clamp_min(torch.finfo(xx.dtype).tiny)
    weight = torch.linalg.solve(xx + strength * torch.eye(len(xx), dtype=xx.dtype), xy)
    xx, xy, yy = held_out.about(x, y)
    return yy - 2 * (weight * xy).sum(0) + (weight * (xx @ weight)).sum(0), yy
