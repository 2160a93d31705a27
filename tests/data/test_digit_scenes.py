# SPDX-License-Identifier: Apache-2.0
"""DigitScenes: reproducible, exact masks and boxes, no leakage between splits, and the data module's streams."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from kdlvfm.data.base import DataError
from kdlvfm.data.digit_scenes import SPLITS, DigitScenes, SceneGenerator, _material


@pytest.fixture(scope="module")
def scenes():
    generator = SceneGenerator("train", size=64, seed=3)
    return [generator.scene(index) for index in range(60)]


def test_scene_is_a_pure_function_of_seed_split_and_index(scenes):
    again = SceneGenerator("train", size=64, seed=3)
    for index in (41, 7, 0):  # another order, another object
        scene = again.scene(index)
        assert np.array_equal(scene.image, scenes[index].image)
        assert np.array_equal(scene.mask, scenes[index].mask)
        assert np.array_equal(scene.boxes, scenes[index].boxes)
        assert np.array_equal(scene.labels, scenes[index].labels)


def test_seed_split_and_index_each_change_the_scene(scenes):
    others = [
        scenes[1],
        SceneGenerator("train", seed=4).scene(0),
        SceneGenerator("val", seed=3).scene(0),
    ]
    for other in others:
        assert not np.array_equal(other.image, scenes[0].image)


def test_scenes_hold_three_to_seven_digits_and_all_ten_occur(scenes):
    counts = [len(scene.labels) for scene in scenes]
    assert max(counts) <= 7
    assert min(counts) >= 2  # a crowded scene may end with one digit fewer than wanted
    assert np.mean(counts) > 4
    assert set(np.concatenate([scene.labels for scene in scenes])) == set(range(1, 11))


def test_mask_and_labels_name_the_same_classes(scenes):
    for scene in scenes:
        assert scene.image.dtype == scene.mask.dtype == np.uint8
        assert scene.image.shape == (64, 64, 3)
        assert scene.mask.shape == (64, 64)
        assert set(np.unique(scene.mask)) - {0} == set(scene.labels)


def test_boxes_of_a_class_enclose_exactly_its_pixels(scenes):
    for scene in scenes:
        assert scene.boxes.shape == (len(scene.labels), 4)
        for label in set(scene.labels):
            rows, columns = np.nonzero(scene.mask == label)
            of_class = scene.boxes[scene.labels == label]
            union = [*of_class[:, :2].min(axis=0), *of_class[:, 2:].max(axis=0)]
            assert union == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_every_box_is_touched_on_all_sides_by_its_class(scenes):
    for scene in scenes:
        for (x1, y1, x2, y2), label in zip(scene.boxes.astype(int), scene.labels, strict=True):
            inside = scene.mask[y1:y2, x1:x2] == label
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
            assert inside.sum() >= 12


def test_background_differs_from_digits_in_colour(scenes):
    contrast = [
        np.abs(scene.image[scene.mask > 0].mean(axis=0) - scene.image[scene.mask == 0].mean(axis=0)).sum()
        for scene in scenes
    ]
    assert np.median(contrast) > 40


def test_splits_share_neither_digits_nor_photographs():
    originals = load_digits()
    seen = {split: {glyph.tobytes() for glyph in _material(split)[0]} for split in SPLITS}
    assert [len(_material(split)[0]) for split in SPLITS] == [1197, 200, 400]
    assert len(set.union(*seen.values())) == len({image.tobytes() for image in originals.images})
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not seen[first] & seen[second]
    widths = [_material(split)[2][0].shape[1] for split in SPLITS]
    assert widths == [384, 128, 128]  # they add up to the 640 columns of a photograph


@pytest.mark.parametrize("size", [32, 96])
def test_size_sets_the_side_of_the_scene(size):
    scene = SceneGenerator("test", size=size).scene(5)
    assert scene.image.shape == (size, size, 3)
    assert scene.boxes.max() <= size


def test_bad_arguments_are_named():
    with pytest.raises(DataError, match="train, val and test, not 'trian'"):
        SceneGenerator("trian")
    with pytest.raises(DataError, match="size >= 32"):
        SceneGenerator("train", size=8)


def few(**changes):
    arguments = {
        "batch_size": 6,
        "steps": 4,
        "labelled": 5,
        "unlabelled": 20,
        "val": 3,
        "test": 4,
        "labelled_per_batch": 2,
    }
    return DigitScenes(**{**arguments, **changes})


def test_batches_mix_labelled_and_unlabelled_scenes():
    data = few()
    data.check()
    for batch in data.train_dataloader():
        assert batch["image"].shape == (6, 3, 64, 64)
        assert 0 <= batch["image"].min() < batch["image"].max() <= 1
        labelled = batch["index"] < 5
        assert labelled.sum() == 2
        assert (batch["mask"][~labelled] == -1).all()
        assert (batch["mask"][labelled] >= 0).all()
        assert batch["mask"].max() <= 10


def test_samples_are_the_generators_scenes():
    data = few(scenes_seed=9)
    scene = SceneGenerator("val", seed=9).scene(2)
    image, mask = data.samples("val")[2]
    assert torch.equal(image, torch.from_numpy(scene.image).permute(2, 0, 1))
    assert torch.equal(mask, torch.from_numpy(scene.mask).long())
    with pytest.raises(IndexError):
        data.samples("val")[3]


def test_counts_and_classes():
    data = few()
    assert data.counts() == {"train": 25, "labelled": 5, "unlabelled": 20, "val": 3, "test": 4}
    assert data.num_classes == len(data.palette) == len(set(data.palette)) == 11


def test_no_two_parts_share_a_scene():
    data = few()
    stream = few(stream=True, labelled_per_batch=None)
    parts = [data.samples("train"), data.unlabelled_samples(), stream.samples("train")]
    images = [part[i][0].numpy().tobytes() for part in parts for i in range(len(part))]
    assert len(set(images)) == len(images) == 5 + 20 + 24


def test_stream_is_labelled_and_never_repeats():
    data = few(stream=True, labelled_per_batch=None)
    batches = list(data.train_dataloader())
    assert sorted(torch.cat([batch["index"] for batch in batches]).tolist()) == list(range(24))
    assert min(batch["mask"].min() for batch in batches) == 0
    assert data.unlabelled_samples() is None


def test_split_hash_follows_the_scenes_and_nothing_else():
    reference = few().split_hash()
    assert few(seed=1).split_hash() == reference
    assert few(num_workers=2).split_hash() == reference
    for change in ({"scenes_seed": 1}, {"labelled": 6}, {"unlabelled": 0, "labelled_per_batch": 6}, {"size": 32}):
        assert few(**change).split_hash() != reference


@pytest.mark.parametrize("change", [{"labelled": 0}, {"unlabelled": -1}, {"val": 0}, {"test": 0}, {"labelled": 10**7}])
def test_impossible_counts_are_named(change):
    (name,) = change
    with pytest.raises(DataError, match=f"{name}="):
        few(**change)
