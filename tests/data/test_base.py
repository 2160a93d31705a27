# SPDX-License-Identifier: Apache-2.0
"""What training samples come with, and how often their augmentation is drawn anew."""

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from PIL import Image

from kdlvfm.data.base import DataError
from kdlvfm.data.box_transforms import BoxAugmentation
from kdlvfm.data.digit_scenes import DigitScenes
from kdlvfm.data.digit_scenes_boxes import DigitScenesBoxes
from kdlvfm.data.sampler import SampleKey
from kdlvfm.data.transforms import Augmentation
from kdlvfm.data.unlabelled import UnlabelledImages

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


def squares(tmp_path, **changes):
    for i in range(6):
        pixels = torch.randint(256, (40, 52 + i, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i}.png")
    augmentation = Augmentation(scale=(0.5, 2), **COLOUR)
    return UnlabelledImages(tmp_path, size=32, augmentation=augmentation, **LOADING, **changes)


def mixed(tmp_path, **changes):
    del tmp_path
    augmentation = Augmentation(scale=(0.5, 2), crop=(24, 28), **COLOUR)
    return DigitScenes(size=32, labelled=4, unlabelled=3, augmentation=augmentation, **LOADING, **changes)


COLOUR = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5}


@pytest.mark.parametrize("make", [squares, mixed])
@pytest.mark.parametrize("workers", [0, 1])
def test_augmented_behind_the_loader_batches_are_the_same(make, workers, tmp_path):
    plain = make(tmp_path)
    data = make(tmp_path, augment_on_device=True, num_workers=workers)
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]
    for found, expected in zip(batches, plain.train_dataloader(), strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value)


@pytest.mark.parametrize("make", [squares, mixed])
def test_augmentation_stays_on_the_device_where_the_batch_lies(make, tmp_path):
    """The meta device stands in for a GPU: what mixes it with the CPU fails."""
    data = make(tmp_path, augment_on_device=True)
    batch = move_data_to_device(next(iter(data.train_dataloader())), torch.device("meta"))
    made = data.on_after_batch_transfer(batch, 0)
    expected = next(iter(make(tmp_path).train_dataloader()))
    assert {name: value.device.type for name, value in made.items()} == dict.fromkeys(expected, "meta")
    assert made["image"].shape == expected["image"].shape


def test_evaluation_batches_are_left_alone(tmp_path):
    data = mixed(tmp_path, augment_on_device=True)
    batch = next(iter(data.val_dataloader()))
    assert data.on_after_batch_transfer(batch, 0) is batch


def test_what_cannot_be_augmented_on_the_device(tmp_path):
    with pytest.raises(DataError, match="leave it out for boxes"):
        boxes(augment_on_device=True)
    data = mixed(tmp_path, augment_on_device=True)
    data.companion = companion
    with pytest.raises(DataError, match="not for a teacher cache"):
        data.train_dataloader()
