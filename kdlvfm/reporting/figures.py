# SPDX-License-Identifier: Apache-2.0
"""Pictures of predictions beside the truth: scenes in lines, truth and models in columns."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from kdlvfm.reporting.canvas import Canvas, Colour, draw_boxes

Objects = Mapping[str, Tensor]
"""Objects of an image: `"boxes"` (n, 4), `"labels"` (n,) and, of predictions, `"scores"` (n,)."""

_IGNORED_COLOUR = (196, 196, 196)
_CELL_DOTS = 300
_LABEL_SIZE = 7  # points
_SAME_OBJECT = 0.5  # IoU, COCO's most lenient threshold


def mask_grid(
    images: Tensor,
    truth: Tensor,
    predictions: Mapping[str, Tensor],
    class_names: Sequence[str],
    palette: Sequence[Colour],
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
    _check_images(images, class_names, palette)
    size = (len(images), *images.shape[-2:])
    ignored = _ignored(truth, ignore)
    for title, mask in {"truth": truth, **predictions}.items():
        if tuple(mask.shape) != size:
            raise ValueError(f"{title!r} must have the shape {size} of the images, not {tuple(mask.shape)}.")
        _check_classes(title, mask[~ignored] if mask is truth else mask, palette)
    colours = torch.tensor([*palette, _IGNORED_COLOUR], dtype=torch.uint8)
    present = torch.cat([truth[~ignored], *(prediction.flatten() for prediction in predictions.values())])
    legend = [(class_names[index], palette[index]) for index in torch.unique(present).tolist()]
    if ignored.any():
        legend.append(("ignored", _IGNORED_COLOUR))
    canvas = _canvas(images, 2 + len(predictions), legend)
    for line in range(len(images)):
        canvas.draw(line, 0, images[line].permute(1, 2, 0), "image")
        canvas.draw(line, 1, colours[truth[line].masked_fill(ignored[line], len(palette)).long()], "truth")
        for column, (title, prediction) in enumerate(predictions.items(), start=2):
            score = scene_miou(prediction[line], truth[line], ignore)
            caption = "" if score is None else f"mIoU {100 * score:.0f} %"
            canvas.draw(line, column, colours[prediction[line].long()], title, caption)
    canvas.save(path)


def box_grid(
    images: Tensor,
    truth: Sequence[Objects],
    predictions: Mapping[str, Sequence[Objects]],
    class_names: Sequence[str],
    palette: Sequence[Colour],
    path: Path,
    least_score: float = 0.3,
) -> None:
    """Write a PNG with one line for each scene: image, its objects, then what each model found.

    Under each prediction stands how many of the objects were found, see `scene_hits`, and how many boxes are no object.

    Args:
        images: (n, 3, H, W) in [0, 1].
        truth: objects of each image, boxes in its pixels.
        predictions: title of the column -> objects of each image.
        class_names: name of each class, for the labels.
        palette: (red, green, blue) in 0..255 of each class.
        path: the file to write; its folder is made if need be.
        least_score: boxes with a lower score are left out.

    Raises:
        ValueError: numbers of images that differ, or classes without a name and a colour.
    """
    _check_images(images, class_names, palette)
    for title, found in {"truth": truth, **predictions}.items():
        if len(found) != len(images):
            raise ValueError(f"{title!r} must have an entry for each of the {len(images)} images, not {len(found)}.")
        _check_classes(title, torch.cat([objects["labels"] for objects in found]), palette)
    canvas = _canvas(images, 2 + len(predictions), ())
    size = (images.shape[-2], images.shape[-1])

    def draw(line: int, column: int, title: str, objects: Objects, caption: str = "") -> None:
        axis = canvas.draw(line, column, images[line].permute(1, 2, 0), title, caption)
        labels = objects["labels"].tolist()
        names, colours = [class_names[label] for label in labels], [palette[label] for label in labels]
        draw_boxes(axis, objects["boxes"], names, colours, _LABEL_SIZE, size)

    for line in range(len(images)):
        canvas.draw(line, 0, images[line].permute(1, 2, 0), "image")
        draw(line, 1, "truth", truth[line])
        for column, (title, found) in enumerate(predictions.items(), start=2):
            shown = above(found[line], least_score)
            hits = scene_hits(shown, truth[line])
            wrong = len(shown["labels"]) - hits
            caption = f"{hits} of {len(truth[line]['labels'])} found" + (f", {wrong} wrong" if wrong else "")
            draw(line, column, title, shown, caption)
    canvas.save(path)


def above(objects: Objects, least_score: float) -> Objects:
    """Those with at least this score, the surest last, so that it is drawn on top."""
    order = objects["scores"].argsort(stable=True)
    kept = order[objects["scores"][order] >= least_score]
    return {name: objects[name][kept] for name in ("boxes", "labels", "scores")}


def scene_hits(found: Objects, truth: Objects) -> int:
    """How many objects of a scene were found: by a box of their class with IoU 0.5 or more, one box for each object.

    As in COCO's evaluation the surest box chooses first, the object that it covers best.
    """
    hits, left = 0, [*range(len(truth["labels"]))]
    for i in found["scores"].argsort(descending=True, stable=True).tolist():
        fits = {j: _iou(found["boxes"][i], truth["boxes"][j]) for j in left if found["labels"][i] == truth["labels"][j]}
        best = max(fits, key=lambda j: fits[j], default=None)
        if best is not None and fits[best] >= _SAME_OBJECT:
            left.remove(best)
            hits += 1
    return hits


def _iou(first: Tensor, second: Tensor) -> float:
    inner = (torch.minimum(first[2:], second[2:]) - torch.maximum(first[:2], second[:2])).clamp(min=0).prod()
    outer = (first[2:] - first[:2]).prod() + (second[2:] - second[:2]).prod() - inner
    return float(inner / outer)


def scene_miou(prediction: Tensor, truth: Tensor, ignore: Collection[int] = (255, -1)) -> float | None:
    """Mean IoU of one scene, (H, W) each, over the classes in truth or prediction; `None` if all is ignored."""
    seen = ~_ignored(truth, ignore)
    prediction, truth = prediction[seen], truth[seen]
    shares = []
    for index in torch.unique(torch.cat([prediction, truth])):
        both, either = (prediction == index) & (truth == index), (prediction == index) | (truth == index)
        shares.append(int(both.sum()) / int(either.sum()))
    return fmean(shares) if shares else None


def _canvas(images: Tensor, columns: int, legend: Sequence[tuple[str, Colour]]) -> Canvas:
    height, width = images.shape[-2:]
    dots = min(width * math.ceil(_CELL_DOTS / width), 3 * _CELL_DOTS // 2)
    return Canvas(len(images), columns, (height, width), dots, legend)


def _check_images(images: Tensor, class_names: Sequence[str], palette: Sequence[Colour]) -> None:
    if images.dim() != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"images must be (n, 3, H, W) with n > 0, not {tuple(images.shape)}.")
    if len(class_names) != len(palette):
        raise ValueError(f"{len(class_names)} class names do not match {len(palette)} colours.")


def _check_classes(title: str, classes: Tensor, palette: Sequence[Colour]) -> None:
    if classes.numel() and (classes.min() < 0 or classes.max() >= len(palette)):
        low, high = int(classes.min()), int(classes.max())
        raise ValueError(f"{title!r} holds classes {low} to {high}; names and colours are for 0 to {len(palette) - 1}.")


def _ignored(mask: Tensor, ignore: Collection[int]) -> Tensor:
    return torch.isin(mask, torch.tensor(sorted(ignore), dtype=mask.dtype, device=mask.device))
