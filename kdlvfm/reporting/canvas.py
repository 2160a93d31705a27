# SPDX-License-Identifier: Apache-2.0
"""A page of images in equal cells with a legend below, and boxes with names drawn on images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Colour: TypeAlias = tuple[int, int, int]
Legend: TypeAlias = Sequence[tuple[str, Colour]]

INK, PAPER = "#222222", "white"
_DOTS_PER_INCH = 200
_POINT = _DOTS_PER_INCH / 72  # dots
_LEGEND_SIZE = 8  # points
_LETTER = 0.64  # width of a letter, as a share of the size of the font
_SQUARE = 2.7  # width of the colour of an entry of the legend with the space around it, likewise


class Canvas:
    """A page of cells, placed in whole dots so that each image pixel becomes a square of equal size.

    Args:
        lines: of cells.
        columns: of cells.
        image: height and width of the images in pixels.
        dots: width of a cell.
        legend: names and colours, below the cells; as many lines of it as they need.
        gap: dots between cells and around them.
        title: dots above the first line.
        caption: dots below each cell.
        legend_size: points of the legend's letters.
    """

    def __init__(
        self,
        lines: int,
        columns: int,
        image: tuple[int, int],
        dots: int,
        legend: Legend,
        *,
        gap: int = 10,
        title: int = 48,
        caption: int = 34,
        legend_size: float = _LEGEND_SIZE,
    ) -> None:
        from matplotlib.figure import Figure

        height, width = image
        self._image, self._gap, self._title, self._caption = image, gap, title, caption
        self.cell = (round(dots * height / width), dots)
        page_width = columns * (dots + gap) + gap
        columns_of_legend = _columns([len(name) for name, _ in legend], page_width / (legend_size * _POINT))
        rows = math.ceil(len(legend) / columns_of_legend)
        legend_dots = round(legend_size * _POINT * (1.1 + 1.35 * rows)) if legend else 0
        self.size = (title + lines * (self.cell[0] + caption) + legend_dots, page_width)
        inches = (self.size[1] / _DOTS_PER_INCH, self.size[0] / _DOTS_PER_INCH)
        self._figure = Figure(figsize=inches, dpi=_DOTS_PER_INCH, facecolor=PAPER)
        if legend:
            self._add_legend(legend, columns_of_legend, legend_dots / 2 / self.size[0], legend_size)

    def draw(self, line: int, column: int, pixels: Tensor, title: str = "", caption: str = "") -> Axes:
        """Put `pixels` (H, W, 3) into a cell, with `title` above the first line and `caption` below the cell.

        Pixels are uint8, or floats in [0, 1], which resizing may have left by a rounding error.

        Returns:
            The axes of the cell, in pixels of the image.
        """
        top = self._title + line * (self.cell[0] + self._caption)
        left = self._gap + column * (self.cell[1] + self._gap)
        (height, width), (page_height, page_width) = self.cell, self.size
        bottom = page_height - top - height
        axis = self._figure.add_axes(
            (left / page_width, bottom / page_height, width / page_width, height / page_height)
        )
        rows, columns = self._image
        shown = pixels.clamp(0, 1) if pixels.is_floating_point() else pixels
        axis.imshow(shown.numpy(), interpolation="nearest", aspect="auto", extent=(0, columns, rows, 0))
        axis.set_axis_off()
        if title and line == 0:
            axis.set_title(title, fontsize=9, color=INK, pad=4)
        if caption:
            place = axis.transAxes
            axis.text(0.5, -5 / height, caption, transform=place, ha="center", va="top", fontsize=6.5, color=INK)
        return axis

    def save(self, path: Path) -> None:
        """Write the page as PNG; its folder is made if need be."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._figure.savefig(path, format="png", dpi=_DOTS_PER_INCH)

    def _add_legend(self, entries: Legend, columns: int, middle: float, size: float) -> None:
        from matplotlib.patches import Patch

        handles = [
            Patch(facecolor=in_hex(colour), edgecolor=INK, linewidth=0.05 * size, label=name)
            for name, colour in entries
        ]
        self._figure.legend(
            handles=handles,
            loc="center",
            bbox_to_anchor=(0.5, middle),
            ncols=columns,
            frameon=False,
            fontsize=size,
            handlelength=1.0,
            handleheight=1.0,
            columnspacing=1.2,
            handletextpad=0.5,
            labelspacing=0.35,
        )


def _columns(lengths: Sequence[int], width: float) -> int:
    """How many columns of entries, which fill one column after the other, fit into a width in sizes of the font."""
    for columns in range(len(lengths), 1, -1):
        rows, longer = divmod(len(lengths), columns)
        ends = [rows * i + min(i, longer) for i in range(columns + 1)]
        widest = [max(lengths[start:end]) for start, end in itertools.pairwise(ends)]
        if _SQUARE * columns + _LETTER * sum(widest) <= width:
            return columns
    return 1


def draw_boxes(
    axis: Axes, boxes: Tensor, names: Sequence[str], colours: Sequence[Colour], size: float, image: tuple[int, int]
) -> None:
    """Draw the outlines of boxes, each with its name on a label of its colour.

    Args:
        axis: of an image, in its pixels.
        boxes: (n, 4), corners x1, y1, x2, y2.
        names: what the label of each box says.
        colours: of each box.
        size: of the letters, in points; lines are as thick as that asks for.
        image: height and width of the image in pixels.
    """
    from matplotlib.patches import Rectangle

    transform = axis.transData.transform
    (_, foot), (_, head) = transform((0, 1)), transform((0, 0))
    tall = 1.5 * size * _POINT / (head - foot)  # a label, in pixels of the image
    for (x1, y1, x2, y2), name, colour in zip(boxes.tolist(), names, colours, strict=True):
        shade = in_hex(colour)
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=shade, linewidth=0.22 * size))
        # A label stands on its box; at the border of the image it goes inside.
        right, inside = x1 + _LETTER * tall * (len(name) + 1) / 1.5 > image[1], y1 < tall
        axis.text(
            min(x2, image[1]) if right else max(x1, 0),
            max(y1, 0) + 0.15 * tall if inside else y1,
            name,
            ha="right" if right else "left",
            va="top" if inside else "bottom",
            fontsize=size,
            color=INK if _is_light(colour) else PAPER,
            bbox={"boxstyle": "square,pad=0.12", "facecolor": shade, "edgecolor": "none"},
            clip_on=True,
        )


def in_hex(colour: Colour) -> str:
    """A colour (red, green, blue), each 0..255, as matplotlib and HTML write it."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _is_light(colour: Colour) -> bool:
    red, green, blue = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue > 140  # ITU-R BT.601
