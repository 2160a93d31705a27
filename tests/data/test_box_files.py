# SPDX-License-Identifier: Apache-2.0
"""What detection data sets of all formats share: read alike, and bad files named before a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from kdlvfm.data.base import DataError
from kdlvfm.data.box_transforms import BoxAugmentation
from kdlvfm.data.coco import Coco
from kdlvfm.data.voc import Voc
from kdlvfm.data.yolo import Yolo

CONFIGS = Path(__file__).parents[2] / "configs"


def test_all_formats_say_the_same(make, truth):
    data = make()
    data.check()
    assert data.name == "farm"
    assert data.class_names == ("cat", "dog", "cow")
    assert data.counts() == {"train": 3, "val": 1, "test": 2, "boxes": 6, "dropped_boxes": 0}
    assert len(data.palette) == 3
    for split, images in truth.items():
        samples = data.samples(split)
        for i, (name, objects) in enumerate(images.items()):
            image, boxes = samples[i]
            pixels = np.random.default_rng(ord(name)).integers(0, 256, (30, 40, 3), dtype=np.uint8)
            assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))
            assert boxes.labels.tolist() == [k for k, _ in objects]
            expected = torch.tensor([corners for _, corners in objects], dtype=torch.float32).reshape(-1, 4)
            torch.testing.assert_close(boxes.corners, expected, atol=1e-4, rtol=0)
            assert not boxes.iscrowd.any()
    assert len(list(data.train_dataloader())) == 3


def test_the_hash_follows_boxes_and_files(make, tmp_path):
    first = make().split_hash()
    assert make(seed=3).split_hash() == first
    image = next((tmp_path / "farm").rglob("d.png"))
    Image.new("RGB", (41, 30)).save(image)
    assert make(check_images=False).split_hash() != first


def test_a_photograph_stored_turned_is_seen_upright(coco, tmp_path):
    path = tmp_path / "farm" / "images" / "d.png"
    file = Image.open(path)
    exif = Image.Exif()
    exif[0x0112] = 6
    file.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    for check_images in (True, False):
        coco(check_images=check_images).check()


def bad_boxes(content):
    for (x, y, w, h), annotation in zip(
        [(4, 3, 0, 5), (4, 3, 5, -2), (30, 3, 12, 9)], content["annotations"], strict=True
    ):
        annotation["bbox"] = [x, y, w, h]


def test_bad_boxes_are_listed_by_file_or_dropped(coco, edit):
    edit("train", bad_boxes)
    with pytest.raises(DataError) as error:
        coco().check()
    assert str(error.value) == (
        "farm has 3 boxes in 'train' without area or outside their image, as [x1, y1, x2, y2]: a.png [4.0, 3.0, 4.0, "
        "8.0], a.png [4.0, 3.0, 9.0, 1.0], c.png [30.0, 3.0, 42.0, 12.0]. Correct them, or leave them out with "
        "data.bad_boxes=drop."
    )
    with pytest.raises(DataError, match="no box in 'train': there is nothing to learn"):
        coco(bad_boxes="drop").check()
    assert coco(bad_boxes="drop").counts() == {"train": 3, "val": 1, "test": 2, "boxes": 3, "dropped_boxes": 3}


def test_a_box_may_reach_out_by_less_than_a_pixel_and_is_cut_in_training(coco, edit):
    edit("train", lambda content: content["annotations"][1].update(bbox=[10, 6, 30.6, 24.5]))
    data = coco()
    data.check()
    boxes = next(x["boxes"] for batch in data.train_dataloader() for x in batch["target"] if len(x["boxes"]) == 2)
    assert boxes[1].tolist() == [10, 6, 40, 30]
    assert data.samples("train")[0][1].corners[1].tolist() == pytest.approx([10, 6, 40.6, 30.5])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Coco, "needs 1 files that are missing: .*train.json .expected are annotations/train.json.*images in images"),
        (lambda root, **more: Voc(root, **more), "ImageSets/Main/SPLIT.txt, JPEGImages/ID.jpg and Annotations/ID.xml"),
        (lambda root, **more: Yolo(root, ["cat"], **more), "is missing: images are read from images/SPLIT"),
    ],
)
def test_a_wrong_root_says_where_files_are_expected(tmp_path, kind, message):
    with pytest.raises(DataError, match=message):
        kind(tmp_path / "nowhere", batch_size=2, steps=3).check()


def test_a_broken_image_is_found_before_a_run(make, tmp_path):
    image = next((tmp_path / "farm").rglob("f.png"))
    image.write_bytes(image.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"f.png is not a readable image"):
        make().check()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"bad_boxes": "keep"}, "error or drop"), ({"classes": ["a", "a", "b"]}, "must be different names")],
)
def test_arguments_out_of_range_are_refused(yolo, arguments, message):
    with pytest.raises(DataError, match=message):
        yolo(**arguments).check()


@pytest.mark.parametrize(("name", "kind"), [("bccd", Coco), ("coco", Coco), ("voc", Voc), ("yolo", Yolo)])
def test_the_yaml_builds_it(tmp_path, monkeypatch, name, kind):
    monkeypatch.setenv("KDLVFM_DATA", str(tmp_path))
    config = OmegaConf.load(CONFIGS / "data" / f"{name}.yaml")
    del config["about"]
    recipe = OmegaConf.load(CONFIGS / "recipe" / "1x.yaml")
    more = {"data": config, "recipe": recipe, "seed": 1, "run": {"num_workers": 0}}
    if name == "yolo":
        config.update(root=str(tmp_path), classes=["cat"])
    data = instantiate(OmegaConf.create(more).data, _convert_="all")
    assert type(data) is kind
    assert (data.batch_size, data.steps, data.seed) == (16, 87960, 1)
    assert isinstance(data.augmentation, BoxAugmentation)
