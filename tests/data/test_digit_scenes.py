# SPDX-License-Identifier: Apache-2.0
"""DigitScenes: reproducible, exact masks and boxes, no leakage between splits, and the data module's streams."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from kdlvfm.data.digit_scenes import SPLITS, SceneGenerator, _material


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
    with pytest.raises(ValueError, match="train, val and test, not 'trian'"):
        SceneGenerator("trian")
    with pytest.raises(ValueError, match="size >= 32"):
        SceneGenerator("train", size=8)
