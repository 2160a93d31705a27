# SPDX-License-Identifier: Apache-2.0
"""The order of samples: pure, complete, resumable, and shared out equally."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from kdlvfm.data import sampler as module
from kdlvfm.data.sampler import SampleKey, Shuffle, StepSampler, mix_seed

RUN = {"num_labelled": 7, "num_unlabelled": 5, "labelled": 4, "unlabelled": 2, "steps": 30, "seed": 3}


def test_every_pass_holds_every_sample_once_in_another_order():
    shuffle = Shuffle(11, "labelled", 0)
    passes = [[shuffle[11 * epoch + place] for place in range(11)] for epoch in range(4)]
    for epoch, keys in enumerate(passes):
        assert {key.view for key in keys} == {epoch}
        assert sorted(key.sample for key in keys) == list(range(11))
    assert len({tuple(key.sample for key in keys) for keys in passes}) == 4


def test_a_position_does_not_depend_on_what_was_asked_before():
    forward = Shuffle(5, "x", 1)
    expected = [forward[position] for position in range(20)]
    backward = Shuffle(5, "x", 1)
    assert [backward[position] for position in reversed(range(20))] == expected[::-1]


def test_batches_have_both_parts_and_no_draw_comes_twice():
    batches = list(StepSampler(**RUN))
    assert len(batches) == len(StepSampler(**RUN)) == 30
    for batch in batches:
        assert [key.sample < 7 for key in batch] == [True] * 4 + [False] * 2
        assert max(key.sample for key in batch) < 12
    draws = [key for batch in batches for key in batch]
    assert len(set(draws)) == len(draws)
    # 120 labelled draws of 7 samples: 17 whole passes and one sample
    assert sorted(key for key in draws if key.sample < 7)[:119] == [
        SampleKey(e, i) for e in range(17) for i in range(7)
    ]


@pytest.mark.parametrize("start", [1, 13, 29, 30])
def test_a_later_start_gives_the_same_batches_and_the_same_length(start):
    resumed = StepSampler(**RUN, start=start)
    assert list(resumed) == list(StepSampler(**RUN))[start:]
    assert len(resumed) == 30


def test_views_take_turns():
    endless, three = list(StepSampler(**RUN)), list(StepSampler(**RUN, views=3))
    assert [[SampleKey(key.view % 3, key.sample) for key in batch] for batch in endless] == three
    assert {key.view for batch in three for key in batch} == {0, 1, 2}


def test_seed_decides():
    assert list(StepSampler(**RUN)) == list(StepSampler(**RUN))
    assert list(StepSampler(**RUN)) != list(StepSampler(**{**RUN, "seed": 4}))


def as_process(monkeypatch, rank, processes):
    monkeypatch.setattr(module, "world_size", lambda: processes)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)


def test_processes_share_each_batch_and_see_the_same_mixture(monkeypatch):
    whole = list(StepSampler(**RUN))
    shares = []
    for rank in range(2):
        as_process(monkeypatch, rank, 2)
        shares.append(list(StepSampler(**RUN)))
    for batch, first, second in zip(whole, *shares, strict=True):
        assert first[:2] + second[:2] + first[2:] + second[2:] == batch
        assert [key.sample < 7 for key in first] == [key.sample < 7 for key in second] == [True, True, False]


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    as_process(monkeypatch, 0, 4)
    with pytest.raises(ValueError, match="2 samples of a batch cannot be shared equally by 4 processes"):
        next(iter(StepSampler(**RUN)))


def test_seeds_of_different_parts_differ():
    seeds = {mix_seed("a", seed, epoch, i) for seed in range(5) for epoch in range(5) for i in range(50)}
    assert len(seeds) == 5 * 5 * 50
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mix_seed(1, 23) != mix_seed(12, 3)
