# SPDX-License-Identifier: Apache-2.0
"""What every detection data set shares: batches of padded images and their boxes, with unlabelled images or without."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from kdlvfm.data.base import DataError
from kdlvfm.data.box_transforms import BoxAugmentation
from kdlvfm.data.boxes import Boxes, Sample, clip, fitting_factor, resize
from kdlvfm.data.mixed import MixedData
from kdlvfm.data.sampler import SampleKey
from kdlvfm.data.sets import Batch, EvaluationSet, TrainingSet, drawing
from kdlvfm.data.transforms import PAD_COLOUR

PAD_MULTIPLE = 32
"""Sides of a batch's images are multiples of this, the stride of a CNN's last map."""


class Samples(Protocol):
    """A map-style data set of images with their objects."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


class DetectionData(MixedData):
    """Loaders of a detection data set. A subclass names the classes and gives the samples.

    A batch is `{"image": float (B, 3, H, W) in [0, 1], "target": list, "index": int64 (B,)}`. Images keep their aspect
    ratio and are padded at the right and at the bottom, in a grey that is nearly zero after every model's own
    normalisation. The target has for each image `"boxes"`, float32 (n, 4), corners x1, y1, x2, y2 in pixels of the
    padded image; `"labels"`, int64 (n,), classes 0..K-1; and `"size"`, int64 (2,), height and width of the part that is
    no padding. Images without objects are kept. In training, boxes of crowds are left out, and where there are
    unlabelled images the target also has `"labelled"`, bool (), false for an image whose objects are not known and
    which has no boxes therefore. In evaluation crowds are there, with what metrics in the original pixels need:
    `"scale"`, float32 (2,), factors (y, x) by which the original was resized; `"original_size"`, int64 (2,);
    `"iscrowd"`, bool (n,); `"area"`, float32 (n,), in original pixels; and `"repeated"`, bool (), true for a sample
    that only fills up the last round of a distributed run.

    Args:
        resize: length in pixels of the shorter and the longer side that images grow or shrink to, the tighter of the
            two; `None` keeps their size.
        augmentation: applied to training samples; `None` leaves them alone. A mosaic is of samples of one part of the
            batch.
        **loading: see `MixedData`.

    Raises:
        DataError: sizes that are not positive or do not fit each other, an augmentation for masks, or
            `augment_on_device`.
    """

    truth = "boxes"
    augmentation: BoxAugmentation | None

    def __init__(
        self, *, resize: Sequence[int] | None = None, augmentation: BoxAugmentation | None = None, **loading: Any
    ) -> None:
        super().__init__(**loading)
        if not isinstance(augmentation, BoxAugmentation | None):
            raise DataError("recipe.augmentation is not made for boxes: choose a recipe for detection, such as 1x.")
        if resize is not None and (len(resize) != 2 or not 1 <= resize[0] <= resize[1]):
            raise DataError(f"data.resize must be [short, long] side in pixels or null, not {resize}.")
        if self.augment_on_device:
            raise DataError("data.augment_on_device is for masks and images without labels: leave it out for boxes.")
        self.resize = None if resize is None else (int(resize[0]), int(resize[1]))
        self.augmentation = augmentation

    @abstractmethod
    def samples(self, split: str) -> Samples:
        """Labelled samples of `"train"`, `"val"` or `"test"`."""

    def unlabelled_samples(self) -> Samples | None:
        """Training samples whose objects are not known, without boxes; `None` if there are none."""
        return None

    def check(self) -> None:
        """Validate a sample of every part.

        Raises:
            DataError: a split without samples, a sample that cannot be used, or batches that cannot be filled.
        """
        self.check_filled()
        parts = {split: self.samples(split) for split in self.splits}
        unlabelled = self.unlabelled_samples()
        if unlabelled is not None:
            parts["unlabelled"] = unlabelled
        for part, samples in parts.items():
            check_sample(*samples[0], self.num_classes, f"sample 0 of {part!r} in {self.name}")
        self.batch_parts()

    def check_filled(self) -> None:
        """Raise `DataError` if a split has no images."""
        for split in self.splits:
            if not len(self.samples(split)):
                raise DataError(f"{self.name} has no image in {split!r}: a run needs at least one.")

    def counts(self) -> dict[str, int]:
        """Number of images by split; with unlabelled ones, `train` is `labelled` and `unlabelled` together."""
        found = {split: len(self.samples(split)) if split in self.splits else 0 for split in ("train", "val", "test")}
        if not self.num_unlabelled:
            return found
        parts = {"labelled": self.num_labelled, "unlabelled": self.num_unlabelled}
        return {**found, "train": self.num_samples, **parts}

    @staticmethod
    def collate(samples: list[Batch]) -> Batch:
        """A batch of samples whose images differ in size."""
        images = [sample["image"] for sample in samples]
        height, width = (
            -(-max(image.shape[side] for image in images) // PAD_MULTIPLE) * PAD_MULTIPLE for side in (-2, -1)
        )
        padded = torch.tensor(PAD_COLOUR).div(255)[:, None, None].repeat(len(images), 1, height, width)
        for place, image in zip(padded, images, strict=True):
            place[:, : image.shape[-2], : image.shape[-1]] = image
        return {
            "image": padded,
            "target": [sample["target"] for sample in samples],
            "index": default_collate([sample["index"] for sample in samples]),
        }

    def training_set(self) -> TrainingSet:
        """Augmented samples with and without boxes."""
        parts = self.samples("train"), self.unlabelled_samples()
        return _TrainingSet(*parts, self.augmentation, self.resize, self.seed)

    def evaluation_set(self, split: str, rank: int = 0, processes: int = 1) -> Dataset[Batch]:
        """One process's share of a split; what is missing from the last round is a sample marked as repeated."""
        return _EvaluationSet(self.samples(split), self.resize, rank, processes)


def check_sample(image: Tensor, boxes: Boxes, num_classes: int, what: str) -> None:
    """Raise `DataError`, naming `what`, unless the sample is one of `Samples` with classes below `num_classes`."""
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
        raise DataError(f"{what}: the image must be uint8 (3, H, W), not {image.dtype} {tuple(image.shape)}.")
    if boxes.corners.dtype != torch.float32 or boxes.corners.shape != (len(boxes), 4):
        raise DataError(
            f"{what}: the boxes must be float32 ({len(boxes)}, 4) as there are labels, not {boxes.corners.dtype} "
            f"{tuple(boxes.corners.shape)}."
        )
    if strange := sorted(set(boxes.labels.tolist()) - set(range(num_classes))):
        raise DataError(
            f"{what}: there are boxes of class {', '.join(map(str, strange))}; classes are 0 to {num_classes - 1}."
        )


class _TrainingSet(TrainingSet):
    """Augmented samples of both parts."""

    def __init__(
        self,
        labelled: Samples,
        unlabelled: Samples | None,
        augmentation: BoxAugmentation | None,
        limits: tuple[int, int] | None,
        seed: int,
    ) -> None:
        self._labelled = labelled
        self._unlabelled = unlabelled
        self._augmentation = augmentation
        self._limits = limits
        self._seed = seed

    def read(self, key: SampleKey) -> Sample:
        part, place = self._part(key)
        return _without_crowds(part, place)

    def finish(self, sample: Sample, key: SampleKey) -> Batch:
        part, _ = self._part(key)
        if self._augmentation is None:
            image, boxes = clip(resize(sample, self._fit(sample[0].shape[-2:])))
        else:
            with drawing(self._seed, key):
                image, boxes = self._augmentation(sample, self._fit, functools.partial(_more, part))
        mark = {} if self._unlabelled is None else {"labelled": torch.tensor(part is self._labelled)}
        return {"image": image.float() / 255, "target": _target(image, boxes) | mark, "index": key.sample}

    def _part(self, key: SampleKey) -> tuple[Samples, int]:
        beyond = key.sample - len(self._labelled)
        return (self._labelled, key.sample) if beyond < 0 or self._unlabelled is None else (self._unlabelled, beyond)

    def _fit(self, size: Sequence[int]) -> float:
        return fitting_factor(size, self._limits)


def _more(samples: Samples, count: int) -> list[Sample]:
    return [_without_crowds(samples, i) for i in torch.randint(len(samples), (count,)).tolist()]


def _without_crowds(samples: Samples, index: int) -> Sample:
    image, boxes = samples[index]
    return image, boxes[~boxes.iscrowd]


class _EvaluationSet(EvaluationSet):
    """Samples as they are, resized."""

    def __init__(self, samples: Samples, limits: tuple[int, int] | None, rank: int, processes: int) -> None:
        super().__init__(len(samples), rank, processes)
        self._samples = samples
        self._limits = limits

    def read(self, index: int, *, repeated: bool) -> Batch:
        original = self._samples[index]
        before = torch.tensor(original[0].shape[-2:])
        image, boxes = resize(original, fitting_factor(original[0].shape[-2:], self._limits))
        target = _target(image, boxes)
        target |= {
            "scale": target["size"] / before,
            "original_size": before,
            "iscrowd": boxes.iscrowd,
            "area": boxes.area,
            "repeated": torch.tensor(repeated),
        }
        return {"image": image.float() / 255, "target": target, "index": index}


def _target(image: Tensor, boxes: Boxes) -> dict[str, Tensor]:
    return {"boxes": boxes.corners, "labels": boxes.labels, "size": torch.tensor(image.shape[-2:])}
