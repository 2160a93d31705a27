# SPDX-License-Identifier: Apache-2.0
"""What every data set shares: loaders whose batches depend on the seed and the step alone."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from lightning import LightningDataModule
from lightning.fabric.utilities import move_data_to_device
from torch.utils.data import DataLoader, Dataset, default_collate

from kdlvfm.core.distributed import world_size
from kdlvfm.data.sampler import SampleKey, StepSampler
from kdlvfm.data.sets import Accompanied, Batch, Companion, Stored, TrainingSet, collate_both


class DataError(ValueError):
    """A data set that cannot be used as it is; the message names the cause and the fix."""


class SampleData(LightningDataModule, ABC):
    """Loaders of a data set. A subclass names the classes and says what a sample is.

    Training is one epoch of `steps` batches. Which samples a batch holds, and how they are augmented, depends on the
    seed and on the batch's number alone: not on workers, nor on where a run was interrupted. With `views` augmentation
    repeats: pass p over the samples shows them as pass p mod `views` did.

    Args:
        batch_size: samples in a training batch, over all processes.
        steps: training batches of the run.
        seed: seed of the order and of the augmentation.
        eval_batch_size: samples in a batch of validation and test.
        num_workers: processes that prepare samples; 0 prepares them in the main process.
        augment_on_device: batches come as they are stored, and are augmented on the device that trains. What is drawn
            at random is the same; a resized pixel may differ by one level of 255 from the CPU's.

    Attributes:
        name: the data set, as tables show it.
        truth: what ground truth it has, `"masks"` or `"boxes"`; a task must learn from the same.
        class_names: the classes, in the order of their numbers.
        palette: a colour (red, green, blue), each 0..255, for each class.
        licence: licence or terms of use of the data; `None` if unknown.
        splits: the splits that exist, out of train, val and test.
        augmentation: what changes training samples at random; `None` leaves them alone.
        views: in how many ways each training sample is augmented; `None` for a new way on every pass.
        companion: what training batches hold besides, under `"companion"`; `None` for nothing.
        start_step: first training batch that `train_dataloader` yields; the trainer sets it before it resumes a run.
            The loader's length stays `steps` all the same, because Lightning counts on from the batch it resumes at.

    Raises:
        DataError: sizes that are not positive.
    """

    name: str
    truth: ClassVar[str]
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    licence: str | None
    splits: tuple[str, ...] = ("train", "val", "test")
    augmentation: Callable[..., Any] | None = None
    collate: Callable[[list[Batch]], Batch] = staticmethod(default_collate)

    def __init__(
        self,
        *,
        batch_size: int,
        steps: int,
        seed: int = 0,
        eval_batch_size: int = 1,
        num_workers: int = 0,
        augment_on_device: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("steps", steps), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise DataError(f"{name} must be at least 1, not {value}.")
        self.batch_size = batch_size
        self.steps = steps
        self.seed = seed
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.augment_on_device = augment_on_device
        self.views: int | None = None
        self.companion: Companion | None = None
        self.start_step = 0
        self._stored: TrainingSet | None = None

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """Training samples; every `index` of a training batch is below it."""

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """Number of samples by split, and what else there is to count, for the run record."""

    @abstractmethod
    def training_set(self) -> TrainingSet:
        """Augmented training samples."""

    @abstractmethod
    def evaluation_set(self, split: str, rank: int = 0, processes: int = 1) -> Dataset[Batch]:
        """One process's share of a split: equally long for all, since they meet in collective calls."""

    @abstractmethod
    def split_hash(self) -> str:
        """SHA-256, in hexadecimal, of all that decides which samples each split holds and what they look like."""

    @abstractmethod
    def check(self) -> None:
        """Fail now rather than in the middle of a run: read and validate samples of every part.

        Raises:
            DataError: a sample that cannot be used, or batches that cannot be filled.
        """

    def labels(self) -> dict[str, Any] | None:
        """Which teacher made labels of this data, for the run record, see `kdlvfm.data.labels`; `None` for none."""
        return None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def batches_per_epoch(self) -> int:
        """Training batches after which every sample that the run draws from has been drawn at least once."""
        return -(-self.num_samples // self.batch_size)

    def input_size(self) -> tuple[int, int]:
        """Height and width in pixels of the first sample of the last split, as a network sees it."""
        image = self.collate([self.evaluation_set(self.splits[-1])[0]])["image"]
        return int(image.shape[-2]), int(image.shape[-1])

    def batch_shape(self) -> tuple[int, int, int]:
        """Samples in a training batch, and height and width in pixels of the first, as a network sees it."""
        image = self.collate([self.training_set()[SampleKey(0, 0)]])["image"]
        return self.batch_size, int(image.shape[-2]), int(image.shape[-1])

    @property
    def distinct_views(self) -> int | None:
        """`views`, or 1 if there is no augmentation, so that all views are alike."""
        return 1 if self.augmentation is None else self.views

    def sampler(self) -> StepSampler:
        """Which samples make which training batch."""
        return StepSampler(
            num_labelled=self.num_samples,
            labelled=self.batch_size,
            steps=self.steps,
            seed=self.seed,
            start=self.start_step,
            views=self.distinct_views,
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Training batches `start_step` to `steps` - 1, with length `steps`."""
        return self.loader(self.sampler(), self.companion)

    def loader(self, batches: Iterable[list[SampleKey]], companion: Companion | None = None) -> DataLoader[Batch]:
        """Training samples in the batches that their keys make up.

        With `augment_on_device` a batch is a list that `on_after_batch_transfer` makes a batch of.

        Raises:
            DataError: companions, which know a sample by its augmented image, and `augment_on_device`.
        """
        training_set = self.training_set()
        samples: TrainingSet | Accompanied | Stored = training_set
        collate: Callable[[list[Any]], Any] = self.collate
        if companion is not None and self.augment_on_device:
            raise DataError("data.augment_on_device is not for a teacher cache, which knows images as augmented.")
        if companion is not None:
            samples, collate = Accompanied(training_set, companion), functools.partial(collate_both, collate)
        elif self.augment_on_device:
            self._stored = training_set
            samples, collate = Stored(training_set), list
        return DataLoader(
            samples,  # type: ignore[arg-type]  # torch does not say that keys may be of any type
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),  # else making an iterator draws from the global one
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The batch; one of samples as they are stored is augmented now."""
        del dataloader_idx
        if self._stored is None or not isinstance(batch, list):
            return batch
        made = self.collate([self._stored.finish(sample, SampleKey(*key)) for key, sample in batch])
        return move_data_to_device(made, made["image"].device)  # what is made of plain numbers lies on the CPU

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation samples in order, not augmented."""
        return self.evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test samples in order, not augmented."""
        return self.evaluation_loader("test")

    def evaluation_loader(self, split: str) -> DataLoader[Batch]:
        """Samples of any split in order, not augmented; in a distributed run, this process's share of them."""
        rank = torch.distributed.get_rank() if world_size() > 1 else 0
        return DataLoader(
            self.evaluation_set(split, rank, world_size()),
            batch_size=self.eval_batch_size,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),
        )
