# SPDX-License-Identifier: Apache-2.0
"""Boxes of a detection target, as methods read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def read_boxes(target: Any, batch: int) -> list[tuple[Tensor, Tensor]]:
    """Boxes (n, 4), in single precision at least, and size (2,) of each image of a detection target.

    Args:
        target: for each image `"boxes"` (n, 4), corners x1, y1, x2, y2 in pixels, and `"size"` (2,), height and width
            of the part of the image that is not padding.
        batch: how many images there are.

    Raises:
        ValueError: the target is not of this kind, or of another number of images.
    """
    images = target if isinstance(target, Sequence) else ()
    if len(images) != batch or not all(
        isinstance(image, Mapping) and {"boxes", "size"} <= {*image} for image in images
    ):
        raise ValueError(
            "this distiller reads boxes: the target must be a list with a dict of 'boxes' and 'size' for each of the "
            f"{batch} images, not {_kind(target)}. Use it with the detection task."
        )
    found = []
    for image in images:
        boxes = image["boxes"]
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(f"boxes of an image must be (n, 4), not {tuple(boxes.shape)}.")
        found.append(
            (boxes if boxes.is_floating_point() and boxes.element_size() > 2 else boxes.float(), image["size"])
        )
    return found


def labelled_images(target: Any) -> list[int]:
    """Positions in a batch of the images whose objects are known: those without `"labelled"`, or where it is true."""
    return [i for i, image in enumerate(target) if "labelled" not in image or bool(image["labelled"])]


def giou_of_distances(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU, from -1 to 1, of two boxes around each position: distances (B, 4, ...) to (B, ...).

    IoU less the share of the smallest box around both that is in neither. Distances are to the left, top, right and
    bottom side, of any unit. A box whose sides have changed places has no area, and two of none have GIoU 0.

    Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019.
    """
    own, goal, inner = _sides(first), _sides(second), _sides(torch.minimum(first, second))
    # The larger of two numbers is their sum less the smaller one.
    shared, hull = _area(inner), _area(own + goal - inner).clamp(min=1e-6)
    union = (_area(own) + _area(goal) - shared).clamp(min=1e-6)
    return shared / union + union / hull - 1


def _sides(distances: Tensor) -> Tensor:
    """Width and height, (B, 2, ...)."""
    near, far = distances.chunk(2, dim=1)
    return near + far


def _area(sides: Tensor) -> Tensor:
    width, height = sides.clamp(min=0).unbind(1)
    return width * height


def _kind(target: Any) -> str:
    if isinstance(target, Tensor):
        return f"a tensor {tuple(target.shape)}"
    return f"{len(target)} entries" if isinstance(target, Sequence) else type(target).__name__
