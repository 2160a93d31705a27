# SPDX-License-Identifier: Apache-2.0
"""One small detection data set in each format that is read."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from kdlvfm.data.coco import Coco
from kdlvfm.data.voc import Voc
from kdlvfm.data.yolo import Yolo

SIZE = (30, 40)
NAMES = ("cat", "dog", "cow")
LOADER = {"batch_size": 2, "steps": 3}

# Of each image of each split: class and corners; whole numbers and exact shares, so that all formats can hold them.
TRUTH = {
    "train": {"a": [(0, (4, 3, 20, 18)), (2, (10, 6, 40, 30))], "b": [], "c": [(1, (0, 0, 8, 6))]},
    "val": {"d": [(1, (20, 15, 30, 24))]},
    "test": {"e": [(0, (2, 3, 38, 27))], "f": [(2, (8, 9, 16, 12))]},
}


def picture(path, seed, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def coco_files(root):
    for split, images in TRUTH.items():
        content = {"categories": [{"id": 10 * k + 1, "name": name} for k, name in enumerate(NAMES)]}
        content["images"] = [
            {"id": 7 + i, "file_name": f"{name}.png", "height": SIZE[0], "width": SIZE[1]}
            for i, name in enumerate(images)
        ]
        content["annotations"] = [
            {"id": 100 * i + j, "image_id": 7 + i, "category_id": 10 * k + 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            for i, objects in enumerate(images.values())
            for j, (k, (x1, y1, x2, y2)) in enumerate(objects)
        ]
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
        for name in images:
            picture(root / "images" / f"{name}.png", ord(name))
    return lambda **changes: Coco(root, **{**LOADER, **changes})


def voc_files(root):
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split, images in TRUTH.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}  1\n" for name in images))
        for name, objects in images.items():
            picture(root / "JPEGImages" / f"{name}.png", ord(name))
            found = "".join(
                f"<object><name>{NAMES[k]}</name><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax>"
                f"<ymax>{y2}</ymax></bndbox></object>"
                for k, (x1, y1, x2, y2) in objects
            )
            (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{found}</annotation>")
    return lambda **changes: Voc(root, **{"classes": NAMES, **LOADER, **changes})


def yolo_files(root, turned=False):
    for split, images in TRUTH.items():
        for name, objects in images.items():
            lines = [
                f"{k} {(x1 + x2) / 2 / 40!r} {(y1 + y2) / 2 / 30!r} {(x2 - x1) / 40!r} {(y2 - y1) / 30!r}\n"
                for k, (x1, y1, x2, y2) in objects
            ]
            at = [root / split / kind if turned else root / kind / split for kind in ("images", "labels")]
            picture(at[0] / f"{name}.png", ord(name))
            at[1].mkdir(parents=True, exist_ok=True)
            if lines:
                (at[1] / f"{name}.txt").write_text("".join(lines))
    return lambda **changes: Yolo(root, **{"classes": NAMES, **LOADER, **changes})


FORMATS = {
    "coco": coco_files,
    "voc": voc_files,
    "yolo": yolo_files,
    "yolo_turned": lambda root: yolo_files(root, turned=True),
}


@pytest.fixture
def truth():
    """Of each image of each split: class and corners."""
    return TRUTH


@pytest.fixture(params=FORMATS)
def make(request, tmp_path):
    """A data set in each format, in the folder `farm`."""
    return FORMATS[request.param](tmp_path / "farm")


@pytest.fixture
def coco(tmp_path):
    return coco_files(tmp_path / "farm")


@pytest.fixture
def voc(tmp_path):
    return voc_files(tmp_path / "farm")


@pytest.fixture
def yolo(tmp_path):
    return yolo_files(tmp_path / "farm")


@pytest.fixture
def edit(tmp_path):
    """Changes the content of one of COCO's files."""

    def change(split, function):
        path = tmp_path / "farm" / "annotations" / f"{split}.json"
        content = json.loads(path.read_text())
        function(content)
        path.write_text(json.dumps(content))

    return change
