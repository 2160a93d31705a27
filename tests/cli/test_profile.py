# SPDX-License-Identifier: Apache-2.0

import json

import pytest

from kdlvfm.cli.profile import verdict
from kdlvfm.training.step_profile import PARTS

SPEED = {"step": 100.0, "loader": 50.0}


def test_parts_add_up_and_nothing_is_left_behind(kdlvfm, small, vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = kdlvfm(
        "profile", *small, *vit, "distiller=fitnet", "recipe.steps=8", "--steps", 3, "--warmup", 1, "--json", "p.json"
    )
    assert ended.code == 0, ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["steps"] == 3
    assert set(found["seconds"]) == set(PARTS)
    assert sum(found["seconds"].values()) == pytest.approx(found["step_seconds"])
    assert all(found["seconds"][part] > 0 for part in PARTS)
    assert found["hardware"]["cpu"]
    assert found["config"]["choices"]["distiller"] == "fitnet"
    for part in (*PARTS, "all", "bottleneck", "wrote  p.json", "next "):
        assert part in ended.out


def test_a_method_with_several_updates(kdlvfm, small, vit):
    judged = ("distiller=pairwise", "distiller.adversarial_weight=0.1", "distiller.judged_teacher_tap=map.-1")
    ended = kdlvfm("profile", *small, *vit, *judged, "recipe.steps=8", "--steps", 1, "--warmup", 0)
    assert ended.code == 0, ended.err
    assert "mean of 1 steps of 4 images on cpu" in ended.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--warmup", "-1"], "--warmup at least 0"),
        (["--json", "nowhere/step.json"], "name a file in a folder that exists"),
        (["out=runs/x"], "keeps nothing of its steps"),
        (["recipe.steps=5"], "need 24"),
        (["distiller=cwdd"], "no distiller called 'cwdd'"),
    ],
)
def test_bad_calls_end_in_one_line(arguments, message, kdlvfm, small):
    ended = kdlvfm("profile", *small, *arguments)
    assert ended.code == 1
    assert ended.err.startswith("kdlvfm profile: error: ")
    assert ended.err.count("\n") == 1
    assert message in ended.err


@pytest.mark.parametrize(
    ("slow", "cached", "bottleneck", "advice"),
    [
        ("data", False, "the loader: 73 % of a step", "run.num_workers=4"),
        ("teacher", False, "the teacher: 73 % of a step", "teacher_cache=build"),
        ("teacher", True, "the teacher: 73 % of a step", "teacher_cache.dtype=int8"),
        ("backward", False, "the backward pass: 73 %", "bf16-mixed"),
    ],
)
def test_the_verdict(slow, cached, bottleneck, advice):
    seconds = {**dict.fromkeys(PARTS, 0.0), "student": 0.3, slow: 0.8}
    found = verdict(seconds, SPEED, cached, num_workers=0)
    assert found["bottleneck"].startswith(bottleneck)
    assert advice in found["advice"]


def test_a_short_wait_for_data_is_no_bottleneck():
    seconds = {**dict.fromkeys(PARTS, 0.0), "data": 0.09, "student": 0.91}
    assert "student" in verdict(seconds, SPEED, False, 0)["bottleneck"]
