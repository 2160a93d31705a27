# SPDX-License-Identifier: Apache-2.0
"""Data sets with ground truth whose training batches may hold unlabelled images too."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sized
from typing import Any

from kdlvfm.data.base import DataError, SampleData
from kdlvfm.data.sampler import StepSampler


class MixedData(SampleData):
    """Loaders of a data set with labelled and, perhaps, unlabelled training samples.

    Each training batch has a labelled and an unlabelled part. Indices of unlabelled samples follow those of the
    labelled ones. Validation and test are labelled.

    Args:
        labelled_per_batch: labelled samples in each training batch; the others are unlabelled. `None` is half of the
            batch where there are unlabelled samples, else all of it.
        **loading: see `SampleData`.

    Raises:
        DataError: sizes that are not positive or do not fit each other.
    """

    def __init__(self, *, labelled_per_batch: int | None = None, **loading: Any) -> None:
        super().__init__(**loading)
        if labelled_per_batch is not None and not 1 <= labelled_per_batch <= self.batch_size:
            raise DataError(
                f"labelled_per_batch must be from 1 to batch_size = {self.batch_size}, not {labelled_per_batch}."
            )
        self._labelled_per_batch = labelled_per_batch

    @abstractmethod
    def samples(self, split: str) -> Sized:
        """Labelled samples of `"train"`, `"val"` or `"test"`."""

    @abstractmethod
    def unlabelled_samples(self) -> Sized | None:
        """Training samples without labels; `None` if there are none."""

    @property
    def num_labelled(self) -> int:
        """Training samples with labels."""
        return len(self.samples("train"))

    @property
    def num_unlabelled(self) -> int:
        """Training samples without."""
        unlabelled = self.unlabelled_samples()
        return 0 if unlabelled is None else len(unlabelled)

    @property
    def num_samples(self) -> int:
        """Training samples, labelled or not; every `index` of a training batch is below it."""
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

    def sampler(self) -> StepSampler:
        """Which samples make which training batch."""
        labelled, unlabelled = self.batch_parts()
        return StepSampler(
            num_labelled=self.num_labelled,
            num_unlabelled=self.num_unlabelled,
            labelled=labelled,
            unlabelled=unlabelled,
            steps=self.steps,
            seed=self.seed,
            start=self.start_step,
            views=self.distinct_views,
        )
