# SPDX-License-Identifier: Apache-2.0
"""Every distiller there is a YAML for trains from the command line, with the package's own ViT as teacher."""

import json

import pytest

from kdlvfm.cli.config import options

FEW = (
    "data=digit_scenes",
    "data.labelled=6",
    "data.unlabelled=6",
    "data.val=2",
    "data.test=2",
    "recipe=digit_scenes",
    "recipe.steps=2",
    "recipe.batch_size=6",
    "recipe.warmup_steps=0",
    "run.num_workers=0",
    "run.progress=none",
    "logger=none",
    "teacher=digit_scenes_vit",
    "student=resnet18_fpn",
    "student.pretrained=false",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", options("distiller"))
def test_trains(kdlvfm, tmp_path, name):
    ended = kdlvfm("train", *FEW, f"distiller={name}", f"out={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
    record = json.loads((tmp_path / "run" / "record.json").read_text(encoding="utf-8"))
    assert record["status"] == "finished"
    assert (record["teacher"] is None) == (name == "none")
    assert bool(record["distiller"]["teacher_taps"]) == (name != "none")
