# SPDX-License-Identifier: Apache-2.0
"""Objects of an image as boxes, and the geometry of image and boxes together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F


@dataclass(frozen=True)
class Boxes:
    """The n objects of one image.

    Attributes:
        corners: float32 (n, 4), x1, y1, x2, y2 in pixels, x2 and y2 exclusive.
        labels: int64 (n,), classes 0..K-1.
        iscrowd: bool (n,), marks boxes around several objects or none in particular: no training target, and neither
            hit nor miss in the metrics.
        area: float32 (n,), in pixels of the image as it was annotated; that of the object's outline, where known.
    """

    corners: Tensor
    labels: Tensor
    iscrowd: Tensor
    area: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor) -> Boxes:
        """Some of them, by mask (n,) or indices."""
        return Boxes(self.corners[chosen], self.labels[chosen], self.iscrowd[chosen], self.area[chosen])

    def at(self, corners: Tensor) -> Boxes:
        """The same objects in other places, (n, 4)."""
        return Boxes(corners.as_subclass(Tensor), self.labels, self.iscrowd, self.area)


Sample: TypeAlias = tuple[Tensor, Boxes]
"""An image, uint8 (3, H, W), and its objects."""


def make_boxes(
    corners: Sequence[Sequence[float]],
    labels: Sequence[int],
    iscrowd: Sequence[bool] | None = None,
    area: Sequence[float] | None = None,
) -> Boxes:
    """Boxes from plain numbers; without `iscrowd` there is no crowd, and without `area` it is that of the box."""
    at = torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)
    sizes = at[:, 2:] - at[:, :2]
    return Boxes(
        at,
        torch.tensor(labels, dtype=torch.int64),
        torch.zeros(len(at), dtype=torch.bool) if iscrowd is None else torch.tensor(iscrowd, dtype=torch.bool),
        sizes.prod(dim=1) if area is None else torch.tensor(area, dtype=torch.float32),
    )


def join(parts: Sequence[Boxes]) -> Boxes:
    """The objects of all parts."""
    fields = ("corners", "labels", "iscrowd", "area")
    return Boxes(*(torch.cat([vars(part)[field] for part in parts]) for field in fields))


def fitting_factor(size: Sequence[int], limits: Sequence[int] | None) -> float:
    """By how much an image of `size` (height, width) grows to fill `limits`, (short, long) side; 1 without limits."""
    if limits is None:
        return 1.0
    return min(limits[0] / min(size), limits[1] / max(size))


def resize(sample: Sample, factor: float) -> Sample:
    """A sample `factor` times as large, to the nearest pixel."""
    image, boxes = sample
    before = (image.shape[-2], image.shape[-1])
    after = [max(1, round(side * factor)) for side in before]
    if tuple(after) == before:
        return sample
    image = F.resize(image, after, v2.InterpolationMode.BILINEAR, antialias=True)
    return image, boxes.at(F.resize(_on_canvas(boxes, before), after))


def flip(sample: Sample) -> Sample:
    """A sample mirrored left and right."""
    image, boxes = sample
    canvas = (image.shape[-2], image.shape[-1])
    return F.horizontal_flip(image), boxes.at(F.horizontal_flip(_on_canvas(boxes, canvas)))


def cut(sample: Sample, top: int, left: int, size: tuple[int, int], least_visible: float) -> Sample:
    """A window of a sample.

    Args:
        sample: image and objects.
        top: first row of the window.
        left: first column of the window.
        size: height and width of the window, inside the image.
        least_visible: share of a box that must be in the window, else it is dropped.
    """
    image, boxes = sample
    canvas = (image.shape[-2], image.shape[-1])
    window = F.crop(image, top, left, *size)
    moved = boxes.at(F.crop(_on_canvas(boxes, canvas), top, left, *size))
    return window, clip((window, moved), boxes.corners, least_visible)[1]


def clip(sample: Sample, before: Tensor | None = None, least_visible: float = 0.0) -> Sample:
    """Boxes ended at the border of the image; those of which less than a pixel is left are dropped.

    Args:
        sample: image and objects.
        before: (n, 4), the boxes as they were when all of them was seen; `None` for those of the sample.
        least_visible: share of `before` that must be left, else the box is dropped.
    """
    image, boxes = sample
    height, width = image.shape[-2:]
    whole = boxes.corners if before is None else before
    limits = torch.tensor([width, height, width, height], dtype=torch.float32)
    corners = boxes.corners.clamp(min=torch.zeros(4), max=limits)
    left, full = corners[:, 2:] - corners[:, :2], whole[:, 2:] - whole[:, :2]
    kept = (left >= 1).all(dim=1) & (left.prod(dim=1) >= least_visible * full.prod(dim=1))
    return image, boxes.at(corners)[kept]


def _on_canvas(boxes: Boxes, canvas: tuple[int, int]) -> tv_tensors.BoundingBoxes:
    return tv_tensors.BoundingBoxes(boxes.corners, format="XYXY", canvas_size=canvas)
