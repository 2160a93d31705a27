# SPDX-License-Identifier: Apache-2.0
"""Masks that a teacher makes: what is written, what a stopped call goes on with, what training says of them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from kdlvfm.data.base import DataError
from kdlvfm.data.digit_scenes import DigitScenes
from kdlvfm.data.folder import Folder
from kdlvfm.models.digit_scenes_vit import DigitScenesViT

VIT = "teacher=digit_scenes_vit"
LOADING = {"batch_size": 2, "steps": 1}
NAMES = ("deep/er/s3", "s0", "s1", "s2", "s4", "s5")
TWO_STEPS = ("debug=one_batch", "recipe.warmup_steps=0", "run.progress=line", "logger=none")


@pytest.fixture(scope="module")
def labelled(scenes, tmp_path_factory):
    """Masks of the scenes; not to be changed."""
    from kdlvfm.cli import main

    folder = tmp_path_factory.mktemp("masks") / "new" / "scenes"
    with pytest.raises(SystemExit) as ended:
        main(["label", str(scenes), VIT, "--out", str(folder), "--val", "0.3"])
    assert not ended.value.code
    return folder


def pixels(path):
    with Image.open(path) as file:
        return np.array(file)


def about(folder):
    return json.loads((folder / "labels.json").read_text(encoding="utf-8"))


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def contents(folder):
    return {name: (folder / name).read_bytes() for name in files(folder) if name != "labels.json"}


def test_masks_are_the_teachers_where_it_is_sure(labelled, scenes):
    data = Folder(labelled, DigitScenes.class_names, **LOADING)
    data.check()
    assert data.counts() == {"train": 4, "labelled": 4, "unlabelled": 0, "val": 2, "test": 0}
    teacher, kept, seen = DigitScenesViT().eval(), torch.zeros(11, dtype=torch.int64), []
    for split in data.splits:
        for (image, mask), pair in zip(data.samples(split), data.pairs(split), strict=True):
            seen.append(pair.image.stem.replace("__", "/"))
            assert torch.equal(image, torch.from_numpy(pixels(scenes / f"{seen[-1]}.png")).permute(2, 0, 1))
            with torch.no_grad():
                sure, classes = teacher(image[None] / 255, ["logits"])["logits"][0].softmax(0).max(0)
            assert torch.equal(mask, torch.where(sure >= 0.9, classes, 255))
            confidence = torch.from_numpy(pixels(labelled / split / "confidence" / f"{pair.image.stem}.png"))
            assert torch.allclose(confidence / 255, sure, atol=0.002 + 1e-6)
            kept += torch.bincount(mask[mask != 255], minlength=11)
    assert sorted(seen) == sorted(NAMES)
    assert about(labelled)["kept"] == {
        "of": 6 * 64 * 64,
        "pixels": int(kept.sum()),
        "by_class": dict(zip(DigitScenes.class_names, kept.tolist(), strict=True)),
    }


def test_the_folder_says_what_it_is(labelled, scenes):
    content = about(labelled)
    card = DigitScenesViT().card
    assert {key: content["teacher"][key] for key in vars(card)} == vars(card)
    assert len(content["teacher"]["weights_hash"]) == 64
    assert content["classes"] == list(DigitScenes.class_names)
    assert (content["confidence"], content["val"], content["ignore_value"]) == (0.9, 0.3, 255)
    assert content["command"] == ["kdlvfm", "label", str(scenes), VIT, "--out", str(labelled), "--val", "0.3"]
    assert {split: content["images"][split] for split in ("train", "val")} == {"train": 4, "val": 2}
    folders = [f"{split}/{kind}" for split in ("train", "val") for kind in ("confidence", "images", "masks")]
    assert {name.rpartition("/")[0] for name in files(labelled)} == {"", *folders}
    assert [name for name in files(labelled) if "/" not in name] == ["labels.json", "sheet.png"]
    links = [path for path in labelled.rglob("images/*") if path.is_symlink()]
    assert len(links) == 6
    assert not any(path.readlink().is_absolute() for path in links)
    with Image.open(labelled / "sheet.png") as sheet:
        assert sheet.width > 1000


def test_a_finished_folder_is_left_alone_and_another_teacher_is_refused(kdlvfm, labelled, scenes, tmp_path):
    before = contents(labelled), about(labelled)
    ended = kdlvfm("label", scenes, VIT, "--out", labelled, "--val", "0.3")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(f"{labelled} is finished; nothing to do.\n")
    assert f"next   open {labelled}/sheet.png    or    kdlvfm train data=folder data.root={labelled} " in ended.out
    more = tmp_path / "more"
    shutil.copytree(scenes, more)
    Image.new("RGB", (64, 64)).save(more / "s9.png")
    named = ",".join(f"class {i}" for i in range(11))
    for arguments, words in {
        (scenes, VIT): "another share of val (0.3, now 0.1)",
        (scenes, VIT, "--val", "0.3", "--confidence", "0.8"): "another confidence (0.9, now 0.8)",
        (scenes, VIT, "--val", "0.3", "--classes", named): "other classes",
        (scenes, VIT, "--val", "0.3", "teacher.pretrained=false"): "other weights of the teacher",
        (scenes, VIT, "--val", "0.3", "teacher.input_size=96"): "other settings of the teacher",
        (more, VIT, "--val", "0.3"): "other images",
    }.items():
        ended = kdlvfm("label", *arguments, "--out", labelled)
        assert ended.code == 1
        assert f"{labelled} was labelled with {words}" in ended.err
        assert ended.err.count("\n") == 1
    assert (contents(labelled), about(labelled)) == before


def test_a_stopped_call_goes_on_and_ends_alike(kdlvfm, interrupt_at, labelled, scenes, tmp_path):
    out = tmp_path / "scenes"
    call = ("label", scenes, VIT, "--out", out, "--val", "0.3")
    names = interrupt_at("Masks", 3)
    ended = kdlvfm(*call)
    assert ended.code == 130
    assert "Interrupted after 3 of 6 images. The same command goes on." in ended.out
    assert about(out)["kept"] is None
    with pytest.raises(DataError, match="is not labelled to its end: give its command again"):
        Folder(out, DigitScenes.class_names, **LOADING).check()
    # A process that was killed while it wrote leaves half a line.
    with (out / "progress.jsonl").open("a") as file:
        file.write('{"name": "s4.png", "pix')
    ended = kdlvfm(*call)
    assert ended.code == 0, ended.err
    assert "3 of 6 images are labelled already" in ended.out
    assert sorted(names) == sorted(f"{name.replace('/', '__')}.png" for name in NAMES)
    assert contents(out) == contents(labelled)
    assert about(out)["kept"] == about(labelled)["kept"]


def test_training_on_masks_says_who_made_them(kdlvfm, labelled, tmp_path):
    names = json.dumps(list(DigitScenes.class_names))
    run = tmp_path / "runs" / "run"
    student = ("student=timm_linear", "student.encoder.name=test_resnet", "student.encoder.pretrained=false")
    data = ("data=folder", f"data.root={labelled}", f"data.classes={names}", "recipe=digit_scenes", "distiller=none")
    ended = kdlvfm("train", *data, *student, *TWO_STEPS, f"out={run}")
    assert ended.code == 0, ended.err
    assert "labels     of train, val made by digit_scenes_vit, 0.9 or surer" in ended.out
    labels = json.loads((run / "record.json").read_text())["data"]["labels"]
    teacher = {key: about(labelled)["teacher"][key] for key in labels["teacher"]}
    assert labels == {"teacher": teacher, "confidence": 0.9, "images": {"train": 4, "val": 2}}
    assert teacher["name"] == "digit_scenes_vit"
    ended = kdlvfm("table", run.parent, "--split", "val", "--format", "markdown")
    assert "labels of val were made by digit_scenes_vit: scores say how far a student agrees with it" in ended.out
    assert "Training labels were made by digit_scenes_vit, those of 0.9 or surer kept." in ended.out


def test_labels_of_people_beside_those_of_a_teacher(kdlvfm, scenes, tmp_path):
    out = tmp_path / "scenes"
    ended = kdlvfm("label", scenes, VIT, "--out", out, "--val", "0", "--copy", "--confidence", "0")
    assert ended.code == 0, ended.err
    assert "there is no val yet" in ended.out
    assert "100.0 % of the pixels have a label" in ended.out
    assert not any(path.is_symlink() for path in out.rglob("*"))
    shutil.copytree(out / "train", out / "val")
    data = Folder(out, DigitScenes.class_names, **LOADING)
    data.check()
    assert data.labels()["images"] == {"train": 6}


def test_a_run_is_a_teacher_and_knows_its_classes(kdlvfm, head, scenes, tmp_path):
    """Masks are in the size of each image, whatever it is."""
    for name, size in {"wide.png": (90, 50), "high.jpg": (33, 70)}.items():
        with Image.open(scenes / "s0.png") as image:
            (tmp_path / "photos").mkdir(exist_ok=True)
            image.resize(size).save(tmp_path / "photos" / name)
    out = tmp_path / "out"
    ended = kdlvfm(
        "label", tmp_path / "photos", "teacher=from_run", f"teacher.run={head}", "--out", out, "--confidence", "0.2"
    )
    assert ended.code == 0, ended.err
    assert about(out)["classes"] == list(DigitScenes.class_names)
    shapes = {path.name: pixels(path).shape for path in out.rglob("masks/*.png")}
    assert shapes == {"wide.png": (50, 90), "high.png": (70, 33)}


def test_nothing_sure_enough_is_said(kdlvfm, head, scenes, tmp_path):
    ended = kdlvfm(
        *("label", scenes / "s0.png", "teacher=from_run", f"teacher.run={head}", "--out", tmp_path / "out"),
        *("--confidence", "1", "--val", "0"),
    )
    assert ended.code == 0
    assert "WARNING  nothing was sure enough: no label reaches 1. Lower --confidence." in ended.out


def test_zero_shot_finds_what_is_named(kdlvfm, scenes, tmp_path, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    from kdlvfm.models import open_clip as adapter

    def tiny(*_, **__):
        image = {"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 64}
        return open_clip.CLIP(32, image, {"width": 32, "heads": 2, "layers": 1}, quick_gelu=True)

    monkeypatch.setattr(adapter.open_clip, "create_model", tiny)
    clip, out = ("teacher=clip_zeroshot_vitb16", "teacher.pretrained=false"), tmp_path / "out"
    call = ("label", scenes / "s0.png", *clip, "--out", out, "--val", "0", "--confidence", "0")
    ended = kdlvfm(*call)
    assert ended.code == 1
    assert "finds classes by their names: --classes A,B,... names two or more" in ended.err
    ended = kdlvfm(*call, "--classes", "sky, a painted digit,roof")
    assert ended.code == 0, ended.err
    assert "WARNING  the teacher has RANDOM weights: its labels are noise" in ended.out
    assert about(out)["classes"] == ["sky", "a painted digit", "roof"]
    assert about(out)["teacher"]["weights"] == "random"
    # Random weights are the same the next time, and other names are another teacher.
    assert "nothing to do" in kdlvfm(*call, "--classes", "sky,a painted digit,roof").out
    assert "other " in kdlvfm(*call, "--classes", "sky,a painted digit,wall").err
