# SPDX-License-Identifier: Apache-2.0
"""Detection from the command line: a run, its record, its evaluation and its table; and what does not go together."""

from __future__ import annotations

import json
import sys

import pytest
import torch

DATA = (
    "task=detection",
    "data=digit_scenes_boxes",
    "data.size=64",
    "data.train=8",
    "data.val=3",
    "data.test=3",
    "data.eval_batch_size=2",
)
RECIPE = (
    "recipe=short_detection",
    "recipe.steps=4",
    "recipe.batch_size=2",
    "recipe.warmup_steps=1",
    "recipe.val_every=2",
    "run.num_workers=0",
    "run.checkpoint_every=2",
    "run.progress=line",
    "run.inference_seconds=null",
    "logger=none",
)
STUDENT = ("student=resnet18_gfl", "student.encoder.name=test_resnet", "student.encoder.pretrained=false")
SEGMENTER = ("student=timm_linear", "student.encoder.name=test_resnet", "student.encoder.pretrained=false")
METRICS = {"mAP", "AP50", "AP75", "APs", "APm", "APl", "AP"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of a small GFL."""
    pytest.importorskip("mmdet")
    from kdlvfm.cli import main

    folder = tmp_path_factory.mktemp("detection") / "run"
    with pytest.raises(SystemExit) as ended:
        main(["train", *DATA, *RECIPE, *STUDENT, f"out={folder}"])
    assert not ended.value.code
    return folder


def test_a_run_leaves_a_record_with_average_precision(finished):
    record = json.loads((finished / "record.json").read_text())
    assert record["status"] == "finished"
    assert record["task"] == {"name": "detection", "primary_metric": "mAP", "distances": [], "has_loss": True}
    assert record["per_image"] is None
    assert record["data"]["classes"] == list("0123456789")
    assert record["data"]["counts"] == {"train": 8, "val": 3, "test": 3}
    assert record["student"]["input_size"] == [64, 64]
    assert record["student"]["macs"] > 1e6
    assert [point["step"] for point in record["curve"]] == [2, 4]
    for split in ("val", "test"):
        metrics = record["metrics"][split]
        assert metrics.keys() <= METRICS
        assert metrics.keys() >= {"mAP", "AP50", "AP"}
        assert metrics["AP"].keys() == set("0123456789")
        known = [value for value in metrics["AP"].values() if value is not None]
        assert sum(known) / len(known) == pytest.approx(metrics["mAP"], abs=1e-6)
    assert record["versions"].keys() & {"mmdet", "onedl-mmdetection"}


def test_evaluate_finds_the_same_and_table_shows_it(finished, kdlvfm):
    ended = kdlvfm("evaluate", finished, "--device", "cpu")
    assert ended.code == 0
    rows = [line.split() for line in ended.out.splitlines()]
    (row,) = [row for row in rows if row[:1] == ["mAP"]]
    assert row[1] == row[2]
    assert any(row[:2] == ["AP", "7"] for row in rows)
    shown = kdlvfm("table", finished, "--format", "markdown")
    assert shown.code == 0
    assert "| mAP<br>% |" in shown.out
    assert kdlvfm("table", finished, "--metric", "AP50").code == 0
    missing = kdlvfm("table", finished, "--metric", "miou")
    assert missing.code == 1
    assert "test/AP50" in missing.err
    assert "test/AP," not in missing.err


def test_an_interrupted_run_goes_on_exactly(finished, tmp_path, kdlvfm, monkeypatch):
    from kdlvfm.training.callbacks import Checkpointer

    before = Checkpointer.on_train_batch_end

    def stop(self, trainer, pl_module, outputs, batch, batch_idx):
        self.interrupted |= batch_idx == 2
        before(self, trainer, pl_module, outputs, batch, batch_idx)

    command = ("train", *DATA, *RECIPE, *STUDENT, f"out={tmp_path / 'run'}")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "on_train_batch_end", stop)
        assert kdlvfm(*command).code == 130
    assert kdlvfm(*command).code == 0
    from safetensors.torch import load_file

    whole, resumed = (load_file(folder / "student.safetensors") for folder in (finished, tmp_path / "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_detection_learns_from_boxes_only(refused):
    error = refused(base=(*RECIPE, *SEGMENTER, "task=detection", "data=digit_scenes", "recipe=digit_scenes"))
    assert "DigitScenes has masks and this task learns from boxes: set task=segmentation" in error


def test_segmentation_learns_from_masks_only(refused):
    error = refused("task=segmentation", base=(*DATA, *RECIPE, *SEGMENTER))
    assert "DigitScenes boxes has boxes and this task learns from masks: set task=detection" in error


def test_a_recipe_for_masks_does_not_serve_boxes(refused):
    error = refused("recipe=cirkd_40k", base=(*DATA, *RECIPE, *SEGMENTER))
    assert "recipe.augmentation is not made for boxes: choose a recipe for detection, such as 1x" in error


def test_a_recipe_for_boxes_does_not_serve_masks(refused):
    assert "recipe.augmentation is not made for masks" in refused("recipe=1x")


def test_a_student_for_masks_is_no_detector(refused):
    error = refused(base=(*DATA, *RECIPE, *SEGMENTER))
    assert "is no detector: choose one, for example student=resnet18_gfl" in error


def test_a_wrong_root_says_where_files_are_expected(refused, tmp_path):
    error = refused("data=bccd", f"data.root={tmp_path}", base=("task=detection", *RECIPE, *SEGMENTER))
    assert "BCCD needs 1 files that are missing" in error
    assert "annotations/train.json, annotations/val.json, annotations/test.json and images in images" in error


def test_without_the_extra_its_name_is_given(refused, monkeypatch):
    import kdlvfm.tasks

    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    monkeypatch.delitem(sys.modules, "kdlvfm.tasks.detection", raising=False)
    monkeypatch.delattr(kdlvfm.tasks, "detection", raising=False)
    error = refused(base=(*DATA, *RECIPE, *STUDENT))
    assert "faster_coco_eval is not installed: pip install 'kdlvfm[mmdet]'" in error
