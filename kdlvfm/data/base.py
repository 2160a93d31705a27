# SPDX-License-Identifier: Apache-2.0
"""What every data set shares: loaders whose batches depend on the seed and the step alone."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from kdlvfm.core.distributed import world_size
from kdlvfm.data.sampler import SampleKey, StepSampler, mix_seed

Batch = dict[str, Any]


class DataError(ValueError):
    """A data set that cannot be used as it is; the message names the cause and the fix."""


class KeyedDataset(Protocol):
    """A training set; the same key always gives the same sample, augmented in the same way."""

    def __getitem__(self, key: SampleKey, /) -> Batch: ...


class Companion(Protocol):
    """What else a training sample comes with, such as stored features of its image."""

    def __call__(self, key: SampleKey, image: Tensor) -> dict[str, Tensor]:
        """Tensors of one shape for all samples, by name.

        Args:
            key: the sample.
            image: float (3, H, W) in [0, 1], augmented.
        """


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
        self, *, batch_size: int, steps: int, seed: int = 0, eval_batch_size: int = 1, num_workers: int = 0
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
        self.views: int | None = None
        self.companion: Companion | None = None
        self.start_step = 0

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """Training samples; every `index` of a training batch is below it."""

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """Number of samples by split, and what else there is to count, for the run record."""

    @abstractmethod
    def training_set(self) -> KeyedDataset:
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
        """Training samples in the batches that their keys make up."""
        samples, collate = self.training_set(), self.collate
        if companion is not None:
            samples, collate = _Accompanied(samples, companion), functools.partial(_collate_both, collate)
        return DataLoader(
            samples,  # type: ignore[arg-type]  # torch does not say that keys may be of any type
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),  # else making an iterator draws from the global one
        )

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


class _Accompanied:
    """Training samples, each with its companion."""

    def __init__(self, samples: KeyedDataset, companion: Companion) -> None:
        self._samples = samples
        self._companion = companion

    def __getitem__(self, key: SampleKey) -> Batch:
        sample = self._samples[key]
        return {**sample, "companion": self._companion(key, sample["image"])}


def _collate_both(collate: Callable[[list[Batch]], Batch], samples: list[Batch]) -> Batch:
    companions = [sample.pop("companion") for sample in samples]
    return {**collate(samples), "companion": default_collate(companions)}


@contextmanager
def drawing(seed: int, key: SampleKey) -> Iterator[None]:
    """Within, torch's global CPU generator draws what belongs to this seed and key; afterwards it goes on as before."""
    # Only the CPU generator: torch.manual_seed would also reset those of the GPUs.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mix_seed("augmentation", seed, *key))
        yield


class EvaluationSet(Dataset[Batch], ABC):
    """A process's share of the samples of a split, in their order: every so-manyth of them, and as many as others have.

    Args:
        count: samples of the split.
        rank: number of the process.
        processes: how many there are.
    """

    def __init__(self, count: int, rank: int, processes: int) -> None:
        self._count = count
        self._rank = rank
        self._processes = processes

    def __len__(self) -> int:
        return -(-self._count // self._processes)

    def __getitem__(self, item: int) -> Batch:
        index = item * self._processes + self._rank
        return self.read(min(index, self._count - 1), repeated=index >= self._count)

    @abstractmethod
    def read(self, index: int, *, repeated: bool) -> Batch:
        """Sample `index` of the split; a repeated one only fills up the last round, and must not count."""
