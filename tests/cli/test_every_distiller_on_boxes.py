# SPDX-License-Identifier: Apache-2.0
"""Every distiller for detection trains from the command line, on two detectors; some with a mere encoder as teacher."""

import json

import pytest
import torch

from kdlvfm.cli import main
from kdlvfm.cli.config import options
from kdlvfm.cli.list import read_about
from kdlvfm.models.mmdet import MMDetModel

pytest.importorskip("mmdet")
pytestmark = pytest.mark.slow

DETECTORS = [name for name in options("distiller") if "detection" in read_about("distiller", name).get("tasks", ())]
JOINED = ["kd+fitnet", "sckd:kd+pkd"]
# What reads the teacher's predictions or the maps of its pyramid, so that an encoder cannot be its teacher.
NEED_A_HEAD = {"kd", "score_kd", "ld", "crosskd"}
LEVELS = [f"fpn.{i}" for i in range(5)]
STAGES = ["map.-3", "map.-2", "map.-1"]

FEW = (
    "task=detection",
    "data=digit_scenes_boxes",
    "data.size=64",
    "data.train=4",
    "data.val=1",
    "data.test=1",
    "recipe=short_detection",
    "recipe.steps=2",
    "recipe.batch_size=3",
    "recipe.warmup_steps=0",
    "run.num_workers=0",
    "run.progress=none",
    "run.inference_seconds=null",
    "logger=none",
)
NARROW = "student.changes={neck:{out_channels:64},bbox_head:{in_channels:64,feat_channels:64,stacked_convs:2}}"
RESNET = ("student.encoder.name=test_resnet", "student.encoder.pretrained=false", NARROW)
STUDENT = ("student=resnet18_gfl", *RESNET)
VIT = ("teacher=timm", "teacher.name=test_vit", "teacher.pretrained=false")


def train(*overrides):
    with pytest.raises(SystemExit) as ended:
        main(["train", *FEW, *map(str, overrides)])
    assert not ended.value.code


@pytest.fixture(scope="module")
def teacher_of(tmp_path_factory):
    """Makes, once each, finished runs of a ViT with the head of a detector; gives the overrides that name them."""
    folder = tmp_path_factory.mktemp("teachers")

    def make(config="gfl_r50_fpn_1x_coco"):
        run = folder / config
        encoder = ("teacher@student.encoder=timm", "student.encoder.name=test_vit", "student.encoder.pretrained=false")
        if not run.exists():
            train("student=detector_head", *encoder, f"student.config={config}", NARROW, "distiller=none", f"out={run}")
        return ("teacher=from_run", f"teacher.run={run}")

    return make


@pytest.fixture
def record_of(kdlvfm, tmp_path):
    """The record of a run of two steps."""

    def call(*overrides, student=STUDENT):
        ended = kdlvfm("train", *FEW, *student, *overrides, f"out={tmp_path / 'run'}")
        assert ended.code == 0, ended.err
        record = json.loads((tmp_path / "run" / "record.json").read_text(encoding="utf-8"))
        assert record["status"] == "finished"
        return record

    return call


@pytest.mark.parametrize("name", [*DETECTORS, *JOINED])
def test_trains_with_a_detector_as_teacher(record_of, teacher_of, name):
    record = record_of(*teacher_of(), f"distiller={name}")
    assert (record["teacher"] is None) == (name == "none")
    taps = {*record["distiller"]["teacher_taps"]}
    kinds = {tap.partition(".")[0] for tap in taps}
    assert kinds <= {"fpn", "cls", "reg", "cls_mid", "reg_mid"}
    assert taps == {f"{kind}.{i}" for kind in kinds for i in range(5)}
    if "crosskd" not in name:
        assert taps <= {*record["distiller"]["student_taps"]}


# Without data, `kd` is what the default of `data_free` does.
@pytest.mark.parametrize("name", [name for name in DETECTORS if name not in {"none", "data_free", *NEED_A_HEAD}])
def test_trains_with_an_encoder_as_teacher(record_of, name):
    taps = record_of(*VIT, f"distiller={name}")["distiller"]
    assert all(tap.startswith("map.") for tap in taps["teacher_taps"])
    several = {"customkd": LEVELS, "attnfd": STAGES, "review_kd": STAGES}
    own = several.get(name, ["fpn.1"])  # of stride 16, as the ViT's
    assert [tap for tap in taps["student_taps"] if name != "sckd" or tap != "map.-1"] == own


@pytest.mark.parametrize("config", ["retinanet", "fcos", "atss"])
def test_crosskd_and_kd_with_heads_of_plain_boxes(record_of, teacher_of, config):
    names = {"fcos": "fcos_r50-caffe_fpn_gn-head_1x_coco"}
    teacher = teacher_of(names.get(config, f"{config}_r50_fpn_1x_coco"))
    record = record_of(*teacher, "distiller=crosskd+kd+customkd", student=(f"student=resnet18_{config}", *RESNET))
    assert {"reg_mid.4", "cls_mid.4", "cls.4", "fpn.4"} <= {*record["distiller"]["student_taps"]}


@pytest.mark.parametrize(
    ("distiller", "words"),
    [
        ("crosskd", "the head of test_vit.r160_in1k cannot be entered half-way"),
        ("kd", "has no taps 'cls.<i>', which detectors such as GFL have"),
        ("ld", "has no taps 'reg.<i>', which detectors such as GFL have"),
    ],
)
def test_an_encoder_cannot_teach_what_it_does_not_predict(refused, distiller, words):
    assert words in refused(*VIT, f"distiller={distiller}", base=(*FEW, *STUDENT))


def test_a_detector_teaches_at_the_size_of_the_images(refused, teacher_of):
    error = refused(*teacher_of(), "teacher.input_size=128", "distiller=pkd", base=(*FEW, *STUDENT))
    assert "input_size is not for a detector such as test_vit" in error
    assert "leave it null, and let data.resize set the size" in error


def test_ld_needs_distributions_on_both_sides(refused, teacher_of):
    student = ("student=resnet18_retinanet", *RESNET)
    error = refused(*teacher_of(), "distiller=ld", base=(*FEW, *student))
    assert "LD needs distributions of the four sides of a box, which the head of test_resnet" in error


def test_heads_of_one_and_of_nine_boxes_have_no_scores_in_common(refused, teacher_of):
    student = ("student=resnet18_retinanet", *RESNET)
    error = refused(*teacher_of(), "distiller=kd", base=(*FEW, *student))
    assert "retinanet_r50_fpn_1x_coco has 9 at a position" in error


@pytest.fixture(scope="module")
def teacher_of_three_classes(tmp_path_factory):
    path = tmp_path_factory.mktemp("other") / "other.pth"
    changes = {"neck": {"out_channels": 64}, "bbox_head": {"in_channels": 64, "feat_channels": 64, "stacked_convs": 2}}
    torch.save(MMDetModel("gfl_r50_fpn_1x_coco", 3, changes=changes).net.state_dict(), path)
    teacher = ("teacher=mmdet", "teacher.config=gfl_r50_fpn_1x_coco", f"teacher.checkpoint={path}")
    return (*teacher, "teacher.num_classes=3", NARROW.replace("student", "teacher"))


@pytest.mark.parametrize("distiller", ["kd", "crosskd", "kd+fitnet"])
def test_scores_of_other_classes_cannot_be_compared(refused, teacher_of_three_classes, distiller):
    error = refused(*teacher_of_three_classes, f"distiller={distiller}", base=(*FEW, *STUDENT))
    assert "the teacher detects 3 classes, the data has 10" in error


def test_boxes_and_maps_know_no_classes(record_of, teacher_of_three_classes):
    assert record_of(*teacher_of_three_classes, "distiller=ld+pkd")["teacher"]["metrics"] is None


@pytest.mark.parametrize("distiller", ["dkd", "kd+cirkd", "sckd:ifvd"])
def test_a_distiller_of_masks_is_refused(refused, teacher_of, distiller):
    error = refused(*teacher_of(), f"distiller={distiller}", base=(*FEW, *STUDENT))
    assert "is for segmentation: kdlvfm list distiller --task detection shows others" in error


def test_a_discriminator_judges_one_pair_of_maps(refused, teacher_of):
    error = refused(
        *teacher_of(),
        "distiller=pairwise",
        "distiller.adversarial_weight=0.1",
        "distiller.judged_student_tap=fpn.0",
        "distiller.judged_teacher_tap=fpn.0",
        base=(*FEW, *STUDENT),
    )
    assert "Pairwise trains its discriminator apart from the student" in error
