# SPDX-License-Identifier: Apache-2.0
"""Every distiller for segmentation trains from the command line, with the package's own ViT as teacher."""

import json

import pytest

from kdlvfm.cli.config import options
from kdlvfm.cli.list import read_about

SEGMENTERS = [name for name in options("distiller") if "segmentation" in read_about("distiller", name).get("tasks", ())]

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
)
STUDENT = ("student=resnet18_fpn", "student.pretrained=false")
# A method that is for students of one kind only.
STUDENTS = {
    "deit": (
        "student=timm_linear",
        "student.encoder.name=deit_tiny_distilled_patch16_224",
        "student.encoder.pretrained=false",
        "student.encoder.model_kwargs.depth=2",
        "student.encoder.model_kwargs.num_classes=11",
    )
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SEGMENTERS)
def test_trains(kdlvfm, tmp_path, name):
    ended = kdlvfm("train", *FEW, *STUDENTS.get(name, STUDENT), f"distiller={name}", f"out={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
    record = json.loads((tmp_path / "run" / "record.json").read_text(encoding="utf-8"))
    assert record["status"] == "finished"
    assert (record["teacher"] is None) == (name == "none")
    assert bool(record["distiller"]["teacher_taps"]) == (name != "none")
