# SPDX-License-Identifier: Apache-2.0
"""Pictures of predictions beside the truth."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

_Colour = tuple[int, int, int]

_IGNORED_COLOUR = (196, 196, 196)
_INK = "#222222"
_DOTS_PER_INCH = 200
_CELL_DOTS = 300
_GAP_DOTS = 10
_TITLE_DOTS = 48
_CAPTION_DOTS = 34
_LEGEND_DOTS = 36


def prediction_grid(
    images: Tensor,
    truth: Tensor,
    predictions: Mapping[str, Tensor],
    class_names: Sequence[str],
    palette: Sequence[_Colour],
    path: Path,
    ignore: Collection[int] = (255, -1),
) -> None:
    """Write a PNG with one line for each scene: image, truth, then the predictions in the order given.

    Under each prediction stands the mIoU of that scene in percent: the mean over the classes that occur in its truth or
    in the prediction, ignored pixels left out.

    Args:
        images: (n, 3, H, W) in [0, 1].
        truth: (n, H, W), class indices and ignored values.
        predictions: title of the column -> (n, H, W), class indices.
        class_names: name of each class, for the legend.
        palette: (red, green, blue) in 0..255 of each class.
        path: the file to write; its folder is made if need be.
        ignore: values of `truth` that stand for no class; drawn in grey.

    Raises:
        ValueError: shapes that do not fit, or class indices without a name and a colour.
    """
    _check(images, truth, predictions, class_names, palette, ignore)
    colours = torch.tensor([*palette, _IGNORED_COLOUR], dtype=torch.uint8)
    ignored = _ignored(truth, ignore)
    present = torch.cat([truth[~ignored], *(prediction.flatten() for prediction in predictions.values())])
    legend = [(class_names[index], palette[index]) for index in torch.unique(present).tolist()]
    if ignored.any():
        legend.append(("ignored", _IGNORED_COLOUR))
    canvas = _Canvas(images.shape, 2 + len(predictions), legend)
    for line in range(len(images)):
        canvas.draw(line, 0, images[line].permute(1, 2, 0), "image", "")
        canvas.draw(line, 1, colours[truth[line].masked_fill(ignored[line], len(palette)).long()], "truth", "")
        for column, (title, prediction) in enumerate(predictions.items(), start=2):
            score = scene_miou(prediction[line], truth[line], ignore)
            caption = "" if score is None else f"mIoU {100 * score:.0f} %"
            canvas.draw(line, column, colours[prediction[line].long()], title, caption)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.figure.savefig(path, format="png", dpi=_DOTS_PER_INCH)


def scene_miou(prediction: Tensor, truth: Tensor, ignore: Collection[int] = (255, -1)) -> float | None:
    """Mean IoU of one scene, (H, W) each, over the classes in truth or prediction; `None` if all is ignored."""
    seen = ~_ignored(truth, ignore)
    prediction, truth = prediction[seen], truth[seen]
    shares = []
    for index in torch.unique(torch.cat([prediction, truth])):
        both, either = (prediction == index) & (truth == index), (prediction == index) | (truth == index)
        shares.append(int(both.sum()) / int(either.sum()))
    return fmean(shares) if shares else None


def _check(
    images: Tensor,
    truth: Tensor,
    predictions: Mapping[str, Tensor],
    class_names: Sequence[str],
    palette: Sequence[_Colour],
    ignore: Collection[int],
) -> None:
    if images.dim() != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"images must be (n, 3, H, W) with n > 0, not {tuple(images.shape)}.")
    if len(class_names) != len(palette):
        raise ValueError(f"{len(class_names)} class names do not match {len(palette)} colours.")
    size = (len(images), *images.shape[-2:])
    for title, mask in {"truth": truth, **predictions}.items():
        if tuple(mask.shape) != size:
            raise ValueError(f"{title!r} must have the shape {size} of the images, not {tuple(mask.shape)}.")
        named = mask[~_ignored(mask, ignore)] if mask is truth else mask
        if named.numel() and (named.min() < 0 or named.max() >= len(palette)):
            low, high = int(named.min()), int(named.max())
            raise ValueError(
                f"{title!r} holds classes {low} to {high}; names and colours are for 0 to {len(palette) - 1}."
            )


def _ignored(mask: Tensor, ignore: Collection[int]) -> Tensor:
    return torch.isin(mask, torch.tensor(sorted(ignore), dtype=mask.dtype, device=mask.device))


class _Canvas:
    """A page of equal cells, placed in whole dots so that each image pixel becomes a square of equal size."""

    def __init__(self, images: torch.Size, columns: int, legend: Sequence[tuple[str, _Colour]]) -> None:
        from matplotlib.figure import Figure

        lines, _, height, width = images
        legend_dots = _LEGEND_DOTS * (1 + math.ceil(len(legend) / (2 * columns)))
        dots = min(width * math.ceil(_CELL_DOTS / width), 3 * _CELL_DOTS // 2)
        self.cell = (round(dots * height / width), dots)
        self.size = (
            _TITLE_DOTS + lines * (self.cell[0] + _CAPTION_DOTS) + legend_dots,
            columns * (dots + _GAP_DOTS) + _GAP_DOTS,
        )
        inches = (self.size[1] / _DOTS_PER_INCH, self.size[0] / _DOTS_PER_INCH)
        self.figure = Figure(figsize=inches, dpi=_DOTS_PER_INCH, facecolor="white")
        self._add_legend(legend, 2 * columns, legend_dots / 2 / self.size[0])

    def draw(self, line: int, column: int, pixels: Tensor, title: str, caption: str) -> None:
        """Put `pixels` (H, W, 3) into a cell, with `title` above the first line and `caption` below the cell."""
        top = _TITLE_DOTS + line * (self.cell[0] + _CAPTION_DOTS)
        left = _GAP_DOTS + column * (self.cell[1] + _GAP_DOTS)
        (height, width), (page_height, page_width) = self.cell, self.size
        bottom = page_height - top - height
        box = (left / page_width, bottom / page_height, width / page_width, height / page_height)
        axis = self.figure.add_axes(box)
        axis.imshow(pixels.numpy(), interpolation="nearest", aspect="auto")
        axis.set_axis_off()
        if line == 0:
            axis.set_title(title, fontsize=9, color=_INK, pad=4)
        axis.text(0.5, -5 / height, caption, transform=axis.transAxes, ha="center", va="top", fontsize=6.5, color=_INK)

    def _add_legend(self, entries: Sequence[tuple[str, _Colour]], columns: int, middle: float) -> None:
        from matplotlib.patches import Patch

        handles = [
            Patch(facecolor="#{:02x}{:02x}{:02x}".format(*colour), edgecolor=_INK, linewidth=0.4, label=name)
            for name, colour in entries
        ]
        self.figure.legend(
            handles=handles,
            loc="center",
            bbox_to_anchor=(0.5, middle),
            ncols=min(len(handles), columns),
            frameon=False,
            fontsize=8,
            handlelength=1.0,
            handleheight=1.0,
            columnspacing=1.2,
            handletextpad=0.5,
        )
