# SPDX-License-Identifier: Apache-2.0
"""Features from a folder of images, then a task on them; batches with and without boxes; what is refused."""

import json

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from kdlvfm.cli.build import build
from kdlvfm.cli.config import compose
from kdlvfm.data.digit_scenes import SceneGenerator

STUDENT = ("student=timm", "student.name=test_resnet", "student.pretrained=false")
FEATURES = (
    "task=representation",
    "data=images",
    "data.size=32",
    "recipe=representation",
    "recipe.steps=2",
    "recipe.batch_size=4",
    "recipe.warmup_steps=0",
    "recipe.val_every=null",
    "run.num_workers=0",
    "run.progress=line",
    "run.inference_seconds=null",
    "logger=none",
    "teacher=digit_scenes_vit",
    *STUDENT,
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "photos"
    folder.mkdir()
    generator = SceneGenerator("train", size=48)
    for i in range(12):
        Image.fromarray(generator.scene(i).image).save(folder / f"{i:02d}.png")
    return folder


def test_features_are_learned_without_labels_and_become_the_encoder_of_other_students(kdlvfm, photos, tmp_path):
    out = tmp_path / "features"
    ended = kdlvfm("train", *FEATURES, f"data.root={photos}", "distiller=fitnet", f"out={out}")
    assert ended.code == 0, ended.err
    assert f"kdlvfm train data=NAME student=NAME after={out}" in ended.out
    record = json.loads((out / "record.json").read_text(encoding="utf-8"))
    assert record["status"] == "finished"
    expected = {"name": "representation", "primary_metric": "teacher_r2", "distances": [], "has_loss": False}
    assert record["task"] == expected
    assert (record["data"]["classes"], record["data"]["counts"]) == ([], {"train": 10, "val": 2, "test": 0})
    assert record["metrics"]["val"]["teacher_r2"] <= 1
    assert record["teacher"]["metrics"] is None

    ended = kdlvfm("evaluate", out, "--split", "val")
    assert ended.code == 0, ended.err
    assert ended.out.count(f"{100 * record['metrics']['val']['teacher_r2']:.2f}") == 2

    learned = load_file(out / "student.safetensors")
    ended = kdlvfm("export", out)
    assert ended.code == 1
    name = record["student"]["name"]
    assert f"{out}/student.safetensors needs no export" in ended.err
    assert f"create_model({name!r}" in ended.err
    plain = timm.create_model(name, num_classes=0, checkpoint_path=out / "student.safetensors").state_dict()
    assert all(torch.equal(plain[key], value) for key, value in learned.items())
    chosen = ("distiller=none", "data=digit_scenes", "recipe=digit_scenes", "run.progress=none")
    weights = f"checkpoint={out / 'student.safetensors'}"
    whole = build(compose([*chosen, "student=resnet18_fpn", "student.name=test_resnet", f"student.{weights}"]))
    linear = ("student=timm_linear", "student.encoder.name=test_resnet", "student.freeze=true")
    headed = build(compose([*chosen, *linear, f"student.encoder.{weights}"]))
    for encoder in (whole.student.net.encoder.model, headed.student.encoder.net):
        state = encoder.state_dict()
        assert learned.keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in learned.items())
    assert not any(p.requires_grad for p in headed.student.encoder.parameters())
    assert whole.student.card.weights == "file"


def test_a_detector_takes_the_learned_encoder_too(tmp_path):
    pytest.importorskip("mmdet")
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    learned = timm.create_model("test_resnet", num_classes=0).state_dict()
    save_file(learned, tmp_path / "student.safetensors")
    data = ("task=detection", "data=digit_scenes_boxes", "recipe=short_detection")
    weights = ("student.encoder.name=test_resnet", f"student.encoder.checkpoint={tmp_path / 'student.safetensors'}")
    chosen = (*data, "distiller=none", "run.progress=none", "student=resnet18_gfl")
    state = build(compose([*chosen, *weights])).student.net.backbone.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in learned.items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("distiller=kd",), "kd is for segmentation, detection: kdlvfm list distiller --task representation"),
        (("distiller=none",), "none is for segmentation, detection, diffusion"),
        (("distiller=fitnet", "teacher=none"), "images without labels need a teacher"),
        (("distiller=fitnet", "student=resnet18_fpn"), "this student has a head, and the data has no classes"),
        (("distiller=fitnet", "task=segmentation"), "photos has no labels and this task learns from masks"),
        (("distiller=fitnet", "task.student_tap=pooled"), "pooled is not"),
        (("distiller=fitnet", "data.held_out=11", "data.size=0"), "at least 1 pixel"),
        (("distiller=fitnet", "recipe=short"), "recipe.augmentation.crop=null"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(refused, photos, overrides, message):
    chosen = [one for one in FEATURES if one.partition("=")[0] not in {o.partition("=")[0] for o in overrides}]
    if any(one.startswith("student=") for one in overrides):
        chosen = [one for one in chosen if not one.startswith("student.name")]
    if any(one.startswith("task=") for one in overrides):
        chosen = [one for one in chosen if not one.startswith("task.")]
    assert message in refused(*overrides, f"data.root={photos}", base=chosen)


def test_a_task_brings_what_it_is_mostly_used_with():
    chosen = compose(["task=representation", "data.root=photos", "teacher=digit_scenes_vit"])["choices"]
    expected = {"data": "images", "student": "resnet18", "recipe": "representation", "distiller": "agglomerate"}
    assert {group: chosen[group] for group in expected} == expected
    named = compose(["task=representation", "data.root=photos", "teacher=digit_scenes_vit", "distiller=fitnet"])
    assert named["choices"]["distiller"] == "fitnet"
    chosen = compose(["task=detection", "recipe=short_detection"])["choices"]
    expected = {"data": "coco", "student": "resnet18_gfl", "recipe": "short_detection"}
    assert {group: chosen[group] for group in expected} == expected


def test_an_encoder_alone_solves_no_task_with_masks(refused, two_steps):
    assert "is an encoder alone" in refused("distiller=fitnet", *STUDENT, base=two_steps)


MIXED = (
    "experiment=demo_detection",
    "data.train=4",
    "data.unlabelled=4",
    "data.labelled_per_batch=1",
    "data.val=1",
    "data.test=1",
    "recipe.steps=2",
    "recipe.batch_size=2",
    "recipe.warmup_steps=0",
    "run.progress=none",
    "run.inference_seconds=null",
    "logger=none",
    "student.encoder.name=test_resnet",
)


def test_detectors_learn_from_batches_with_and_without_boxes(kdlvfm, tmp_path):
    pytest.importorskip("mmdet")
    ended = kdlvfm("train", *MIXED, "distiller=fgd+ld+crosskd", f"out={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
    record = json.loads((tmp_path / "run" / "record.json").read_text(encoding="utf-8"))
    assert record["status"] == "finished"
    assert record["data"]["counts"] == {"train": 8, "labelled": 4, "unlabelled": 4, "val": 1, "test": 1}


def test_the_loss_of_a_mixed_batch_is_that_of_its_labelled_part():
    pytest.importorskip("mmdet")
    cell = build(compose([*MIXED, "distiller=none", "recipe.batch_size=4", "data.labelled_per_batch=2"]))
    images, target, _ = cell.task.unpack(next(iter(cell.data.train_dataloader())))
    student = cell.student.eval()  # a batch's statistics would join its parts
    taps = cell.task.student_taps(student)
    mixed = cell.task.loss(student, student(images, taps), target)
    alone = cell.task.loss(student, student(images[:2], taps), target[:2])
    torch.testing.assert_close(mixed, alone)
    assert [bool(one["labelled"]) for one in target] == [True, True, False, False]
