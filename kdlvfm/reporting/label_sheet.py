# SPDX-License-Identifier: Apache-2.0
"""A sheet of images with the labels that a model gave them, to see at a glance whether they are any good."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlvfm.reporting.canvas import Canvas, Colour, draw_boxes
from kdlvfm.reporting.figures import Objects
from kdlvfm.reporting.sheet import image_sheet

UNSURE: Colour = (196, 196, 196)
"""Of pixels without a label."""

_SIDE = 256  # pixels of the longer side of an image on a sheet
_COLUMNS = 4
_LABEL_SIZE = 6  # points


def mask_sheet(
    images: Sequence[Tensor],
    masks: Sequence[Tensor],
    class_names: Sequence[str],
    palette: Sequence[Colour],
    title: str,
    path: Path,
) -> None:
    """Write a PNG of images, each followed by its classes as colours, with the share of its pixels that have one.

    Args:
        images: each (3, H, W) in [0, 1], of any size.
        masks: each (H, W), class indices; pixels of any other value are drawn in grey.
        class_names: name of each class.
        palette: (red, green, blue) in 0..255 of each class.
        title: who labelled.
        path: the file to write; its folder is made if need be.
    """
    last = len(palette)
    known = [mask.where((mask >= 0) & (mask < last), last).long() for mask in masks]
    colours = torch.tensor([*palette, UNSURE]) / 255
    names = {**dict(enumerate(class_names)), last: "not sure"}
    present = torch.unique(torch.cat([mask.flatten() for mask in known])).tolist()
    legend = [(names[index], [*palette, UNSURE][index]) for index in present]
    captions = [f"{100 * float((mask < last).float().mean()):.0f} % labelled" for mask in known]
    beside = _together([fitted(colours[mask].permute(2, 0, 1), smooth=False) for mask in known])
    image_sheet(_together([fitted(image) for image in images]), beside, captions, title, path, legend)


def box_sheet(
    images: Sequence[Tensor],
    found: Sequence[Objects],
    class_names: Sequence[str],
    palette: Sequence[Colour],
    title: str,
    path: Path,
) -> None:
    """Write a PNG of images with boxes, each with the name of its class and its score in percent.

    Args:
        images: each (3, H, W) in [0, 1], of any size.
        found: objects of each image, boxes in its pixels.
        class_names: name of each class.
        palette: (red, green, blue) in 0..255 of each class.
        title: who labelled.
        path: the file to write; its folder is made if need be.
    """
    small = [fitted(image) for image in images]
    pixels = _together(small)
    height, width = pixels.shape[-2:]
    columns = min(_COLUMNS, len(small))
    canvas = Canvas(math.ceil(len(small) / columns), columns, (height, width), 2 * width, ())
    for number, (image, picture, objects) in enumerate(zip(images, small, found, strict=True)):
        line, column = divmod(number, columns)
        labels, scores = objects["labels"].tolist(), objects["scores"].tolist()
        caption = f"{len(labels)} boxes" if len(labels) != 1 else "1 box"
        axis = canvas.draw(line, column, pixels[number].permute(1, 2, 0), title if not column else "", caption)
        names = [f"{class_names[k]} {100 * score:.0f}" for k, score in zip(labels, scores, strict=True)]
        boxes = objects["boxes"] * (picture.shape[-1] / image.shape[-1])
        draw_boxes(axis, boxes, names, [palette[label] for label in labels], _LABEL_SIZE, (height, width))
    canvas.save(path)


def fitted(image: Tensor, smooth: bool = True) -> Tensor:
    """An image (3, H, W) with a longer side of 256 pixels.

    Args:
        image: of any size; where it grows, each pixel becomes a square.
        smooth: average what becomes one pixel; otherwise pixels are left out, and no colour is new.

    Example:
        >>> fitted(torch.rand(3, 100, 200)).shape
        torch.Size([3, 128, 256])
    """
    factor = _SIDE / max(image.shape[-2:])
    size = [max(1, round(side * factor)) for side in image.shape[-2:]]
    if factor >= 1 or not smooth:
        return F.interpolate(image[None], size, mode="nearest-exact")[0]
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def _together(images: Sequence[Tensor]) -> Tensor:
    """Images of different sizes as one batch, on white."""
    height, width = (max(image.shape[side] for image in images) for side in (-2, -1))
    return torch.stack(
        [F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]), value=1.0) for image in images]
    )
