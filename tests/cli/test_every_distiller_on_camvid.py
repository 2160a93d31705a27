# SPDX-License-Identifier: Apache-2.0
"""Every distiller for segmentation trains on real road scenes: a ViT with a trained head teaches a ResNet18."""

import json
import os
from pathlib import Path

import pytest

from kdlvfm.cli import main
from kdlvfm.cli.config import options
from kdlvfm.cli.list import read_about

DATA = Path(os.environ.get("KDLVFM_DATA") or "no-data")
WEIGHTS = DATA / "weights" / "vit_tiny_patch16_224.safetensors"
SEGMENTERS = [name for name in options("distiller") if "segmentation" in read_about("distiller", name)["tasks"]]
IMAGES = {"train": 12, "val": 2, "test": 2}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.data,
    pytest.mark.skipif(
        not ((DATA / "camvid").is_dir() and WEIGHTS.is_file()), reason="KDLVFM_DATA has no CamVid and ViT-Ti"
    ),
]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The options of a run of two steps on a few images of CamVid."""
    root = tmp_path_factory.mktemp("camvid")
    for name in ("images", "labels", "meta.json"):
        (root / name).symlink_to(DATA / "camvid" / name)
    (root / "splits").mkdir()
    for split, count in IMAGES.items():
        names = (DATA / "camvid" / "splits" / f"{split}.txt").read_text(encoding="utf-8").split()
        chosen = names[:: len(names) // count][:count]
        (root / "splits" / f"{split}.txt").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return (
        "data=camvid",
        f"data.root={root}",
        "data.train_fraction=0.5",
        "recipe=short",
        "recipe.steps=2",
        "recipe.batch_size=4",
        "recipe.warmup_steps=0",
        "recipe.augmentation.crop=[96,128]",
        "run.num_workers=0",
        "run.progress=none",
        "run.inference_seconds=null",
        "logger=none",
    )


@pytest.fixture(scope="module")
def teacher(few, tmp_path_factory):
    """A run of the real ViT with a linear head."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    encoder = (
        "student=head",
        "teacher@student.encoder=timm",
        "student.encoder.name=vit_tiny_patch16_224",
        f"student.encoder.checkpoint={WEIGHTS}",
        "student.encoder.model_kwargs.num_classes=200",
    )
    with pytest.raises(SystemExit) as ended:
        main(["train", *few, *encoder, "distiller=none", f"out={folder}"])
    assert not ended.value.code
    return ("teacher=from_run", f"teacher.run={folder}")


@pytest.mark.parametrize("name", SEGMENTERS)
def test_trains(kdlvfm, few, teacher, student_of, tmp_path, name):
    ended = kdlvfm("train", *few, *teacher, *student_of(name), f"distiller={name}", f"out={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
    record = json.loads((tmp_path / "run" / "record.json").read_text(encoding="utf-8"))
    assert record["status"] == "finished"
    assert record["data"]["name"] == "CamVid"
    assert (record["teacher"] is None) == (name == "none")
