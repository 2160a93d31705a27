# SPDX-License-Identifier: Apache-2.0
"""A sheet of images, each with what a network makes of it beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kdlvfm.reporting.canvas import Canvas, Colour

_LEAST_DOTS = 200
_PAIRS = 4


def image_sheet(
    images: Tensor,
    beside: Tensor,
    captions: Sequence[str],
    title: str,
    path: Path,
    legend: Sequence[tuple[str, Colour]] = (),
) -> None:
    """Write a PNG with four images a line, each followed by another picture of its own.

    Args:
        images: (n, 3, H, W) in [0, 1].
        beside: (n, 3, h, w) in [0, 1], of any size.
        captions: a line below each of the latter.
        title: what the latter are.
        path: the file to write; its folder is made if need be.
        legend: names and colours, below all.

    Raises:
        ValueError: numbers of images that differ.
    """
    if not len(images) == len(beside) == len(captions) > 0:
        raise ValueError(f"there are {len(images)} images, {len(beside)} pictures and {len(captions)} captions.")
    pairs = min(_PAIRS, len(images))
    height, width = images.shape[-2:]
    dots = width * math.ceil(_LEAST_DOTS / width)
    canvas = Canvas(math.ceil(len(images) / pairs), 2 * pairs, (height, width), dots, legend)
    for number, (image, picture, caption) in enumerate(zip(images, beside, captions, strict=True)):
        line, pair = divmod(number, pairs)
        canvas.draw(line, 2 * pair, image.permute(1, 2, 0), "image")
        canvas.draw(line, 2 * pair + 1, picture.permute(1, 2, 0), title, caption)
    canvas.save(path)


def component_colours(features: Tensor) -> Tensor:
    """Maps as colours: their first three principal components over all images, each from its least to its largest.

    Args:
        features: (n, C, h, w).

    Returns:
        (n, 3, h, w) in [0, 1]; components that there are not are 0.

    Example:
        >>> component_colours(torch.rand(2, 5, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """
    rows = features.float().movedim(1, -1).flatten(0, -2)
    rows = rows - rows.mean(dim=0)
    _, _, directions = torch.linalg.svd(rows, full_matrices=False)
    found = rows @ directions[:3].T
    low, high = found.amin(dim=0), found.amax(dim=0)
    found = torch.nn.functional.pad((found - low) / (high - low).clamp(min=1e-12), (0, 3 - found.shape[1]))
    return found.view(features.shape[0], *features.shape[2:], 3).movedim(-1, 1)
