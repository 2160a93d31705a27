# SPDX-License-Identifier: Apache-2.0
"""Augmentation: one geometry for image and mask, colour for the image alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

PAD_COLOUR = (124, 116, 104)  # mean of ImageNet: nearly zero after every model's own normalisation
_VOID = 255


def check_geometry(scale: Sequence[float], crop: Sequence[int] | None, flip: float) -> None:
    """The arguments that augmentations for masks and for boxes share.

    Raises:
        ValueError: a value out of its range.
    """
    if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
        raise ValueError(f"augmentation.scale must be [smallest, largest] with 0 < smallest <= largest, not {scale}.")
    if crop is not None and (len(crop) != 2 or min(crop) < 1):
        raise ValueError(f"augmentation.crop must be [height, width] in pixels or null, not {crop}.")
    if not 0 <= flip <= 1:
        raise ValueError(f"augmentation.flip is a probability from 0 to 1, not {flip}.")


def colour_jitter(brightness: float, contrast: float, saturation: float) -> v2.ColorJitter | None:
    """Random colour of an image; `None` where all of it is switched off.

    Raises:
        ValueError: a value out of its range.
    """
    for name, value in (("brightness", brightness), ("contrast", contrast), ("saturation", saturation)):
        if not 0 <= value <= 1:
            raise ValueError(f"augmentation.{name} must be from 0 to 1, not {value}.")
    if not (brightness or contrast or saturation):
        return None
    return v2.ColorJitter(brightness=brightness, contrast=contrast, saturation=saturation)


class Augmentation:
    """Random scale, crop, mirroring and colour of one sample.

    Draws from torch's global CPU generator, which the data module seeds for each sample. A scaled image smaller than
    the crop is padded at a random side; padding is void (255) in the mask, so no loss sees it.

    Args:
        scale: smallest and largest factor of the random resize; (1, 1) leaves the size alone.
        crop: height and width in pixels of what comes out; `None` keeps the size of the image.
        flip: probability of mirroring left and right.
        brightness: the factor is drawn from 1 - brightness to 1 + brightness; 0 switches it off.
        contrast: the same for contrast.
        saturation: the same for saturation.

    Raises:
        ValueError: a value out of its range.
    """

    def __init__(
        self,
        *,
        scale: Sequence[float] = (0.5, 2.0),
        crop: Sequence[int] | None = None,
        flip: float = 0.5,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
    ) -> None:
        check_geometry(scale, crop, flip)
        self.crop = None if crop is None else (int(crop[0]), int(crop[1]))
        self._scale = (float(scale[0]), float(scale[1]))
        self._flip = flip
        self._colour = colour_jitter(brightness, contrast, saturation)

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """An augmented sample, on the device where it lies.

        Args:
            image: uint8 (3, H, W).
            mask: int64 (H, W).

        Returns:
            Image, uint8 (3, h, w), and mask, int64 (h, w), with (h, w) = `crop`, or (H, W) without one.
        """
        size = self.crop or (image.shape[-2], image.shape[-1])
        image, mask = self._rescale(image, mask)
        image, mask = self._cut(image, mask, size)
        if torch.rand(()) < self._flip:
            image, mask = F.horizontal_flip(image), F.horizontal_flip(mask)
        if self._colour is not None:
            image = self._colour(image)
        return image, mask

    def _rescale(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        smallest, largest = self._scale
        factor = smallest + (largest - smallest) * torch.rand(()).item()
        size = [max(1, round(side * factor)) for side in image.shape[-2:]]
        image = F.resize(image, size, v2.InterpolationMode.BILINEAR, antialias=True)
        # "nearest-exact" takes pixel centres, as the bilinear resize of the image does; plain "nearest" would shift the
        # mask against the image by up to half a pixel.
        mask = F.resize(mask[None], size, v2.InterpolationMode.NEAREST_EXACT)[0]
        return image, mask

    def _cut(self, image: Tensor, mask: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        rows, rows_out = _place(image.shape[-2], size[0])
        columns, columns_out = _place(image.shape[-1], size[1])
        image_out = torch.tensor(PAD_COLOUR, dtype=image.dtype, device=image.device)[:, None, None].repeat(1, *size)
        mask_out = torch.full(size, _VOID, dtype=mask.dtype, device=mask.device)
        image_out[:, rows_out, columns_out] = image[:, rows, columns]
        mask_out[rows_out, columns_out] = mask[rows, columns]
        return image_out, mask_out


def _place(side: int, wanted: int) -> tuple[slice, slice]:
    """A random part of a side to keep, and where it goes on a side of length `wanted`."""
    room = side - wanted
    shift = int(torch.randint(min(room, 0), max(room, 0) + 1, ()))
    seen, put, length = max(shift, 0), max(-shift, 0), min(side, wanted)
    return slice(seen, seen + length), slice(put, put + length)
