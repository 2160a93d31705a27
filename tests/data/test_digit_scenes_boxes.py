# SPDX-License-Identifier: Apache-2.0
"""DigitScenes with boxes: the scenes of the masks, with digits as classes."""

from __future__ import annotations

import pytest
import torch

from kdlvfm.data.base import DataError
from kdlvfm.data.digit_scenes import DigitScenes
from kdlvfm.data.digit_scenes_boxes import DigitScenesBoxes

LOADER = {"batch_size": 4, "steps": 3}


def boxes(**changes):
    return DigitScenesBoxes(**{"size": 64, "train": 8, "val": 5, "test": 3, **LOADER, **changes})


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_boxes_surround_what_the_masks_show_of_the_same_scenes(split):
    data, masks = boxes(), DigitScenes(size=64, labelled=8, unlabelled=0, val=5, test=3, **LOADER)
    data.check()
    for i in range(3):
        image, found = data.samples(split)[i]
        other, mask = masks.samples(split)[i]
        assert torch.equal(image, other)
        inside = torch.zeros_like(mask, dtype=torch.bool)
        for (x1, y1, x2, y2), label in zip(found.corners.int().tolist(), found.labels.tolist(), strict=True):
            assert (mask[y1:y2, x1:x2] == label + 1).any()
            inside[y1:y2, x1:x2] = True
        assert (mask[~inside] == 0).all()


def test_facts():
    data = boxes()
    assert data.class_names == tuple("0123456789")
    assert len(data.palette) == 10
    assert data.counts() == {"train": 8, "val": 5, "test": 3}
    assert data.input_size() == (64, 64)
    assert data.split_hash() == boxes(seed=4).split_hash() != boxes(scenes_seed=1).split_hash()


@pytest.mark.parametrize(("arguments", "message"), [({"val": 0}, "val=0 scenes"), ({"size": 16}, "too small")])
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        boxes(**arguments)


def test_a_stream_shows_each_scene_once_and_none_that_students_see():
    data = boxes(stream=True, train=8)
    assert data.num_samples == LOADER["batch_size"] * LOADER["steps"]
    keys = [key.sample for batch in data.sampler() for key in batch]
    assert sorted(keys) == [*range(data.num_samples)]
    streamed = [data.samples("train")[i][0] for i in range(4)]
    assert not any(
        torch.equal(one, other) for one in streamed for other, _ in map(boxes().samples("train").__getitem__, range(8))
    )
    assert torch.equal(data.samples("test")[0][0], boxes().samples("test")[0][0])
    assert data.split_hash() != boxes(train=12).split_hash()


def test_unlabelled_scenes_have_no_boxes_and_are_none_of_the_labelled_ones():
    data = boxes(unlabelled=6, labelled_per_batch=1)
    data.check()
    assert data.counts() == {"train": 14, "labelled": 8, "unlabelled": 6, "val": 5, "test": 3}
    scenes = [data.unlabelled_samples()[i] for i in range(6)]
    assert not any(len(found) for _, found in scenes)
    masks = DigitScenes(size=64, labelled=8, unlabelled=6, **LOADER).unlabelled_samples()
    assert all(torch.equal(image, masks[i][0]) for i, (image, _) in enumerate(scenes))
    assert data.split_hash() != boxes().split_hash()
    assert boxes(unlabelled=6, stream=True).unlabelled_samples() is None
