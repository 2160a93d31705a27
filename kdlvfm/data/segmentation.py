# SPDX-License-Identifier: Apache-2.0
"""What every segmentation data set shares: loaders whose batches depend on the seed and the step alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdlvfm.core.distributed import world_size
from kdlvfm.data.sampler import SampleKey, StepSampler, mix_seed
from kdlvfm.data.transforms import Augmentation

VOID = 255
"""Mask value of pixels that belong to no class; every loss and metric leaves them out."""

UNLABELLED = -1
"""Mask value of pixels whose class is not known; distillation applies to them, the task's loss does not."""


class DataError(ValueError):
    """A data set that cannot be used as it is; the message names the cause and the fix."""


class Samples(Protocol):
    """A map-style data set; item i is (image uint8 (3, H, W), mask int64 (H, W))."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]: ...


class SegmentationData(LightningDataModule, ABC):
    """Loaders of a segmentation data set. A subclass names the classes and gives the samples.

    A batch is `{"image": float (B, 3, H, W) in [0, 1], "mask": int64 (B, H, W), "index": int64 (B,)}`. Masks hold
    classes 0..K-1, 255 for void and -1 for unlabelled. Indices of unlabelled samples follow those of the labelled ones.

    Training is one epoch of `steps` batches. Which samples a batch holds, and how they are augmented, depends on the
    seed and on the batch's number alone: not on workers, nor on where a run was interrupted.

    Args:
        batch_size: samples in a training batch, over all processes.
        steps: training batches of the run.
        seed: seed of the order and of the augmentation.
        augmentation: applied to training samples; `None` leaves them alone.
        labelled_per_batch: labelled samples in each training batch; the others are unlabelled. `None` is half of the
            batch where there are unlabelled samples, else all of it.
        eval_batch_size: samples in a batch of validation and test; more than 1 needs images of one size.
        num_workers: processes that prepare samples; 0 prepares them in the main process.

    Attributes:
        name: the data set, as tables show it.
        class_names: the classes, in the order of their numbers.
        palette: a colour (red, green, blue), each 0..255, for each class.
        licence: licence or terms of use of the data; `None` if unknown.
        splits: the splits that exist, out of train, val and test.
        start_step: first training batch that `train_dataloader` yields; the trainer sets it before it resumes a run.
            The loader's length stays `steps` all the same, because Lightning counts on from the batch it resumes at.

    Raises:
        DataError: sizes that are not positive or do not fit each other.
    """

    name: str
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    licence: str | None
    splits: tuple[str, ...] = ("train", "val", "test")

    def __init__(
        self,
        *,
        batch_size: int,
        steps: int,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        labelled_per_batch: int | None = None,
        eval_batch_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("steps", steps), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise DataError(f"{name} must be at least 1, not {value}.")
        if labelled_per_batch is not None and not 1 <= labelled_per_batch <= batch_size:
            raise DataError(
                f"labelled_per_batch must be from 1 to batch_size = {batch_size}, not {labelled_per_batch}."
            )
        self.batch_size = batch_size
        self.steps = steps
        self.seed = seed
        self.augmentation = augmentation
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.start_step = 0
        self._labelled_per_batch = labelled_per_batch

    @abstractmethod
    def samples(self, split: str) -> Samples:
        """Labelled samples of `"train"`, `"val"` or `"test"`."""

    def unlabelled_samples(self) -> Samples | None:
        """Training samples whose masks are -1 everywhere; `None` if there are none."""
        return None

    @abstractmethod
    def split_hash(self) -> str:
        """SHA-256, in hexadecimal, of all that decides which samples each split holds and what they look like."""

    def check(self) -> None:
        """Fail now rather than in the middle of a run: read and validate samples of every part.

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

    @property
    def num_classes(self) -> int:
        """Number of classes, void not counted."""
        return len(self.class_names)

    @property
    def num_labelled(self) -> int:
        """Training samples with a mask."""
        return len(self.samples("train"))

    @property
    def num_unlabelled(self) -> int:
        """Training samples without a mask."""
        unlabelled = self.unlabelled_samples()
        return 0 if unlabelled is None else len(unlabelled)

    @property
    def num_samples(self) -> int:
        """Training samples, with and without mask; every `index` of a training batch is below it."""
        return self.num_labelled + self.num_unlabelled

    def batch_parts(self) -> tuple[int, int]:
        """Labelled and unlabelled samples in each training batch.

        Raises:
            DataError: some of the batch should be unlabelled, and there are no unlabelled samples.
        """
        labelled = self._labelled_per_batch
        if labelled is None:
            labelled = (self.batch_size + 1) // 2 if self.num_unlabelled else self.batch_size
        if labelled < self.batch_size and not self.num_unlabelled:
            raise DataError(
                f"{self.name} has no unlabelled samples to fill a batch of {self.batch_size} that has "
                f"labelled_per_batch={labelled}: leave labelled_per_batch out."
            )
        return labelled, self.batch_size - labelled

    @property
    def batches_per_epoch(self) -> int:
        """Training batches after which every sample that the run draws from has been drawn at least once."""
        sizes = (self.num_labelled, self.num_unlabelled)
        passes = [-(-size // share) for size, share in zip(sizes, self.batch_parts(), strict=True) if share]
        return max(passes)

    def counts(self) -> dict[str, int]:
        """Number of samples by split, for the run record; `train` is `labelled` and `unlabelled` together."""
        evaluation = {split: len(self.samples(split)) if split in self.splits else 0 for split in ("val", "test")}
        return {
            "train": self.num_samples,
            "labelled": self.num_labelled,
            "unlabelled": self.num_unlabelled,
            **evaluation,
        }

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Training batches `start_step` to `steps` - 1, with length `steps`."""
        labelled, unlabelled = self.batch_parts()
        sampler = StepSampler(
            num_labelled=self.num_labelled,
            num_unlabelled=self.num_unlabelled,
            labelled=labelled,
            unlabelled=unlabelled,
            steps=self.steps,
            seed=self.seed,
            start=self.start_step,
        )
        dataset = _TrainingSet(self.samples("train"), self.unlabelled_samples(), self.augmentation, self.seed)
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),  # else making an iterator draws from the global one
        )

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Validation samples in order, not augmented."""
        return self.evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Test samples in order, not augmented."""
        return self.evaluation_loader("test")

    def evaluation_loader(self, split: str) -> DataLoader[dict[str, Any]]:
        """Samples of any split in order, not augmented; in a distributed run, this process's share of them."""
        rank = torch.distributed.get_rank() if world_size() > 1 else 0
        return DataLoader(
            _EvaluationSet(self.samples(split), rank, world_size()),
            batch_size=self.eval_batch_size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),
        )


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


class _TrainingSet(Dataset[dict[str, Any]]):
    """Augmented training samples; the same key always gives the same sample."""

    def __init__(
        self, labelled: Samples, unlabelled: Samples | None, augmentation: Augmentation | None, seed: int
    ) -> None:
        self._labelled = labelled
        self._unlabelled = unlabelled
        self._augmentation = augmentation
        self._seed = seed

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        beyond = key.sample - len(self._labelled)
        if beyond < 0 or self._unlabelled is None:
            image, mask = self._labelled[key.sample]
        else:
            image, mask = self._unlabelled[beyond]
        if self._augmentation is not None:
            # Only the CPU generator: torch.manual_seed would also reset those of the GPUs.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(mix_seed("augmentation", self._seed, *key))
                image, mask = self._augmentation(image, mask)
        return {"image": image.float() / 255, "mask": mask, "index": key.sample}


class _EvaluationSet(Dataset[dict[str, Any]]):
    """One process's share of the samples: equally long for all, since they meet in collective calls.

    What is missing from the last round is filled up with a sample whose mask is void, so that none counts twice.
    """

    def __init__(self, samples: Samples, rank: int, processes: int) -> None:
        self._samples = samples
        self._rank = rank
        self._processes = processes

    def __len__(self) -> int:
        return -(-len(self._samples) // self._processes)

    def __getitem__(self, item: int) -> dict[str, Any]:
        index = item * self._processes + self._rank
        last = len(self._samples) - 1
        image, mask = self._samples[min(index, last)]
        if index > last:
            index, mask = last, torch.full_like(mask, VOID)
        return {"image": image.float() / 255, "mask": mask, "index": index}
