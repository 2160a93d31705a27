# SPDX-License-Identifier: Apache-2.0
"""What every segmentation data set shares: batches of images and masks, with unlabelled images or without."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdlvfm.data.base import DataError
from kdlvfm.data.mixed import MixedData
from kdlvfm.data.sampler import SampleKey
from kdlvfm.data.sets import Batch, EvaluationSet, TrainingSet, drawing
from kdlvfm.data.transforms import Augmentation

VOID = 255
"""Mask value of pixels that belong to no class; every loss and metric leaves them out."""

UNLABELLED = -1
"""Mask value of pixels whose class is not known; distillation applies to them, the task's loss does not."""


class Samples(Protocol):
    """A map-style data set; item i is (image uint8 (3, H, W), mask int64 (H, W))."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]: ...


class SegmentationData(MixedData):
    """Loaders of a segmentation data set. A subclass names the classes and gives the samples.

    A batch is `{"image": float (B, 3, H, W) in [0, 1], "mask": int64 (B, H, W), "index": int64 (B,)}`. Masks hold
    classes 0..K-1, 255 for void and -1 for unlabelled.

    Args:
        augmentation: applied to training samples; `None` leaves them alone.
        **loading: see `MixedData`; an `eval_batch_size` of more than 1 needs images of one size.

    Raises:
        DataError: sizes that are not positive or do not fit each other, or an augmentation for boxes.
    """

    truth = "masks"
    augmentation: Augmentation | None

    def __init__(self, *, augmentation: Augmentation | None = None, **loading: Any) -> None:
        super().__init__(**loading)
        if not isinstance(augmentation, Augmentation | None):
            raise DataError("recipe.augmentation is not made for masks: choose a recipe for segmentation.")
        self.augmentation = augmentation

    @abstractmethod
    def samples(self, split: str) -> Samples:
        """Labelled samples of `"train"`, `"val"` or `"test"`."""

    def unlabelled_samples(self) -> Samples | None:
        """Training samples whose masks are -1 everywhere; `None` if there are none."""
        return None

    def check(self) -> None:
        """Validate a sample of every part.

        Raises:
            DataError: a sample that cannot be used, or batches that cannot be filled.
        """
        parts = {split: self.samples(split) for split in self.splits}
        unlabelled = self.unlabelled_samples()
        if unlabelled is not None:
            parts["unlabelled"] = unlabelled
        for part, samples in parts.items():
            if not len(samples):
                raise DataError(f"{self.name} has no sample in {part!r}: a run needs at least one.")
            check_sample(*samples[0], self.num_classes, f"sample 0 of {part!r} in {self.name}")
        self.batch_parts()

    def counts(self) -> dict[str, int]:
        """Number of samples by split, for the run record; `train` is `labelled` and `unlabelled` together."""
        evaluation = {split: len(self.samples(split)) if split in self.splits else 0 for split in ("val", "test")}
        return {
            "train": self.num_samples,
            "labelled": self.num_labelled,
            "unlabelled": self.num_unlabelled,
            **evaluation,
        }

    def training_set(self) -> TrainingSet:
        """Augmented samples with and without mask."""
        return _TrainingSet(self.samples("train"), self.unlabelled_samples(), self.augmentation, self.seed)

    def evaluation_set(self, split: str, rank: int = 0, processes: int = 1) -> Dataset[Batch]:
        """One process's share of a split; what is missing from the last round is a sample whose mask is void."""
        return _EvaluationSet(self.samples(split), rank, processes)


def check_sample(image: Tensor, mask: Tensor, num_classes: int, what: str) -> None:
    """Raise `DataError`, naming `what`, unless the sample is one of `Samples` with classes below `num_classes`."""
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
        raise DataError(f"{what}: the image must be uint8 (3, H, W), not {image.dtype} {tuple(image.shape)}.")
    if mask.dtype != torch.int64 or mask.shape != image.shape[1:]:
        raise DataError(
            f"{what}: the mask must be int64 {tuple(image.shape[1:])} as the image, not {mask.dtype} "
            f"{tuple(mask.shape)}."
        )
    known = set(range(num_classes)) | {VOID, UNLABELLED}
    if strange := sorted(set(torch.unique(mask).tolist()) - known):
        raise DataError(
            f"{what}: the mask holds {', '.join(map(str, strange))}; classes are 0 to {num_classes - 1}, void is "
            f"{VOID} and unlabelled {UNLABELLED}."
        )


class _TrainingSet(TrainingSet):
    """Augmented training samples."""

    def __init__(
        self, labelled: Samples, unlabelled: Samples | None, augmentation: Augmentation | None, seed: int
    ) -> None:
        self._labelled = labelled
        self._unlabelled = unlabelled
        self._augmentation = augmentation
        self._seed = seed

    def read(self, key: SampleKey) -> tuple[Tensor, Tensor]:
        beyond = key.sample - len(self._labelled)
        if beyond < 0 or self._unlabelled is None:
            return self._labelled[key.sample]
        return self._unlabelled[beyond]

    def finish(self, sample: tuple[Tensor, Tensor], key: SampleKey) -> Batch:
        image, mask = sample
        if self._augmentation is not None:
            with drawing(self._seed, key):
                image, mask = self._augmentation(image, mask)
        return {"image": image.float() / 255, "mask": mask, "index": key.sample}


class _EvaluationSet(EvaluationSet):
    """Samples as they are."""

    def __init__(self, samples: Samples, rank: int, processes: int) -> None:
        super().__init__(len(samples), rank, processes)
        self._samples = samples

    def read(self, index: int, *, repeated: bool) -> Batch:
        image, mask = self._samples[index]
        return {"image": image.float() / 255, "mask": torch.full_like(mask, VOID) if repeated else mask, "index": index}
