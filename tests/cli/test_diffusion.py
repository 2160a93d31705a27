# SPDX-License-Identifier: Apache-2.0
"""Diffusion from the command line: teacher, both methods without data, a resumption, and what does not go together."""

from __future__ import annotations

import hashlib
import json
import signal
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from kdlvfm.cli import main
from kdlvfm.distillers import DKDM

pytest.importorskip("diffusers")

STEPS, BATCH, T = 6, 4, 10
SMALL = (
    "experiment=dkdm",
    f"student.steps={T}",
    "task.sampling_steps=2",
    f"recipe.steps={STEPS}",
    f"recipe.batch_size={BATCH}",
    "recipe.warmup_steps=1",
    "run.checkpoint_every=2",
    "run.progress=line",
    "run.inference_seconds=null",
    "logger=none",
)


UNET = ("student.widths=[8]",)
DKDM_RUN = ("distiller=dkdm", "recipe.val_every=3", "recipe.selection=best_val")
DIT = ("student=diffusers_dit", "student.heads=2", "student.head_dim=4", "student.depth=1")


class Runs(NamedTuple):
    teacher: object
    dkdm: object


def options(teacher, *others):
    return (*SMALL, "teacher=from_run", f"teacher.run={teacher}", *others)


def train(*overrides):
    with pytest.raises(SystemExit) as ended:
        main(["train", *map(str, overrides)])
    return int(ended.value.code or 0)


def record_of(folder):
    return json.loads((folder / "record.json").read_text())


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher, and what learned from it by DKDM."""
    folder = tmp_path_factory.mktemp("diffusion")
    assert train(*SMALL, *UNET, "distiller=none", f"out={folder / 'teacher'}") == 0
    before = digest(folder / "teacher" / "student.safetensors")
    assert train(*options(folder / "teacher", *UNET, *DKDM_RUN), f"out={folder / 'dkdm'}") == 0
    assert digest(folder / "teacher" / "student.safetensors") == before
    return Runs(folder / "teacher", folder / "dkdm")


def test_a_record_says_what_was_reached_and_what_the_teacher_was_shown(runs):
    teacher, record = record_of(runs.teacher), record_of(runs.dkdm)
    assert record["status"] == "finished"
    distances = ["frechet_distance", "noise_error", "class_shift"]
    expected = {"name": "diffusion", "primary_metric": distances[0], "distances": distances, "has_loss": True}
    assert record["task"] == expected
    for split in ("val", "test"):
        assert set(record["metrics"][split]) == set(distances)
    assert record["teacher"]["metrics"] == teacher["metrics"]
    assert teacher["cost"]["teacher_images"] == 0
    size = round(0.4 * T) * BATCH
    filled = record["cost"]["teacher_images"] - STEPS * BATCH
    assert 0 < filled < size * T  # at most all states all the way
    assert record["student"]["macs"] > 1000
    assert record["data"]["counts"] == {"train": 1197, "val": 200, "test": 400}
    assert [set(point["terms"]) for point in record["diagnostics"]["points"]] == [{"student/dkdm"}]


def test_the_least_distance_is_the_best(runs):
    record = record_of(runs.dkdm)
    curve = {point["step"]: point["metrics"]["frechet_distance"] for point in record["curve"]}
    assert set(curve) == {3, STEPS}
    assert record["selected_step"] == min(curve, key=curve.get)
    assert record["metrics"]["val"]["frechet_distance"] == pytest.approx(min(curve.values()), rel=1e-6)


def test_a_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not(runs, tmp_path, monkeypatch, capsys):
    out, updates = tmp_path / "run", DKDM.updates

    def interrupted(self, step):
        if step.number == 3:
            signal.raise_signal(signal.SIGINT)
        return updates(self, step)

    chosen = options(runs.teacher, *UNET, *DKDM_RUN, f"out={out}")
    monkeypatch.setattr(DKDM, "updates", interrupted)
    assert train(*chosen) == 130
    assert record_of(out)["status"] == "interrupted"
    monkeypatch.undo()
    capsys.readouterr()
    assert train(*chosen) == 0
    printed = capsys.readouterr().out
    assert "step 5/6" in printed
    assert "step 4/6" not in printed
    assert digest(out / "student.safetensors") == digest(runs.dkdm / "student.safetensors")
    record, expected = record_of(out), record_of(runs.dkdm)
    assert record["metrics"] == expected["metrics"]
    assert record["cost"]["teacher_images"] == expected["cost"]["teacher_images"]
    states = [
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["distiller.pool._extra_state"]
        for folder in (out, runs.dkdm)
    ]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_a_transformer_learns_from_what_a_u_net_made_first(runs, tmp_path, kdlvfm):
    out = tmp_path / "run"
    ended = kdlvfm("train", *options(runs.teacher, "distiller=synthetic_set", "distiller.size=9", *DIT), f"out={out}")
    assert ended.code == 0, ended.err
    record = record_of(out)
    assert record["cost"]["teacher_images"] == 9 * T
    assert record["student"]["name"] == "dit-8x1"
    assert load_file(out / "student.safetensors")
    assert "frechet_distance" in ended.out
    assert "%" not in ended.out.partition("test  ")[2].partition("wrote")[0]


def test_it_is_measured_again(runs, kdlvfm):
    ended = kdlvfm("evaluate", runs.dkdm, "--split", "val")
    assert ended.code == 0, ended.err
    value = record_of(runs.dkdm)["metrics"]["val"]["noise_error"]
    (line,) = [line for line in ended.out.splitlines() if "noise_error" in line]
    assert line.split()[1:] == [f"{value:.4g}"] * 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data=camvid",), "data.size"),
        (("student=resnet18_fpn",), "SMPModel takes no 'steps'"),
        (("student.size=16",), "set student.size=8"),
        (("task.sampling_steps=11",), "from 2 to the 10 steps"),
        (("data.size=4",), "choose size >= 8"),
        (("student.betas=square",), "'linear' or 'cosine'"),
        (
            (
                "teacher@task.judge=timm",
                "task.judge.name=test_vit",
                "task.judge.pretrained=false",
                "task.judge_tap=map.0",
            ),
            "judge_tap",
        ),
        (("recipe=short",), "are not augmented"),
        (("distiller=kd", "teacher=digit_classifier"), "kd is for segmentation, detection"),
        (("distiller=dkdm", "teacher=digit_classifier"), "digit_classifier is no diffusion model"),
        (("distiller=dkdm", "teacher=from_run", "teacher.run=nowhere"), "is not a run"),
        (("distiller=dkdm",), "needs a teacher"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_end_with_one_line(overrides, message, refused):
    assert message in refused(*overrides, base=SMALL)


def test_a_student_of_other_noise_is_refused(runs, refused):
    line = refused("distiller=dkdm", f"student.steps={T + 1}", base=options(runs.teacher))
    assert f"in {T + 1} steps and the teacher for" in line


def test_segmentation_does_not_learn_from_digits(refused, small):
    kept = [option for option in small if not option.startswith("data")]
    assert "set task=diffusion" in refused("data=digits", "distiller=none", base=kept)


def test_a_segmenter_makes_no_images(refused):
    base = (
        "task=diffusion",
        "data=digits",
        "recipe=diffusion_digits",
        "student=resnet18_fpn",
        "student.pretrained=false",
    )
    assert "is no diffusion model: choose a student that is one" in refused("distiller=none", base=base)
