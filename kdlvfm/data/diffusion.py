# SPDX-License-Identifier: Apache-2.0
"""What every data set for diffusion shares: batches of square images of one size, with no labels."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdlvfm.data.base import DataError, SampleData
from kdlvfm.data.sampler import SampleKey
from kdlvfm.data.sets import Batch, EvaluationSet, TrainingSet


class DiffusionData(SampleData):
    """Loaders of a data set of images that all fit into memory. A subclass gives the images.

    A batch is `{"image": float (B, 3, size, size) in [0, 1], "index": int64 (B,)}`, of validation and test also
    `"repeated"`, bool (B,), true for an image that another process counts. Classes are for the judge of generated
    images; no label is in a batch.

    Args:
        size: side of the images in pixels.
        augmentation: there is none for such data; anything but `None` is refused.
        **loading: see `SampleData`.

    Raises:
        DataError: an augmentation.
    """

    truth = "images"

    def __init__(self, *, size: int, augmentation: object | None = None, **loading: Any) -> None:
        super().__init__(**loading)
        if augmentation is not None:
            raise DataError("images for diffusion are not augmented: choose a recipe such as recipe=diffusion_digits.")
        self.size = size

    @abstractmethod
    def images(self, split: str) -> Tensor:
        """Images of a split, uint8 (n, 3, size, size)."""

    @property
    def num_samples(self) -> int:
        """Training images."""
        return len(self.images("train"))

    def counts(self) -> dict[str, int]:
        """Number of images by split."""
        return {split: len(self.images(split)) if split in self.splits else 0 for split in ("train", "val", "test")}

    def check(self) -> None:
        """Validate the images of every split.

        Raises:
            DataError: a split without images, or images that are none.
        """
        for split in self.splits:
            images = self.images(split)
            if images.dtype != torch.uint8 or images.shape[1:] != (3, self.size, self.size) or not len(images):
                raise DataError(
                    f"{self.name} needs images uint8 (n, 3, {self.size}, {self.size}) in {split!r}, not {images.dtype} "
                    f"{tuple(images.shape)}."
                )

    def training_set(self) -> TrainingSet:
        """Training images as they are."""
        return _TrainingSet(self.images("train"))

    def evaluation_set(self, split: str, rank: int = 0, processes: int = 1) -> Dataset[Batch]:
        """One process's share of a split; what is missing from the last round is an image marked as repeated."""
        return _EvaluationSet(self.images(split), rank, processes)

    def split_hash(self) -> str:
        """SHA-256 of all images of all splits, pixel by pixel."""
        digest = hashlib.sha256()
        for split in self.splits:
            digest.update(f"{split}{tuple(self.images(split).shape)}".encode() + self.images(split).numpy().tobytes())
        return digest.hexdigest()


class _TrainingSet(TrainingSet):
    def __init__(self, images: Tensor) -> None:
        self._images = images

    def read(self, key: SampleKey) -> Tensor:
        return self._images[key.sample]

    def finish(self, sample: Tensor, key: SampleKey) -> Batch:
        return {"image": sample.float() / 255, "index": key.sample}


class _EvaluationSet(EvaluationSet):
    def __init__(self, images: Tensor, rank: int, processes: int) -> None:
        super().__init__(len(images), rank, processes)
        self._images = images

    def read(self, index: int, *, repeated: bool) -> Batch:
        return {"image": self._images[index].float() / 255, "index": index, "repeated": repeated}
