# SPDX-License-Identifier: Apache-2.0
"""What training samples come with, and how often their augmentation is drawn anew."""

import pytest
import torch

from kdlvfm.data.box_transforms import BoxAugmentation
from kdlvfm.data.digit_scenes import DigitScenes
from kdlvfm.data.digit_scenes_boxes import DigitScenesBoxes
from kdlvfm.data.sampler import SampleKey
from kdlvfm.data.transforms import Augmentation

LOADING = {"batch_size": 2, "steps": 6}


def masks(**changes):
    return DigitScenes(size=32, labelled=4, unlabelled=0, augmentation=Augmentation(scale=(1, 1)), **LOADING, **changes)


def boxes(**changes):
    return DigitScenesBoxes(size=32, train=4, augmentation=BoxAugmentation(), **LOADING, **changes)


def companion(key, image):
    """The key, and a corner of the image, so that both can be compared with the batch."""
    return {"key": torch.tensor(key), "corner": image[:, :2, :2].clone()}


@pytest.mark.parametrize("make", [masks, boxes])
def test_every_sample_brings_its_companion(make):
    data = make()
    plain = list(data.train_dataloader())
    data.companion = companion
    for batch, before, keys in zip(data.train_dataloader(), plain, data.sampler(), strict=True):
        found = batch.pop("companion")
        assert found["key"].tolist() == [list(key) for key in keys]
        assert torch.equal(found["corner"], batch["image"][:, :, :2, :2])
        assert batch.keys() == before.keys()
        assert torch.equal(batch["image"], before["image"])
        assert torch.equal(batch["index"], found["key"][:, 1])


@pytest.mark.parametrize("make", [masks, boxes])
def test_samples_can_be_loaded_by_key(make):
    data = make()
    keys = [SampleKey(2, 3), SampleKey(0, 1)]
    (batch,) = data.loader([keys])
    assert batch["index"].tolist() == [3, 1]
    assert torch.equal(batch["image"][0], data.training_set()[keys[0]]["image"])


@pytest.mark.parametrize("make", [masks, boxes])
def test_views_repeat_the_augmentation_and_nothing_else(make):
    endless, two = make(seed=3), make(seed=3)
    two.views = 2
    samples = []
    for first, second in zip(endless.sampler(), two.sampler(), strict=True):
        assert [key.sample for key in first] == [key.sample for key in second]
        assert [key.view % 2 for key in first] == [key.view for key in second]
        samples += second
    assert {key.view for key in samples} == {0, 1}
    training = two.training_set()
    assert torch.equal(training[samples[0]]["image"], training[samples[0]]["image"])


def test_without_augmentation_there_is_one_view():
    data = masks()
    assert data.distinct_views is None
    data.views = 5
    assert data.distinct_views == 5
    data.augmentation = None
    assert data.distinct_views == 1
