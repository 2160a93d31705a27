# SPDX-License-Identifier: Apache-2.0
"""What a student sees in images: files written, in which geometry and colours, and what is refused before anything."""

from __future__ import annotations

import json
import shutil
from statistics import fmean

import numpy as np
import pytest
import torch
from PIL import Image

from kdlvfm.data.digit_scenes import DigitScenes, SceneGenerator
from kdlvfm.data.palette import distinct_colours
from kdlvfm.data.transforms import PAD_COLOUR

DETECTOR = (
    *("task=detection", "data=digit_scenes_boxes", "data.size=64", "data.train=4", "data.val=2", "data.test=2"),
    *("recipe=short_detection", "recipe.steps=2", "recipe.batch_size=2", "recipe.warmup_steps=1", "run.num_workers=0"),
    *("run.checkpoint_every=2", "run.progress=line", "logger=none", "student=resnet18_gfl"),
    *("student.encoder.name=test_resnet", "student.encoder.pretrained=false", "debug=one_batch"),
)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A finished run of a small GFL, which detects nothing well."""
    pytest.importorskip("mmdet")
    from kdlvfm.cli import main

    folder = tmp_path_factory.mktemp("detector") / "run"
    with pytest.raises(SystemExit) as ended:
        main(["train", *DETECTOR, f"out={folder}"])
    assert not ended.value.code
    return folder


@pytest.fixture
def photos(tmp_path):
    """Three scenes, of several sizes and formats, at two depths, and a file that is no image."""
    folder = tmp_path / "photos"
    (folder / "2026" / "may").mkdir(parents=True)
    for name, size in {"first.png": 64, "2026/second.jpg": 96, "2026/may/third.bmp": 80}.items():
        image = Image.fromarray(SceneGenerator("test", size=size).scene(0).image)
        image.crop((0, 0, size, size - 10)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def read(path):
    with Image.open(path) as file:
        return file.mode, np.array(file)


def written(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def student_of(folder):
    from kdlvfm.cli.runs import load_student, read_run

    return load_student(folder, read_run(folder))


def changed(run, folder, **data):
    """A copy of a run whose record describes other data."""
    shutil.copytree(run, folder)
    record = json.loads((folder / "record.json").read_text())
    record["config"]["data"] = {**record["config"]["data"], **data}
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def test_pictures_and_label_maps_keep_names_and_sizes(kdlvfm, head, photos, tmp_path):
    out = tmp_path / "new" / "seen"
    ended = kdlvfm("predict", head, photos, "--out", out, "--masks")
    assert ended.code == 0
    assert f"wrote  {out}/: 3 pictures, 3 label maps in masks/" in ended.out
    assert "names are not those of images: 1 files" in ended.out
    names = ["2026/may/third.png", "2026/second.png", "first.png"]
    assert written(out) == sorted([*names, *(f"masks/{name}" for name in names)])
    for name, source in zip(names, ("2026/may/third.bmp", "2026/second.jpg", "first.png"), strict=True):
        with Image.open(photos / source) as file:
            image = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1) / 255
        with torch.no_grad():
            expected = student_of(head)(image[None], ["logits"])["logits"][0].argmax(0)
        mode, mask = read(out / "masks" / name)
        assert mode == "P"
        assert torch.equal(torch.from_numpy(mask).long(), expected)
        with Image.open(out / "masks" / name) as file:
            colours = torch.from_numpy(np.array(file.convert("RGB")))
        assert torch.equal(colours, torch.tensor(DigitScenes.palette, dtype=torch.uint8)[expected])
        picture = read(out / name)[1]
        assert picture.shape[1] % mask.shape[1] == 0  # small images are enlarged
        assert picture.shape[0] > picture.shape[1] // mask.shape[1] * mask.shape[0]  # the legend


def test_a_turned_photograph_is_seen_as_people_see_it(kdlvfm, head, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(SceneGenerator("test").scene(0).image[:40]).save(tmp_path / "turned.jpg", exif=exif)
    assert kdlvfm("predict", head, tmp_path / "turned.jpg", "--out", tmp_path / "out", "--masks").code == 0
    assert read(tmp_path / "out/masks/turned.png")[1].shape == (64, 40)


def test_what_was_written_into_the_folder_of_the_images_is_not_predicted_again(kdlvfm, head, photos):
    for _ in range(2):
        ended = kdlvfm("predict", head, photos, "--out", photos / "seen", "--force")
        assert ended.code == 0
        assert "3 pictures" in ended.out


def test_the_data_of_the_run_need_not_be_here(kdlvfm, head, detector, photos, tmp_path):
    gone = str(tmp_path / "gone")
    camvid = {"_target_": "kdlvfm.data.camvid.CamVid", "root": gone, "batch_size": 1, "steps": 1}
    coco = {"_target_": "kdlvfm.data.coco.Coco", "root": gone, "batch_size": 1, "steps": 1}
    for run, data, name in ((head, camvid, "masks"), (detector, coco, "boxes")):
        copy = tmp_path / f"{name}-run"
        shutil.copytree(run, copy)
        record = json.loads((copy / "record.json").read_text())
        record["config"]["data"] = data
        (copy / "record.json").write_text(json.dumps(record))
        options = ["--masks"] if name == "masks" else ["--score", "0"]
        assert kdlvfm("predict", copy, photos / "first.png", "--out", tmp_path / name, *options).code == 0
    from kdlvfm.data.camvid import CamVid

    with Image.open(tmp_path / "masks/masks/first.png") as file:
        colours = {colour for _, colour in file.convert("RGB").getcolors()}
    assert colours <= {*CamVid.palette}
    shown = {tuple(colour) for colour in read(tmp_path / "boxes/first.png")[1][..., :3].reshape(-1, 3).tolist()}
    assert shown & {*distinct_colours(10)}


def test_boxes_are_those_of_the_student_in_pixels_of_the_image(kdlvfm, detector, photos, tmp_path):
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO

    out = tmp_path / "seen"
    ended = kdlvfm("predict", detector, photos, "--out", out, "--score", "0.001")
    assert ended.code == 0
    assert written(out) == ["2026/may/third.png", "2026/second.png", "detections.json", "first.png"]
    content = json.loads((out / "detections.json").read_text())
    assert f"detections.json with {len(content['annotations'])} boxes" in ended.out
    assert [image["file_name"] for image in content["images"]] == ["2026/may/third.bmp", "2026/second.jpg", "first.png"]
    assert [(image["height"], image["width"]) for image in content["images"]] == [(70, 80), (86, 96), (54, 64)]
    assert [category["name"] for category in content["categories"]] == list("0123456789")
    coco = COCO(out / "detections.json")
    assert len(coco.loadRes(content["annotations"]).getAnnIds()) == len(content["annotations"]) > 0

    student = student_of(detector)
    image = torch.full((1, 3, 64, 64), 1 / 255) * torch.tensor(PAD_COLOUR)[:, None, None]
    image[..., :54, :] = torch.from_numpy(read(photos / "first.png")[1]).permute(2, 0, 1) / 255
    with torch.no_grad():
        (found,) = student.predict(student(image, student.task_taps), [torch.tensor([54, 64])])
    order = found["scores"].argsort(descending=True)
    order = order[found["scores"][order] >= 0.001]
    mine = [box for box in content["annotations"] if box["image_id"] == 3]
    assert [box["score"] for box in mine] == pytest.approx(found["scores"][order].tolist(), abs=1e-4)
    boxes = found["boxes"][order]
    expected = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
    for box, label, corner in zip(mine, found["labels"][order].tolist(), expected.tolist(), strict=True):
        assert box["category_id"] == label + 1
        assert box["bbox"] == pytest.approx(corner, abs=0.006)


def test_images_are_resized_as_the_data_was_and_boxes_back(kdlvfm, detector, photos, tmp_path):
    """A student that saw its images twice as large finds in them what it finds in images that are."""
    twice = changed(detector, tmp_path / "twice", resize=[108, 128])
    with Image.open(photos / "first.png") as file:
        from kdlvfm.data.boxes import make_boxes, resize

        raw = torch.from_numpy(np.array(file)).permute(2, 0, 1)
    large, _ = resize((raw, make_boxes([], [])), 2.0)
    Image.fromarray(large.permute(1, 2, 0).numpy()).save(tmp_path / "large.png")
    lists = []
    for run, image in ((twice, photos / "first.png"), (detector, tmp_path / "large.png")):
        assert kdlvfm("predict", run, image, "--out", tmp_path / "out", "--score", "0.001", "--force").code == 0
        lists.append(json.loads((tmp_path / "out/detections.json").read_text())["annotations"])
    assert len(lists[0]) == len(lists[1]) > 0
    for small, large in zip(*lists, strict=True):
        assert small["score"] == large["score"]
        assert [2 * side for side in small["bbox"]] == pytest.approx(large["bbox"], abs=0.05)


def test_only_boxes_of_the_score_asked_for_count(kdlvfm, detector, photos, tmp_path):
    assert kdlvfm("predict", detector, photos, "--out", tmp_path / "all", "--score", "0").code == 0
    scores = [box["score"] for box in json.loads((tmp_path / "all/detections.json").read_text())["annotations"]]
    least = fmean(sorted(scores)[len(scores) // 2 :][:2])
    assert kdlvfm("predict", detector, photos, "--out", tmp_path / "some", "--score", least).code == 0
    some = [box["score"] for box in json.loads((tmp_path / "some/detections.json").read_text())["annotations"]]
    assert sorted(some) == sorted(score for score in scores if score >= least)
    assert len(some) < len(scores)
    assert kdlvfm("predict", detector, photos, "--out", tmp_path / "none").code == 0
    assert not json.loads((tmp_path / "none/detections.json").read_text())["annotations"]


def test_nothing_is_replaced_without_force(kdlvfm, head, photos, tmp_path):
    out = tmp_path / "seen"
    (out / "2026").mkdir(parents=True)
    (out / "2026/second.png").write_text("mine")
    ended = kdlvfm("predict", head, photos, "--out", out)
    assert ended.code == 1
    assert f"{out} holds 1 of the 3 files to write, such as {out}/2026/second.png" in ended.err
    assert written(out) == ["2026/second.png"]
    assert kdlvfm("predict", head, photos, "--out", out, "--force").code == 0
    assert read(out / "2026/second.png")[0] in ("RGB", "RGBA")


def test_broken_files_are_all_named_before_anything_is_written(kdlvfm, head, photos, tmp_path):
    whole = (photos / "2026/second.jpg").read_bytes()
    (photos / "2026/torn.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "text.png").write_text("no image")
    ended = kdlvfm("predict", head, photos, "--out", tmp_path / "seen")
    assert ended.code == 1
    assert "2 of 5 images cannot be read; nothing was written" in ended.err
    assert "2026/torn.jpg" in ended.err
    assert "text.png" in ended.err
    assert not (tmp_path / "seen").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photos/nowhere", "--out", "seen"], "photos/nowhere is no file and no folder"),
        (["photos/first.png", "first.jpg", "--out", "seen"], "would have one name in --out: give each a folder"),
        (["empty", "--out", "seen"], "there is no image in empty (.bmp, .jpeg"),
        (["photos", "--out", "first.jpg"], "--out first.jpg is a file; name a folder"),
        (["photos", "--out", "seen", "--score", "0.5"], "--score is for detection"),
        (["photos", "--out", "seen", "--device", "nonsense"], "--device nonsense cannot be used here"),
        (["more", "--out", "seen", "--masks"], "would both be seen/masks/first.png"),
    ],
)
def test_bad_calls(arguments, message, kdlvfm, head, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    shutil.copy(photos / "2026/second.jpg", tmp_path / "first.jpg")
    (tmp_path / "more/masks").mkdir(parents=True)
    for place in ("more/first.png", "more/masks/first.png"):
        shutil.copy(photos / "first.png", tmp_path / place)
    ended = kdlvfm("predict", head, *arguments)
    assert ended.code == 1
    assert message in ended.err
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "seen").exists()


@pytest.mark.parametrize(
    ("option", "message"), [(("--masks",), "--masks is for segmentation"), (("--score", "1.5"), "from 0 to 1")]
)
def test_bad_calls_for_a_detector(option, message, kdlvfm, detector, photos, tmp_path):
    ended = kdlvfm("predict", detector, photos, "--out", tmp_path / "seen", *option)
    assert ended.code == 1
    assert message in ended.err


def test_one_image_given_twice_is_one_image(kdlvfm, head, photos, tmp_path):
    ended = kdlvfm("predict", head, photos / "first.png", photos / "first.png", "--out", tmp_path / "seen")
    assert "1 pictures" in ended.out


def test_a_run_that_asks_to_call_something_else_is_refused(kdlvfm, head, photos, tmp_path):
    record = json.loads((head / "record.json").read_text())
    record["config"]["data"] = {"_target_": "os.system", "command": f"touch {tmp_path}/owned"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/record.json").write_text(json.dumps(record))
    ended = kdlvfm("predict", tmp_path / "run", photos, "--out", tmp_path / "seen")
    assert ended.code == 1
    assert "asks to call 'os.system'" in ended.err
    assert not (tmp_path / "owned").exists()


def test_what_is_no_finished_run_is_refused(kdlvfm, photos, tmp_path):
    ended = kdlvfm("predict", tmp_path, photos, "--out", tmp_path / "seen")
    assert ended.code == 1
    assert "is not a run: it has no record.json" in ended.err
