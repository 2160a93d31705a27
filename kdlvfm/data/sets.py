# SPDX-License-Identifier: Apache-2.0
"""What loaders read: training samples by key, and a process's share of an evaluation split."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from kdlvfm.data.sampler import SampleKey, mix_seed

Batch = dict[str, Any]


class TrainingSet(ABC):
    """A training set; the same key always gives the same sample, augmented in the same way."""

    def __getitem__(self, key: SampleKey) -> Batch:
        return self.finish(self.read(key), key)

    @abstractmethod
    def read(self, key: SampleKey) -> Any:
        """The sample as it is stored, on the CPU: tensors, or a tuple of them."""

    @abstractmethod
    def finish(self, sample: Any, key: SampleKey) -> Batch:
        """What `read` gave, augmented on the device where it lies."""


class Stored:
    """Training samples before they are augmented, each behind its key."""

    def __init__(self, samples: TrainingSet) -> None:
        self._samples = samples

    def __getitem__(self, key: SampleKey) -> tuple[SampleKey, Any]:
        return key, self._samples.read(key)


class Companion(Protocol):
    """What else a training sample comes with, such as stored features of its image."""

    def __call__(self, key: SampleKey, image: Tensor) -> dict[str, Tensor]:
        """Tensors of one shape for all samples, by name.

        Args:
            key: the sample.
            image: float (3, H, W) in [0, 1], augmented.
        """


class Accompanied:
    """Training samples, each with its companion."""

    def __init__(self, samples: TrainingSet, companion: Companion) -> None:
        self._samples = samples
        self._companion = companion

    def __getitem__(self, key: SampleKey) -> Batch:
        sample = self._samples[key]
        return {**sample, "companion": self._companion(key, sample["image"])}


def collate_both(collate: Callable[[list[Batch]], Batch], samples: list[Batch]) -> Batch:
    """A batch with the companions of its samples under `"companion"`."""
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
