# SPDX-License-Identifier: Apache-2.0
"""The demos: what they compare is fair, what is missing is named, and they end with a table and a picture."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from kdlvfm.cli import demo
from kdlvfm.cli.config import compose
from kdlvfm.reporting.record import recipe_hash

CHECKOUT = Path(__file__).parents[2]
FEW = {
    "segmentation": ("data.labelled=8", "data.unlabelled=8", "data.labelled_per_batch=1"),
    "detection": ("data.train=8", "data.size=72"),  # which is padded
}
SHORT = ("data.val=2", "data.test=4", "recipe.steps=3", "recipe.batch_size=2", "recipe.warmup_steps=1", "logger=none")


@pytest.mark.parametrize("task", demo.DEMOS)
def test_all_methods_of_a_demo_have_one_recipe_and_the_packages_teacher(task):
    chosen = demo.DEMOS[task]
    configs = {
        method: compose([f"experiment={chosen.experiment}", f"distiller={method}", *overrides])
        for method, overrides in chosen.methods.items()
    }
    assert len({recipe_hash(config) for config in configs.values()}) == 1
    assert {config["choices"]["task"] for config in configs.values()} == {task}
    assert configs.pop("none")["teacher"] is None
    assert len(configs) == 3
    assert all(config["teacher"]["pretrained"] for config in configs.values())
    assert not configs["ld" if task == "detection" else "kd"]["student"].get("pretrained", False)


def test_help_names_the_tasks_and_their_methods(kdlvfm):
    ended = kdlvfm("demo", "--help")
    assert "--task {segmentation,detection}" in ended.out
    assert "segmentation: kd, fitnet, cwd" in " ".join(ended.out.split())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--task", "boxes"), 2, "invalid choice: 'boxes'"),
        (("--seeds", "0"), 1, "--seeds and --jobs must be at least 1"),
        (("--jobs", "0"), 1, "--seeds and --jobs must be at least 1"),
    ],
)
def test_bad_calls(arguments, code, message, kdlvfm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = kdlvfm("demo", *arguments)
    assert ended.code == code
    assert message in ended.err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("library", ["mmdet", "faster_coco_eval"])
def test_without_mmdet_one_line_says_what_to_install(library, kdlvfm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = importlib.util.find_spec
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == library else there(name))
    ended = kdlvfm("demo", "--task", "detection")
    assert ended.code == 1
    assert ended.err == f"kdlvfm demo: error: {library} is not installed: pip install 'kdlvfm[mmdet]'\n"
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (("demo",), "kdlvfm demo --task segmentation --seeds 1"),
        (("demo", "SEEDS=3"), "kdlvfm demo --task segmentation --seeds 3"),
        (("demo", "TASK=detection"), "kdlvfm demo --task detection --seeds 1"),
        (("teacher",), "kdlvfm train experiment=digit_scenes_teacher\n"),
        (("teacher", "TASK=detection"), "kdlvfm train experiment=digit_scenes_teacher_detection\n"),
    ],
)
def test_make_installs_what_is_needed_and_calls_the_command(arguments, command):
    planned = subprocess.run(
        # As on a machine where nothing is installed.
        ["make", "--dry-run", "--always-make", *arguments],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert command in planned
    assert (".[mmdet]" in planned) == ("TASK=detection" in arguments)


@pytest.mark.slow
@pytest.mark.parametrize("task", demo.DEMOS)
def test_a_demo_ends_with_a_table_and_a_picture_and_reuses_what_is_finished(task, kdlvfm, tmp_path, monkeypatch):
    if task == "detection":
        pytest.importorskip("mmdet")
    methods = {
        method: (*overrides, *FEW[task], *SHORT) for method, overrides in [*demo.DEMOS[task].methods.items()][:2]
    }
    monkeypatch.setitem(demo.DEMOS, task, demo.Demo(demo.DEMOS[task].experiment, methods))
    out = tmp_path / "demo"
    for _ in range(2):
        ended = kdlvfm("demo", "--task", task, "--out", out, "--jobs", 2)
        assert ended.code == 0, ended.err
        assert "2 done of 2 cells" in ended.out
        assert (
            f"wrote  {out}/: a record.json for each run, table.md, table.csv, table.tex, figure.svg, predictions.png"
            in ended.out
        )
        assert (out / "predictions.png").stat().st_size > 10_000
        for method in methods:
            assert f"| {'baseline' if method == 'none' else method} |" in (out / "table.md").read_text()
    assert "seed 0: done" not in ended.out  # the second call computed nothing
    assert f"next   make demo{' TASK=detection' if task == 'detection' else ''} SEEDS=3" in ended.out
