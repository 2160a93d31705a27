# SPDX-License-Identifier: Apache-2.0
"""A choice of the user's own is free of what an experiment says of the choice that it replaces."""

import shutil

import pytest

import kdlvfm.cli.config
from kdlvfm.cli import CommandError
from kdlvfm.cli.config import compose
from kdlvfm.reporting.record import config_hash


def without_experiment(group, *overrides):
    return compose([*overrides, "distiller=fitnet"])[group]


@pytest.mark.parametrize(
    ("experiment", "teacher"),
    [
        ("alignment", ["teacher=dinov3_vits16"]),
        ("camvid", ["teacher=dinov3_vits16", "teacher.precision=bf16"]),
        ("camvid", ["teacher=timm", "teacher.name=vit_tiny_patch16_224", "teacher.model_kwargs.num_classes=200"]),
        ("bccd", ["teacher=timm", "teacher.name=vit_tiny_patch16_224"]),
        ("demo", ["teacher=ensemble", "teacher@teacher.members.dino=dinov3_vits16"]),
    ],
)
def test_another_teacher_is_the_one_that_its_own_file_describes(experiment, teacher):
    config = compose([f"experiment={experiment}", "distiller=fitnet", *teacher])
    assert config["teacher"] == without_experiment("teacher", *teacher)
    assert config["choices"]["teacher"] == teacher[0].partition("=")[2]


def test_another_student_keeps_what_its_file_names():
    config = compose(["experiment=camvid", "student=resnet18_deeplabv3plus", "distiller=none"])
    assert config["student"]["pretrained"] is False
    assert "decoder_kwargs" not in config["student"]
    own = compose(["experiment=camvid", "student=resnet18_unet", "student.decoder_kwargs={a: 1}", "distiller=none"])
    assert own["student"]["decoder_kwargs"] == {"a": 1}


def test_what_the_user_takes_out_stays_out():
    config = compose(["experiment=camvid", "student=resnet18_deeplabv3plus", "~student.pretrained", "distiller=none"])
    assert "pretrained" not in config["student"]


def test_what_another_choice_needs_is_asked_for():
    with pytest.raises(CommandError, match=r"these need a value: teacher\.name=\.\.\."):
        compose(["experiment=camvid", "teacher=timm", "distiller=fitnet"])


def test_other_data_loses_what_only_the_first_takes():
    config = compose(["experiment=demo", "data=camvid", "distiller=none"])
    assert set(config["data"]) == set(without_experiment("data", "data=camvid"))
    assert "labelled" in compose(["experiment=demo", "distiller=none"])["data"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=alignment", "distiller=fitnet"],
        ["experiment=camvid", "distiller=kd", "teacher=from_run"],
        ["experiment=zoo_smoke", "distiller=kd"],
    ],
)
def test_its_own_choices_keep_their_values(overrides):
    config = compose(overrides)
    named = {"alignment": ("name", "vit_tiny_patch16_224.augreg_in21k"), "camvid": ("run", "runs/camvid_teacher")}
    for key, value in [named[name] for name in named if f"experiment={name}" in overrides]:
        assert config["teacher"][key] == value
    assert config["student"]["decoder_kwargs"]["decoder_pyramid_channels"] == 64


def test_what_was_taken_out_by_hand_is_the_same_run():
    overrides = ["experiment=camvid", "distiller=fitnet", "teacher=timm", "teacher.name=vit_tiny_patch16_224"]
    assert config_hash(compose(overrides)) == config_hash(compose([*overrides, "~teacher.run"]))


def test_what_an_experiment_says_of_every_choice_stays(tmp_path, monkeypatch):
    configs = tmp_path / "configs"
    shutil.copytree(kdlvfm.cli.config.config_dir(), configs)
    (configs / "experiment" / "mine.yaml").write_text("# @package _global_\ndistiller:\n  loss_weight: 3.0\n")
    monkeypatch.setattr(kdlvfm.cli.config, "config_dir", lambda: configs)
    assert compose(["experiment=mine", "distiller=kd", "teacher=dinov3_vits16"])["distiller"]["loss_weight"] == 3.0
