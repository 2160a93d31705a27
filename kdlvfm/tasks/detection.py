# SPDX-License-Identifier: Apache-2.0
"""Object detection: the loss of the student's own head, and COCO's average precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import faster_coco_eval  # noqa: F401  # torchmetrics needs it: without it, an error now and not after training
import numpy as np
import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from kdlvfm.core.align import promote
from kdlvfm.core.boxes import labelled_images
from kdlvfm.core.detector import Detector
from kdlvfm.core.features import FeatureModel, Features
from kdlvfm.core.task import Task

Target = Sequence[Mapping[str, Tensor]]
Predictions = Sequence[Mapping[str, Tensor]]

# As COCO has them, to the last bit: torchmetrics' own are in single precision, which moves results by up to 1e-3.
_IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10).tolist()
_RECALL_THRESHOLDS = np.linspace(0, 1, 101).tolist()
_NAMES = {
    "mAP": "map",
    "AP50": "map_50",
    "AP75": "map_75",
    "APs": "map_small",
    "APm": "map_medium",
    "APl": "map_large",
}


class Detection(Task):
    """A box and a class for each object.

    The target is a list with a dict for each image: `"boxes"`, float (n, 4), corners x1, y1, x2, y2 in pixels of the
    image given; `"labels"`, int64 (n,), classes 0..K-1; `"size"`, int64 (2,), height and width of the part that is no
    padding. For the metrics it also has `"scale"`, `"original_size"`, `"iscrowd"`, `"area"` and `"repeated"`, see
    `DetectionMetrics`. Images whose `"labelled"` is false have no part in the loss.

    Args:
        num_classes: K.
        class_names: K names, for the metrics by class; the classes' numbers where left out.

    Raises:
        ValueError: number of names that is not K, or no class at all.
    """

    primary_metric = "mAP"
    truth = "boxes"

    def __init__(self, num_classes: int, *, class_names: Sequence[str] | None = None) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, not {num_classes}.")
        names = tuple(map(str, range(num_classes))) if class_names is None else tuple(class_names)
        if len(names) != num_classes:
            raise ValueError(
                f"class_names has {len(names)} entries for {num_classes} classes: give one for each class."
            )
        self.num_classes = num_classes
        self.class_names = names

    def student_taps(self, student: FeatureModel) -> tuple[str, ...]:
        """What the head's loss and decoder read.

        Raises:
            ValueError: the student is no detector, or one for another number of classes.
        """
        detector = _detector(student)
        if detector.num_classes != self.num_classes:
            raise ValueError(
                f"{student.card.name} detects {detector.num_classes} classes, the data has {self.num_classes}: use a "
                "detector for these classes."
            )
        return detector.task_taps

    def solves(self, model: FeatureModel) -> bool:
        """Whether the model is a detector for so many classes."""
        return isinstance(model, Detector) and model.num_classes == self.num_classes

    def unpack(self, batch: Mapping[str, Any]) -> tuple[Tensor, Target, Tensor]:
        """Images (B, 3, H, W), a dict for each of them, and indices (B,) of a batch."""
        return batch["image"], batch["target"], batch["index"]

    def loss(self, student: FeatureModel, features: Features, target: Target) -> dict[str, Tensor]:
        """The terms of the student's head, on the labelled images of the batch; none where there are none."""
        known = labelled_images(target)
        if not known:
            return {}
        if len(known) < len(target):
            features = {tap: features[tap][known] for tap in _detector(student).task_taps}
        seen = {tap: promote(value) for tap, value in features.items()}
        return _detector(student).loss(seen, [target[i] for i in known])

    def predict(self, student: FeatureModel, features: Features, target: Target) -> Predictions:
        """For each image `"boxes"` (m, 4) in pixels of the image given, `"scores"` (m,) and `"labels"` (m,)."""
        sizes = [truth["size"] for truth in target]
        return _detector(student).predict({tap: promote(value) for tap, value in features.items()}, sizes)

    def metrics(self) -> DetectionMetrics:
        """Fresh metrics."""
        return DetectionMetrics(self.class_names)


def _detector(model: FeatureModel) -> Detector:
    if not isinstance(model, Detector):
        raise ValueError(f"{model.card.name} is no detector: choose one, for example student=resnet18_gfl.")
    return model


class DetectionMetrics:
    """COCO's average precision, all as fractions, in pixels of the original images.

    `compute` gives `mAP` (COCO's AP: the mean over IoU thresholds 0.50 to 0.95 and over the classes that occur), `AP50`
    and `AP75` (at one threshold), `APs`, `APm` and `APl` (objects below 32x32 pixels, below 96x96 pixels, and above),
    and `AP/<class>`; 100 boxes an image count. What no object belongs to is NaN. The numbers are those of pycocotools.

    Args:
        class_names: names of the classes in the order of their numbers.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self._class_names = tuple(class_names)
        self._coco = MeanAveragePrecision(
            backend="faster_coco_eval",
            iou_thresholds=_IOU_THRESHOLDS,
            rec_thresholds=_RECALL_THRESHOLDS,
            class_metrics=True,
        )
        self._coco.warn_on_many_detections = False

    def update(self, predictions: Predictions, target: Target) -> None:
        """Add one batch.

        Args:
            predictions: as `Detection.predict` gives them.
            target: ground truth with `"scale"`, float (2,), factors (y, x) from the original to the image given;
                `"iscrowd"`, bool (n,); `"area"`, float (n,), in original pixels; and `"repeated"`, bool (), true for an
                image that another process counts.
        """
        for found, truth in zip(predictions, target, strict=True):
            # Processes must have equally many images when they meet: one that counts elsewhere is here without boxes.
            counted = slice(0 if truth["repeated"] else None)
            scale = truth["scale"].flip(0).repeat(2)
            self._coco.update(
                [
                    {
                        "boxes": (promote(found["boxes"]) / scale)[counted],
                        "scores": promote(found["scores"])[counted],
                        "labels": found["labels"][counted],
                    }
                ],
                [
                    {
                        "boxes": (truth["boxes"] / scale)[counted],
                        "labels": truth["labels"][counted],
                        "iscrowd": truth["iscrowd"].long()[counted],
                        "area": truth["area"][counted],
                    }
                ],
            )

    def compute(self) -> dict[str, Any]:
        """Scalars by name."""
        result = self._coco.compute()
        # COCO marks what is not defined with -1.
        scores = {name: _defined(result[key]) for name, key in _NAMES.items()}
        by_class = dict(zip(result["classes"].reshape(-1).tolist(), result["map_per_class"].reshape(-1), strict=False))
        undefined = torch.tensor(-1.0)
        return {
            **scores,
            **{f"AP/{name}": _defined(by_class.get(k, undefined)) for k, name in enumerate(self._class_names)},
        }

    def reset(self) -> None:
        """Forget all batches."""
        self._coco.reset()

    def to(self, device: torch.device | str) -> DetectionMetrics:
        """Move the state to `device`."""
        self._coco.to(device)
        return self


def _defined(value: Tensor) -> Tensor:
    return value.where(value >= 0, torch.nan)
