# SPDX-License-Identifier: Apache-2.0
"""Boxes in COCO's format."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kdlvfm.data.base import DataError
from kdlvfm.data.coco import Coco


def test_categories_become_classes_by_id_and_can_be_chosen(coco):
    data = coco(classes=["cow", "cat"])
    data.check()
    assert data.class_names == ("cow", "cat")
    assert [boxes.labels.tolist() for _, boxes in (data.samples("train")[i] for i in range(3))] == [[1, 0], [], []]
    with pytest.raises(DataError, match="has no category horse; it has"):
        coco(classes=["horse"]).check()


def test_area_and_crowd_of_coco_are_kept(coco, edit):
    edit("train", lambda content: content["annotations"][0].update(area=123.5, iscrowd=1))
    data = coco()
    boxes = data.samples("train")[0][1]
    assert boxes.area.tolist() == [123.5, 30 * 24]
    assert boxes.iscrowd.tolist() == [True, False]


def test_images_of_each_split_may_lie_elsewhere(coco, tmp_path):
    (tmp_path / "farm" / "images").rename(tmp_path / "farm" / "all")
    data = coco(images={"train": "all", "val": "all"}, test=None)
    data.check()
    assert data.splits == ("train", "val")
    with pytest.raises(DataError, match=r"data.images names no folder for val, test"):
        coco(images={"train": "all"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda content: content["annotations"][0].update(category_id=5),
            r"train.json has 1 boxes of category ids outside its list \[1, 11, 21\]: a.png \(5\)",
        ),
        (
            lambda content: content["images"].append({**content["images"][0], "id": 99, "file_name": "zz.png"}),
            r"train.json names 1 files that are missing: .*zz.png \(expected are .*images in images below",
        ),
        (lambda content: content["images"][1].update(id=7), "gives 1 image ids more than once: 7"),
        (lambda content: content["images"][1].update(file_name="a.png"), "1 images more than once in 'train': a.png"),
        (
            lambda content: content["annotations"][0].update(image_id=55),
            "boxes for 1 image ids that it does not list: 55",
        ),
        (lambda content: content.update(images=[], annotations=[]), "farm has no image in 'train'"),
        (lambda content: content.update(annotations=[]), "farm has no box in 'train': there is nothing to learn"),
        (lambda content: content.pop("categories"), r"not in COCO's format \(KeyError: 'categories'\)"),
        (lambda content: content["annotations"][0].pop("bbox"), r"not in COCO's format \(KeyError: 'bbox'\)"),
        (lambda content: content["annotations"][0].update(bbox=[1, 2, 3]), "not in COCO's format"),
        (lambda content: content.update(categories=[]), "categories must be at least one"),
        (
            lambda content: content["categories"][1].update(id=content["categories"][0]["id"]),
            "of different ids and names",
        ),
        (lambda content: content["categories"][1].update(name="cat"), "of different ids and names"),
        (
            lambda content: content["images"][0].update(width=41),
            r"another size than the file has for 1 images in 'train': a.png \(height x width 30x41, the file 30x40\)",
        ),
    ],
)
def test_a_bad_json_is_named_before_a_run(coco, edit, change, message):
    edit("train", change)
    with pytest.raises(DataError, match=message) as error:
        coco().check()
    assert "\n" not in str(error.value)


def test_splits_of_other_categories_are_refused(coco, edit):
    edit("val", lambda content: content["categories"].append({"id": 50, "name": "sheep"}))
    with pytest.raises(DataError, match="all splits must have the same"):
        coco().check()


@pytest.mark.parametrize("text", ["{", "[1, 2]", ""])
def test_what_is_no_json_of_coco_is_refused(coco, tmp_path, text):
    (tmp_path / "farm" / "annotations" / "val.json").write_text(text)
    with pytest.raises(DataError, match=r"val.json is not"):
        coco().check()


@pytest.mark.data
@pytest.mark.skipif("KDLVFM_DATA" not in os.environ, reason="KDLVFM_DATA is not set")
def test_bccd():
    data = Coco(Path(os.environ["KDLVFM_DATA"]) / "bccd", batch_size=2, steps=3)
    data.check()
    assert data.class_names == ("RBC", "WBC", "Platelets")
    assert data.counts() == {"train": 205, "val": 87, "test": 72, "boxes": 4886, "dropped_boxes": 0}


def test_images_that_no_split_names_may_join_without_boxes(coco, tmp_path):
    before = coco().split_hash()
    (tmp_path / "farm" / "images" / "z.png").write_bytes((tmp_path / "farm" / "images" / "a.png").read_bytes())
    assert coco().split_hash() == before
    data = coco(unlabelled="images")
    data.check()
    assert (data.num_labelled, data.num_unlabelled) == (3, 1)
    image, boxes = data.unlabelled_samples()[0]
    assert (tuple(image.shape), len(boxes)) == ((3, 30, 40), 0)
    assert data.split_hash() != before
    (tmp_path / "farm" / "images" / "z.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"z\.png is not a readable image"):
        coco(unlabelled="images").check()
    (tmp_path / "farm" / "images" / "z.png").unlink()
    with pytest.raises(DataError, match=r"every image in .* is one of a split"):
        coco(unlabelled="images").check()
    with pytest.raises(DataError, match="more is missing"):
        coco(unlabelled="more").check()
