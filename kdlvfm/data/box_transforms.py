# SPDX-License-Identifier: Apache-2.0
"""Augmentation for detection: one geometry for image and boxes, colour for the image alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kdlvfm.data.boxes import Boxes, Sample, clip, cut, flip, join, resize
from kdlvfm.data.transforms import PAD_COLOUR, check_geometry, colour_jitter


class BoxAugmentation:
    """Random scale, crop, mirroring, colour and mosaic of one sample.

    Draws from torch's global CPU generator, which the data module seeds for each sample. Boxes that a crop cuts end at
    its border; those of which too little is left are dropped.

    Args:
        scale: smallest and largest factor of the random resize, on top of the resize of the data; (1, 1) leaves the
            size alone.
        crop: largest height and width in pixels of what comes out; `None` keeps the size.
        flip: probability of mirroring left and right.
        mosaic: probability that four samples at half size, meeting at a random point, take the place of one
            (Bochkovskiy, Wang, Liao, "YOLOv4", 2020).
        least_visible: share of a box that must be left of it after a cut.
        brightness: the factor is drawn from 1 - brightness to 1 + brightness; 0 switches it off.
        contrast: the same for contrast.
        saturation: the same for saturation.

    Raises:
        ValueError: a value out of its range.
    """

    def __init__(
        self,
        *,
        scale: Sequence[float] = (1.0, 1.0),
        crop: Sequence[int] | None = None,
        flip: float = 0.5,
        mosaic: float = 0.0,
        least_visible: float = 0.1,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
    ) -> None:
        check_geometry(scale, crop, flip)
        for name, value in (("mosaic", mosaic), ("least_visible", least_visible)):
            if not 0 <= value <= 1:
                raise ValueError(f"augmentation.{name} must be from 0 to 1, not {value}.")
        self.crop = None if crop is None else (int(crop[0]), int(crop[1]))
        self._scale = (float(scale[0]), float(scale[1]))
        self._flip = flip
        self._mosaic = mosaic
        self._least_visible = least_visible
        self._colour = colour_jitter(brightness, contrast, saturation)

    def __call__(
        self, sample: Sample, fit: Callable[[Sequence[int]], float], more: Callable[[int], Sequence[Sample]]
    ) -> Sample:
        """An augmented sample.

        Args:
            sample: image, uint8 (3, H, W), and objects.
            fit: the factor that brings an image of a size (height, width) to that of the data.
            more: gives so many other samples, drawn at random.

        Returns:
            Image, uint8 (3, h, w), and the objects that can be seen in it.
        """
        if torch.rand(()) < self._mosaic:
            sample = self._four(sample, fit, more)
        else:
            sample = clip(resize(sample, fit(sample[0].shape[-2:]) * self._factor()))
        if self.crop is not None:
            size = tuple(min(side, most) for side, most in zip(sample[0].shape[-2:], self.crop, strict=True))
            sample = self._window(sample, (size[0], size[1]))
        if torch.rand(()) < self._flip:
            sample = flip(sample)
        if self._colour is not None:
            sample = self._colour(sample[0]), sample[1]
        return sample

    def _factor(self) -> float:
        smallest, largest = self._scale
        return smallest + (largest - smallest) * torch.rand(()).item()

    def _window(self, sample: Sample, size: tuple[int, int]) -> Sample:
        top, left = (
            int(torch.randint(side - wanted + 1, ())) for side, wanted in zip(sample[0].shape[-2:], size, strict=True)
        )
        return cut(sample, top, left, size, self._least_visible)

    def _four(
        self, sample: Sample, fit: Callable[[Sequence[int]], float], more: Callable[[int], Sequence[Sample]]
    ) -> Sample:
        """Four samples on a canvas of the size that the first would have had; the corners near the middle are kept."""
        factor = self._factor() * fit(sample[0].shape[-2:])
        height, width = (max(4, round(side * factor)) for side in sample[0].shape[-2:])
        middle_y, middle_x = (int(torch.randint(side // 4, side - side // 4, ())) for side in (height, width))
        canvas = torch.tensor(PAD_COLOUR, dtype=torch.uint8)[:, None, None].repeat(1, height, width)
        placed: list[Boxes] = []
        for i, one in enumerate((sample, *more(3))):
            below, right = i >= 2, i % 2 == 1
            image, boxes = clip(resize(one, 0.5 * self._factor() * fit(one[0].shape[-2:])))
            rows = min(image.shape[-2], height - middle_y if below else middle_y)
            columns = min(image.shape[-1], width - middle_x if right else middle_x)
            top, left = (0 if below else image.shape[-2] - rows), (0 if right else image.shape[-1] - columns)
            image, boxes = cut((image, boxes), top, left, (rows, columns), self._least_visible)
            y, x = middle_y - (0 if below else rows), middle_x - (0 if right else columns)
            canvas[:, y : y + rows, x : x + columns] = image
            placed.append(boxes.at(boxes.corners + torch.tensor([x, y, x, y])))
        return canvas, join(placed)
