# SPDX-License-Identifier: Apache-2.0
"""Which samples make batch k: a pure function of (seed, k), so that a run can go on from any step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from kdlvfm.core.distributed import world_size


class SampleKey(NamedTuple):
    """One draw from the training set: which view of a sample, and the index of the sample.

    A view is one outcome of the augmentation, a pure function of (seed, view, sample). Usually every pass over the
    samples has a view of its own, numbered as the pass is; where there are only K views, pass p has view p mod K.
    """

    view: int
    sample: int


def mix_seed(*parts: int | str) -> int:
    """A 63-bit seed from all parts; different parts give unrelated seeds, on every machine the same."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Shuffle:
    """The numbers 0..size-1 without end, in a new order on each pass; position p is a pure function of (seed, p).

    The view of what it yields is the number of the pass.
    """

    def __init__(self, size: int, *seed: int | str) -> None:
        self._size = size
        self._seed = seed
        self._epoch = -1
        self._order: Tensor

    def __getitem__(self, position: int) -> SampleKey:
        epoch, place = divmod(position, self._size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(mix_seed(*self._seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(self._size, generator=generator)
        return SampleKey(epoch, int(self._order[place]))


class StepSampler(Sampler[list[SampleKey]]):
    """Batches of a whole run: `steps` lists of keys, each with a labelled and (optionally) an unlabelled part.

    In a distributed run each process takes an equal, contiguous slice of both parts, so that its batches are made up
    like the global ones; the slices of all processes together are the batch that one process would have drawn.

    Args:
        num_labelled: labelled samples, with indices 0..num_labelled-1.
        num_unlabelled: unlabelled samples, with the indices that follow.
        labelled: labelled samples in each global batch.
        unlabelled: unlabelled samples in each global batch.
        steps: batches in the run. `len()` is this number even when `start` skips some, since Lightning goes on counting
            from the step at which it resumes.
        seed: seed of the order.
        start: first batch to yield; iteration gives `steps - start` batches.
        views: views of each sample, which its passes take in turns; `None` for a new view on every pass.
    """

    def __init__(
        self,
        *,
        num_labelled: int,
        num_unlabelled: int = 0,
        labelled: int,
        unlabelled: int = 0,
        steps: int,
        seed: int,
        start: int = 0,
        views: int | None = None,
    ) -> None:
        self._parts = [(Shuffle(num_labelled, "labelled", seed), labelled, 0)]
        if unlabelled:
            self._parts.append((Shuffle(num_unlabelled, "unlabelled", seed), unlabelled, num_labelled))
        self._steps = steps
        self._start = start
        self._views = views

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[SampleKey]]:
        processes = world_size()
        rank = dist.get_rank() if processes > 1 else 0
        for _, count, _ in self._parts:
            if count % processes:
                raise ValueError(
                    f"{count} samples of a batch cannot be shared equally by {processes} processes: choose batch_size "
                    f"(and data.labelled_per_batch, where there is one) as multiples of {processes}."
                )
        for step in range(self._start, self._steps):
            batch = []
            for shuffle, count, offset in self._parts:
                share = count // processes
                first = step * count + rank * share
                for position in range(first, first + share):
                    key = shuffle[position]
                    view = key.view if self._views is None else key.view % self._views
                    batch.append(SampleKey(view, offset + key.sample))
            yield batch
