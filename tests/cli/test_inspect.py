# SPDX-License-Identifier: Apache-2.0

import pytest

from kdlvfm.cli.config import options
from kdlvfm.cli.inspect import pairs
from kdlvfm.core import TapInfo

# What needs a further word, such as the name of a network or a folder.
UNSETTLED = ("none", "timm", "from_run", "ensemble", "mmdet", "mmdet_timm", "smp", "timm_linear", "diffusers")
TEACHERS = [name for name in options("teacher") if name not in UNSETTLED]
STUDENTS = [name for name in options("student") if name not in UNSETTLED]
ENCODERS = ("resnet18",)  # without a head
NO_MAPS = ("clip_zeroshot_vitb16", "digit_classifier")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("teacher", [name for name in TEACHERS if name not in NO_MAPS])
def test_every_teacher_without_weights_or_memory(teacher, kdlvfm, monkeypatch):
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ended = kdlvfm("inspect", f"teacher={teacher}", "student=resnet18_linear")
    assert ended.code == 0, ended.err
    assert "pairs by stride" in ended.out
    assert "distiller.teacher_tap=map." in ended.out
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    assert grown < 1000, f"{grown:.0f} MiB; the largest teacher has 27 000 MiB of weights"


@pytest.mark.slow
def test_a_zero_shot_teacher_too(kdlvfm):
    ended = kdlvfm("inspect", "teacher=clip_zeroshot_vitb16", "student=resnet18_linear")
    assert ended.code == 0, ended.err
    assert "logits" in ended.out


@pytest.mark.parametrize("student", STUDENTS)
def test_every_student(student, kdlvfm):
    ended = kdlvfm("inspect", f"student={student}", *(("data=digits",) if student.startswith("diffusers") else ()))
    assert ended.code == 0, ended.err
    assert sum(tap in ended.out for tap in ("logits", "fpn.0", "noise")) == (student not in ENCODERS)


def test_a_teacher_without_maps(kdlvfm):
    ended = kdlvfm("inspect", "teacher=digit_classifier", "student=resnet18_linear")
    assert ended.code == 0, ended.err
    assert "no maps to pair" in ended.out


def test_several_teachers(kdlvfm):
    members = [f"teacher@teacher.members.{name}" for name in ("dino=dinov3_vits16", "sam=sam2_hiera_tiny")]
    ended = kdlvfm("inspect", "teacher=ensemble", *members, "student=resnet18_linear")
    assert ended.code == 0, ended.err
    assert "vit_small_patch16_dinov3.lvd1689m + sam2_hiera_tiny" in ended.out
    assert ended.out.count("dino/map.11") > 1
    assert "sam/map.3" in ended.out
    assert "distiller.teacher_tap=sam/map.3" in ended.out


def test_the_teacher_of_a_run(kdlvfm, head):
    ended = kdlvfm("inspect", "teacher=from_run", f"teacher.run={head}", "student=resnet18_linear")
    assert ended.code == 0, ended.err
    assert "test_vit" in ended.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["teacher=dino"], "no teacher called 'dino'"),
        (["teacher=timm"], "teacher.name=..."),
        (["teacher=ensemble"], "an ensemble needs members"),
        (["teacher=ensemble", "teacher@teacher.members.a=none"], "teacher.members.a is no teacher"),
        (["teacher=ensemble", "teacher@teacher.members.a=dinov4"], "no teacher called 'dinov4'"),
        (["teacher=ensemble", "teacher@teacher.members.a=dinov3_vits16", "teacher.norm=1"], "takes no 'norm'"),
        (["teacher=timm", "teacher.name=resnet81"], "no model 'resnet81'"),
    ],
)
def test_what_cannot_be_inspected(arguments, message, kdlvfm):
    ended = kdlvfm("inspect", *arguments)
    assert ended.code == 1
    assert ended.err.count("\n") == 1
    assert message in ended.err


def test_pairs_are_nearest_in_the_ratio_of_strides_and_the_deepest_of_equals():
    student = {"map.0": TapInfo(8, 4), "map.1": TapInfo(8, 8), "map.2": TapInfo(8, 32), "pooled": TapInfo(8, None)}
    hierarchical = {"map.0": TapInfo(9, 4), "map.1": TapInfo(9, 16), "map.2": TapInfo(9, 16), "tokens": TapInfo(9, 16)}
    assert pairs(student, hierarchical) == [("map.0", "map.0"), ("map.1", "map.2"), ("map.2", "map.2")]


def test_levels_of_a_detector_pair_with_levels_where_there_are_any():
    student = {"map.0": TapInfo(8, 4), "fpn.0": TapInfo(8, 8), "fpn.1": TapInfo(8, 16)}
    encoder = {"map.0": TapInfo(9, 4), "map.1": TapInfo(9, 16)}
    detector = {**encoder, "fpn.0": TapInfo(9, 8), "fpn.1": TapInfo(9, 32)}
    assert pairs(student, encoder) == [("map.0", "map.0"), ("fpn.0", "map.1"), ("fpn.1", "map.1")]
    assert pairs(student, detector) == [("map.0", "map.0"), ("fpn.0", "fpn.0"), ("fpn.1", "fpn.1")]
