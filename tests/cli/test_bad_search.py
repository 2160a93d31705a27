# SPDX-License-Identifier: Apache-2.0
"""Each mistake in a search ends with one line, before any trial."""

import sys

import pytest

pytest.importorskip("optuna")

RANGE = "recipe.optimizer.lr=1e-4..1e-2:log"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("recipe.optimizr.lr=1e-4..1e-2",), "has no recipe.optimizr.lr. Did you mean recipe.optimizer.lr"),
        (("recipe.stpes=1..9",), "has no recipe.stpes. Did you mean recipe.steps"),
        (("distillr.loss_weight=1..9",), "has no distillr.loss_weight. Did you mean distiller.loss_weight"),
        (("distiller=none,cdw",), "there is no distiller called 'cdw'. Did you mean cwd"),
        (("run.threads=1..9",), "run.threads changes no result"),
        (("recipe.batch_size=0..8",), "recipe.batch_size must be a whole number from 1 on, not 0"),
        (("recipe.steps=4.0..8.0",), "recipe.steps must be a whole number"),
        (("distiller.loss_weigth=0.1..1",), "'loss_weigth'. Did you mean loss_weight?"),
        (("student.encoder.nam=test_resnet,test_vit",), "'nam'. Did you mean name?"),
        ((RANGE, "student.encoder.checkpoint=nowhere.pt"), "nowhere.pt does not exist"),
        ((), "nothing varies"),
        ((RANGE, "--trials", "0"), "--trials and --jobs must be at least 1"),
        ((RANGE, "--split", "test"), "What is chosen on the test split has no test left"),
        ((RANGE, "--metric", "test/miou"), "What is chosen on the test split has no test left"),
        ((RANGE, "--study", "runs/tune.txt"), "it is FILE.db (SQLite) or FILE.journal"),
        ((RANGE, "launcher.jobs=2"), "leave launcher.jobs out"),
        ((RANGE, "launcher.retry=true"), "leave launcher.retry out"),
        ((RANGE, "launcher=slurm", "launcher.wait=false"), "leave launcher.wait out"),
        ((RANGE, "launcher=slrum"), "Did you mean slurm"),
    ],
)
def test_what_does_not_fit_is_one_line_before_anything_starts(
    overrides, said, kdlvfm, small, vit, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    ended = kdlvfm("tune", *small, "distiller=fitnet", *vit, *overrides)
    assert ended.code == 1
    assert said in ended.err
    assert ended.err.count("\n") == 1
    assert not [*tmp_path.iterdir()]


def test_data_without_a_validation_split(kdlvfm, small, monkeypatch, tmp_path):
    from kdlvfm.data.digit_scenes import DigitScenes

    monkeypatch.setattr(DigitScenes, "splits", ("train", "test"))
    ended = kdlvfm("tune", *small, "distiller=none", RANGE, "--study", tmp_path / "tune.db")
    assert (ended.code, ended.err) == (
        1,
        "kdlvfm tune: error: digit_scenes has no validation split, and a search needs one.\n",
    )


def test_without_optuna_the_extra_is_named(kdlvfm, small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "kdlvfm.cli.study", raising=False)
    ended = kdlvfm("tune", *small, "distiller=none", RANGE, "--study", tmp_path / "tune.db")
    assert (ended.code, ended.err) == (
        1,
        "kdlvfm tune: error: optuna is not installed: pip install 'kdlvfm[tune]'\n",
    )
