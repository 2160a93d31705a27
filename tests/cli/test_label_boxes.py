# SPDX-License-Identifier: Apache-2.0
"""Boxes that a teacher makes: which ones, in which pixels, and what training says of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from kdlvfm.data.boxes import make_boxes, resize
from kdlvfm.data.coco import Coco
from kdlvfm.data.digit_scenes import DigitScenes, SceneGenerator

pytest.importorskip("mmdet")

DETECTOR = "teacher=digit_scenes_detector"
LOADING = {"batch_size": 2, "steps": 1}
TWO_STEPS = ("debug=one_batch", "recipe.warmup_steps=0", "run.progress=line", "logger=none")


def pixels(path):
    with Image.open(path) as file:
        return np.array(file)


def test_boxes_are_those_above_the_score(kdlvfm, interrupt_at, scenes, tmp_path):
    from kdlvfm.models.digit_scenes_detector import DigitScenesDetector

    out = tmp_path / "boxes"
    call = ("label", scenes, DETECTOR, "--out", out, "--confidence", "0.4")
    names = interrupt_at("Boxes", 2)
    assert kdlvfm(*call).code == 130
    assert not (out / "annotations").exists()
    ended = kdlvfm(*call)
    assert ended.code == 0, ended.err
    assert len(names) == 6
    data = Coco(out, test=None, **LOADING)
    data.check()
    assert data.class_names == DigitScenes.class_names[1:]
    model, total = DigitScenesDetector().eval(), 0
    for split, count in {"train": 5, "val": 1}.items():
        content = json.loads((out / "annotations" / f"{split}.json").read_text())
        assert len(content["images"]) == len(data.entries(split)) == count
        for image, entry in zip(content["images"], data.entries(split), strict=True):
            source = scenes / image["file_name"].replace("__", "/")
            assert entry.image.resolve() == source.resolve()
            with torch.no_grad():
                features = model(torch.from_numpy(pixels(source)).permute(2, 0, 1)[None] / 255, model.task_taps)
                (found,) = model.predict(features, [torch.tensor([64, 64])])
            order = found["scores"].argsort(descending=True)
            order = order[found["scores"][order] >= 0.4]
            scores = [box["score"] for box in content["annotations"] if box["image_id"] == image["id"]]
            assert scores == pytest.approx(found["scores"][order].tolist(), abs=1e-4)
            assert torch.allclose(entry.boxes.corners, found["boxes"][order], atol=0.02)
            assert torch.equal(entry.boxes.labels, found["labels"][order])
            total += len(scores)
    kept = json.loads((out / "labels.json").read_text())["kept"]
    assert kept["boxes"] == sum(kept["by_class"].values()) == total > 10
    assert f"{total} boxes, {total / 6:.1f} an image, at 0.4 or surer" in ended.out
    assert "kdlvfm train task=detection data=coco_json" in ended.out


@pytest.mark.slow
def test_training_on_boxes_says_who_made_them(kdlvfm, scenes, tmp_path):
    out, run = tmp_path / "boxes", tmp_path / "run"
    assert kdlvfm("label", scenes, DETECTOR, "--out", out).code == 0
    student = ("student=resnet18_gfl", "student.encoder.name=test_resnet", "student.encoder.pretrained=false")
    data = ("task=detection", "data=coco_json", f"data.root={out}", "data.test=null", "recipe=short_detection")
    ended = kdlvfm("train", *data, *student, "distiller=none", *TWO_STEPS, f"out={run}")
    assert ended.code == 0, ended.err
    labels = json.loads((run / "record.json").read_text())["data"]["labels"]
    assert labels["teacher"]["name"] == "digit_scenes_detector"
    assert labels["images"] == {"train": 5, "val": 1}
    (out / "annotations/val.json").rename(out / "annotations/checked.json")
    assert Coco(out, val="annotations/checked.json", test=None, **LOADING).labels()["images"] == {"train": 5}


def test_a_detector_sees_images_in_the_size_asked_for(kdlvfm, tmp_path):
    """Images that are shown half as large have the boxes of images that are, in their own pixels."""
    (tmp_path / "large").mkdir()
    (tmp_path / "small").mkdir()
    for number, name in enumerate(("s0.png", "s1.png")):
        large = torch.from_numpy(SceneGenerator("test", size=128).scene(number).image)
        small, _ = resize((large.permute(2, 0, 1), make_boxes([], [])), 0.5)
        Image.fromarray(large.numpy()).save(tmp_path / "large" / name)
        Image.fromarray(small.permute(1, 2, 0).numpy()).save(tmp_path / "small" / name)
    found = {}
    for title, options in {"small": (), "large": ("--resize", "64", "64")}.items():
        ended = kdlvfm("label", tmp_path / title, DETECTOR, "--out", tmp_path / f"of {title}", "--val", "0", *options)
        assert ended.code == 0, ended.err
        found[title] = json.loads((tmp_path / f"of {title}" / "annotations/train.json").read_text())["annotations"]
    assert "'data.resize=[64,64]'" in ended.out
    assert len(found["small"]) == len(found["large"]) > 4
    for small, large in zip(found["small"], found["large"], strict=True):
        assert small["category_id"] == large["category_id"]
        assert [2 * side for side in small["bbox"]] == pytest.approx(large["bbox"], abs=0.1)
