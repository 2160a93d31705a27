# SPDX-License-Identifier: Apache-2.0
"""Semantic segmentation: cross-entropy, and intersection over union."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from kdlvfm.core.align import promote
from kdlvfm.core.features import FeatureModel, Features
from kdlvfm.core.task import Task

VOID = 255
UNLABELLED = -1


class Segmentation(Task):
    """One class for each pixel.

    The target is int64 (B, H, W): classes 0..K-1, 255 for void and -1 for unlabelled; the latter two count nowhere.

    Args:
        num_classes: K, from 2 to 255.
        class_names: K names, for the metrics by class; the classes' numbers where left out.
        class_weights: K weights of the classes in the cross-entropy; `None` weighs all pixels alike.

    Raises:
        ValueError: number of names or weights that is not K, or no such number of classes.
    """

    primary_metric = "miou"
    truth = "masks"

    def __init__(
        self,
        num_classes: int,
        *,
        class_names: Sequence[str] | None = None,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        if not 2 <= num_classes <= VOID:
            raise ValueError(f"num_classes must be from 2 to {VOID} ({VOID} itself is void), not {num_classes}.")
        names = tuple(map(str, range(num_classes))) if class_names is None else tuple(class_names)
        for what, given in (("class_names", names), ("class_weights", class_weights)):
            if given is not None and len(given) != num_classes:
                raise ValueError(f"{what} has {len(given)} entries for {num_classes} classes: give one for each class.")
        self.num_classes = num_classes
        self.class_names = names
        self._weights = None if class_weights is None else torch.tensor([float(weight) for weight in class_weights])

    def student_taps(self, student: FeatureModel) -> tuple[str, ...]:
        """`logits`, of every student.

        Raises:
            ValueError: it has none.
        """
        if "logits" not in student.taps():
            raise ValueError(
                f"{student.card.name} is an encoder alone, which task=representation trains: choose a student with a "
                "head for masks, for example student=resnet18_fpn."
            )
        return ("logits",)

    def solves(self, model: FeatureModel) -> bool:
        """Whether the model has dense logits for these classes; those of a classifier of images have no stride."""
        logits = model.taps().get("logits")
        return logits is not None and logits.stride is not None and logits.dim == self.num_classes

    def unpack(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W), masks (B, H, W) and indices (B,) of a batch."""
        return batch["image"], batch["mask"], batch["index"]

    def loss(self, student: FeatureModel, features: Features, target: Tensor) -> dict[str, Tensor]:
        """Cross-entropy of `logits` (B, K, H, W), averaged over labelled pixels; 0 where there are none."""
        del student
        logits = promote(features["logits"])
        if logits.shape[1] != self.num_classes or logits.shape[-2:] != target.shape[-2:]:
            raise ValueError(
                f"logits {tuple(logits.shape)} do not fit {self.num_classes} classes and a mask {tuple(target.shape)}: "
                f"logits must be (B, {self.num_classes}, H, W) in the size of the images."
            )
        known = target.where(target != UNLABELLED, VOID)
        weights = None if self._weights is None else self._weights.to(logits)
        total = F.cross_entropy(logits, known, weights, ignore_index=VOID, reduction="sum")
        labelled = (known != VOID).to(logits)
        if weights is not None:
            labelled = labelled * weights[known.clamp_max(self.num_classes - 1)]
        return {"cross_entropy": total / labelled.sum().clamp_min(torch.finfo(logits.dtype).tiny)}

    def predict(self, student: FeatureModel, features: Features, target: Tensor) -> Tensor:
        """The likeliest class of each pixel, int64 (B, H, W)."""
        del student, target
        return features["logits"].argmax(dim=1)

    def metrics(self) -> SegmentationMetrics:
        """Fresh metrics of predictions (B, H, W) against masks (B, H, W)."""
        return SegmentationMetrics(self.class_names)

    def per_image(self, predictions: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Labelled pixels of each image by class, int64 (B, K): of the `truth`, as `predicted`, and both, `hits`."""
        labelled = (target != VOID) & (target != UNLABELLED)
        size = len(target) * self.num_classes
        first = torch.arange(0, size, self.num_classes, device=target.device).reshape(-1, 1, 1)

        def count(classes: Tensor, where: Tensor) -> Tensor:
            return torch.bincount((classes + first)[where], minlength=size).reshape(len(target), -1)

        return {
            "truth": count(target, labelled),
            "predicted": count(predictions, labelled),
            "hits": count(target, labelled & (predictions == target)),
        }


class SegmentationMetrics(Metric):
    """Intersection over union by class and on average, and pixel accuracy, all as fractions over the whole data set.

    `compute` gives `miou`, `pixel_accuracy` and `iou/<class>`. A class that occurs neither in the truth nor in the
    predictions has no IoU (NaN) and no part in `miou`.

    Args:
        class_names: names of the classes in the order of their numbers.
    """

    full_state_update = False
    higher_is_better = True
    confusion: Tensor

    def __init__(self, class_names: Sequence[str]) -> None:
        super().__init__()
        self._class_names = tuple(class_names)
        size = len(self._class_names)
        self.add_state("confusion", torch.zeros(size, size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, target: Tensor) -> None:
        """Count one batch: classes predicted (B, H, W) against the mask (B, H, W).

        Raises:
            ValueError: a mask value outside the classes.
        """
        size = len(self._class_names)
        counted = (target != VOID) & (target != UNLABELLED)
        truth = target[counted]
        if truth.numel() and not 0 <= truth.min() <= truth.max() < size:
            raise ValueError(f"the mask holds {truth.min()} to {truth.max()}; classes are 0 to {size - 1}.")
        pairs = torch.bincount(truth * size + predictions[counted], minlength=size * size)
        self.confusion += pairs.reshape(size, size)

    def compute(self) -> dict[str, Any]:
        """Scalars by name."""
        confusion = self.confusion.cpu().double()  # not every device has float64
        hits = confusion.diagonal()
        iou = hits / (confusion.sum(0) + confusion.sum(1) - hits)
        scores = {"miou": iou.nanmean(), "pixel_accuracy": hits.sum() / confusion.sum()}
        return {**scores, **{f"iou/{name}": value for name, value in zip(self._class_names, iou, strict=True)}}
