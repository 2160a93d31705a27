# SPDX-License-Identifier: Apache-2.0
"""Options of teacher and student in whole runs: what they change, and what refuses them."""

import json

import pytest
import torch
from safetensors.torch import load_file

from kdlvfm.training.step_profile import PARTS

ALL = (
    "teacher.precision=bf16",
    "teacher.channels_last=true",
    "teacher.compile=true",
    "teacher.batch=3",
    "run.teacher_device=cpu",
    "trainer.channels_last=true",
    "trainer.compile=true",
)


@pytest.mark.usefixtures("traced")
def test_a_run_with_all_of_them_is_almost_that_without(train, vit, tmp_path):
    records, weights = {}, {}
    for name, options in (("plain", ()), ("cheap", ALL)):
        ended = train(*vit, "distiller=fitnet", f"out={tmp_path / name}", *options)
        assert ended.code == 0, ended.err
        records[name] = json.loads((tmp_path / name / "record.json").read_text())
        weights[name] = load_file(tmp_path / name / "student.safetensors")
    assert list(weights["plain"]) == list(weights["cheap"])
    for name, value in weights["plain"].items():
        torch.testing.assert_close(weights["cheap"][name], value, rtol=0.05, atol=0.05)
    plain, cheap = records["plain"], records["cheap"]
    assert plain["config_hash"] != cheap["config_hash"]
    assert plain["recipe_hash"] != cheap["recipe_hash"]
    assert 0 < cheap["cost"]["teacher_share"] < 1
    assert cheap["cost"]["teacher_images"] == plain["cost"]["teacher_images"]
    assert cheap["diagnostics"]["points"][0]["terms"].keys() == plain["diagnostics"]["points"][0]["terms"].keys()


@pytest.mark.usefixtures("traced")
def test_the_parts_of_a_step_are_those_of_every_run(kdlvfm, small, vit, tmp_path):
    path = tmp_path / "step.json"
    ended = kdlvfm("profile", *small, *vit, "distiller=fitnet", *ALL, "--steps", 2, "--warmup", 2, "--json", path)
    assert ended.code == 0, ended.err
    found = json.loads(path.read_text())
    assert sum(found["seconds"].values()) == pytest.approx(found["step_seconds"])
    assert all(found["seconds"][part] > 0 for part in PARTS)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.precision=fp8"], "a teacher's precision must be bf16, fp16, fp32 or null, not 'fp8'"),
        (["teacher.precision=fp16"], "teacher.precision=fp16 needs a GPU"),
        (["teacher.batch=0"], "a teacher's batch must be a whole number from 1 on"),
        (["teacher.device=cuda:1"], "set run.teacher_device, not teacher.device"),
        (["run.teacher_device=cuda:99"], "the teacher cannot be on cuda:99"),
        (["trainer.compile=maybe"], "trainer.compile must be true or false"),
        (["distiller=data_free:fitnet", "teacher.batch=2"], "reaches into the teacher's network"),
    ],
)
def test_what_cannot_be_is_told_before_training(refused, vit, overrides, message):
    assert message in refused(*vit, "distiller=fitnet", *overrides)


def test_a_member_of_an_ensemble_has_options_of_its_own(train, tmp_path):
    members = [f"teacher.members.{name}.{key}" for name in ("a", "b") for key in ("name=test_vit", "pretrained=false")]
    choice = ("teacher=ensemble", "teacher@teacher.members.a=timm", "teacher@teacher.members.b=timm", *members)
    options = ("teacher.members.a.precision=bf16", "teacher.members.b.batch=1")
    ended = train(*choice, *options, "distiller=fitnet", "distiller.teacher_tap=a/map.-1", f"out={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
