# SPDX-License-Identifier: Apache-2.0
"""Fitting images of any size to the multiple of pixels that a network needs, and its maps back to the image."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from kdlvfm.core.align import resize_map

Fit = Literal["resize", "pad"]


def fit_to_multiple(images: Tensor, multiple: int, fit: Fit) -> Tensor:
    """Images (B, C, H, W) with both sides a multiple of `multiple` pixels.

    Args:
        images: normalised images, so that padding with zeros pads with the mean colour.
        multiple: pixels.
        fit: `"resize"` to the nearest multiple, so that a map covers exactly the image; `"pad"` at the right and the
            bottom, so that no pixel is interpolated.
    """
    height, width = images.shape[-2:]
    if fit == "pad":
        # The same as `-width % multiple`, over whose sign torch.export ponders half as long again.
        right, bottom = ((side + multiple - 1) // multiple * multiple - side for side in (width, height))
        return F.pad(images, (0, right, 0, bottom))
    nearest = [max(multiple, (side + multiple // 2) // multiple * multiple) for side in (height, width)]
    return resize_map(images, nearest)


def crop_to_image(x: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """The part of a padded image's map (B, C, H', W') that lies over an image of `size` pixels: ceil(size / stride).

    A map with nothing to crop is returned itself, not a view of it: what else depends on it, depends on the result too.
    """
    height, width = -(-size[0] // stride), -(-size[1] // stride)
    return x if x.shape[-2:] == (height, width) else x[..., :height, :width]
