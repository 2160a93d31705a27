# SPDX-License-Identifier: Apache-2.0
"""Calls of `kdlvfm label` that cannot be meant: each ends with one line, and nothing is written."""

from __future__ import annotations

import shutil

import pytest

from kdlvfm.cli.label_folder import assign
from kdlvfm.data.base import DataError
from kdlvfm.data.folder import Folder

VIT = "teacher=digit_scenes_vit"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photos", "--out", "out"], "name the teacher, for example teacher=from_run"),
        ([VIT, "--out", "out"], "name the images to label, or a folder of them"),
        (["photos", "teacher=none", "--out", "out"], "teacher=none labels nothing"),
        (["photos", "teacher=from_run", "--out", "out"], "teacher.run=..."),
        (["photos", "teacher=from_run", "teacher.run=photos", "--out", "out"], "photos is not a run"),
        (["photos", VIT, "data=folder", "--out", "out"], "data= is not for kdlvfm label"),
        (["photos", VIT, "out=labels", "--out", "out"], "out= is not for kdlvfm label"),
        (["photos", "teacher=digit_scenes_vti", "--out", "out"], "Did you mean digit_scenes_vit"),
        (["photos", VIT, "task=detection", "--out", "out"], "task=detection does not fit digit_scenes_vit"),
        (["photos", VIT, "--resize", "64", "64", "--out", "out"], "--resize is for detectors"),
        (["photos", VIT, "--resize", "64", "32", "--out", "out"], "--resize takes the short and the long side"),
        (["photos", VIT, "--confidence", "1.5", "--out", "out"], "--confidence must be from 0 to 1, not 1.5"),
        (["photos", VIT, "--val", "1", "--out", "out"], "--val must be from 0 to below 1, not 1"),
        (["photos", VIT, "--classes", "a,b", "--out", "out"], "has 11 classes, and there are 2 names"),
        (["photos", VIT, "--classes", "a,b,a", "--out", "out"], "--classes names a class twice"),
        (["empty", VIT, "--out", "out"], "there is no image in empty (.bmp, .jpeg"),
        (["nowhere", VIT, "--out", "out"], "nowhere is no file and no folder"),
        (["photos/s0.png", VIT, "--out", "out"], "one image is too few for train and val"),
        (["photos", VIT, "--out", "photos/labels"], "--out photos/labels lies in photos"),
        (["photos", VIT, "--out", "photos"], "--out photos lies in photos"),
        (["photos", VIT, "--out", "empty/file"], "--out empty/file is a file; name a folder"),
        (["photos", VIT, "--out", "other"], "other holds other files and no labels"),
        (["photos", VIT, "--out", "out", "--device", "nonsense"], "--device nonsense cannot be used here"),
        (
            ["photos", "teacher=timm", "teacher.name=test_vit", "teacher.pretrained=false", "--out", "out"],
            "has no head that labels pixels or finds boxes: train one on it",
        ),
    ],
)
def test_bad_calls(arguments, message, kdlvfm, scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(scenes, tmp_path / "photos")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/file").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("mine")
    ended = kdlvfm("label", *arguments)
    assert ended.code == 1
    assert message in ended.err
    assert ended.err.startswith("kdlvfm label: error: ")
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_detector_whose_classes_have_no_names_is_refused(kdlvfm, gfl_pair, scenes, tmp_path):
    pytest.importorskip("mmdet")
    teacher = [override for override in gfl_pair if override.startswith("teacher")]
    ended = kdlvfm("label", scenes, *teacher, "--out", tmp_path / "out")
    assert ended.code == 1
    assert "teacher=mmdet has 10 classes, and their names are not known: --classes names them" in ended.err


def test_broken_images_are_all_named_before_anything_is_written(kdlvfm, scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "photos")
    whole = (scenes / "s0.png").read_bytes()
    (tmp_path / "photos/torn.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "photos/text.jpg").write_text("no image")
    ended = kdlvfm("label", tmp_path / "photos", VIT, "--out", tmp_path / "out")
    assert ended.code == 1
    assert "2 of 8 images cannot be read; nothing was written" in ended.err
    assert "torn.png" in ended.err
    assert "text.jpg" in ended.err
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_description_of_labels_is_refused(kdlvfm, scenes, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for content in ("{", "[]", '{"schema": "something/1"}', '{"schema": "kdlvfm.labels/1"}'):
        (out / "labels.json").write_text(content)
        ended = kdlvfm("label", scenes, VIT, "--out", out)
        assert ended.code == 1
        assert "labels.json is not as kdlvfm label writes it" in ended.err
        with pytest.raises(DataError, match="is not as kdlvfm label writes it"):
            Folder(out, ("a", "b"), batch_size=1, steps=1).check()


def test_two_images_of_one_name_are_refused(kdlvfm, scenes, tmp_path):
    (tmp_path / "photos/a").mkdir(parents=True)
    for name in ("a/b.png", "a__b.png"):
        shutil.copy(scenes / "s0.png", tmp_path / "photos" / name)
    ended = kdlvfm("label", tmp_path / "photos", VIT, "--out", tmp_path / "out")
    assert ended.code == 1
    assert "would both be a__b.png in --out: rename one of them" in ended.err


def test_the_splits_depend_on_names_alone(tmp_path):
    images = {f"{i}.png": tmp_path / f"{i}.png" for i in range(40)}
    val = {item.name for item in assign(images, 0.1) if item.split == "val"}
    assert len(val) == 4
    turned = dict(reversed(images.items()))
    assert {item.name for item in assign(turned, 0.1) if item.split == "val"} == val
    assert val < {item.name for item in assign(images, 0.2) if item.split == "val"}
    assert [sum(item.split == "val" for item in assign(images, share)) for share in (0, 0.001, 0.999)] == [0, 1, 39]
