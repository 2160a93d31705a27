# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a model sees in one image: classes as colours over it, or boxes with names and scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kdlvfm.reporting.canvas import Canvas, Colour, draw_boxes
from kdlvfm.reporting.figures import Objects

_LEAST_DOTS = 600  # narrower images are drawn larger, each pixel as a square: else no legend could be read
_LETTERS = 130  # so many times the size of a letter goes into the longer side of a picture
_LEAST_SIZE = 4.5  # points


def mask_overlay(
    image: Tensor, mask: Tensor, class_names: Sequence[str], palette: Sequence[Colour], path: Path, alpha: float = 0.55
) -> None:
    """Write a PNG of an image under the colours of its classes, with a legend of those that occur.

    Args:
        image: (3, H, W) in [0, 1].
        mask: (H, W), class indices.
        class_names: name of each class.
        palette: (red, green, blue) in 0..255 of each class.
        path: the file to write; its folder is made if need be.
        alpha: share of the colour in each pixel, the image has the rest.
    """
    colours = torch.tensor(palette, dtype=torch.float32) / 255
    pixels = torch.lerp(image.permute(1, 2, 0), colours[mask], alpha)
    legend = [(class_names[index], palette[index]) for index in torch.unique(mask).tolist()]
    canvas, _ = _canvas(image, legend)
    canvas.draw(0, 0, pixels)
    canvas.save(path)


def box_overlay(
    image: Tensor, objects: Objects, class_names: Sequence[str], palette: Sequence[Colour], path: Path
) -> None:
    """Write a PNG of an image with boxes, each with the name of its class and its score in percent.

    Args:
        image: (3, H, W) in [0, 1].
        objects: `"boxes"` (n, 4), corners x1, y1, x2, y2 in pixels, `"labels"` (n,) and `"scores"` (n,) in [0, 1].
        class_names: name of each class.
        palette: (red, green, blue) in 0..255 of each class.
        path: the file to write; its folder is made if need be.
    """
    labels = objects["labels"].tolist()
    canvas, size = _canvas(image, ())
    axis = canvas.draw(0, 0, image.permute(1, 2, 0))
    names = [f"{class_names[k]} {100 * score:.0f}" for k, score in zip(labels, objects["scores"].tolist(), strict=True)]
    height, width = image.shape[-2:]
    draw_boxes(axis, objects["boxes"], names, [palette[label] for label in labels], size, (height, width))
    canvas.save(path)


def _canvas(image: Tensor, legend: Sequence[tuple[str, Colour]]) -> tuple[Canvas, float]:
    """A page of one cell without a margin, each pixel of the image one dot or more, and a size of letters for it."""
    height, width = image.shape[-2:]
    dots = width * math.ceil(_LEAST_DOTS / width)
    size = max(_LEAST_SIZE, dots * max(1.0, height / width) / _LETTERS)
    return Canvas(1, 1, (height, width), dots, legend, gap=0, title=0, caption=0, legend_size=size), size
