# SPDX-License-Identifier: Apache-2.0
"""CamVid: both layouts on stand-ins, and the real files where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from kdlvfm.data.base import DataError
from kdlvfm.data.camvid import CamVid

CONFIGS = Path(__file__).parents[2] / "configs"
COUNTS = {"train": 16, "val": 3, "test": 2}


def stand_in(root, layout):
    """A small CamVid: 12x16 pixels, 21 images."""
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        if layout == "segnet":
            images, masks, names, suffix = root / split, root / f"{split}annot", root / f"{split}.txt", "png"
        else:
            images, masks, names = root / "images" / split, root / "labels" / split, root / "splits" / f"{split}.txt"
            suffix = "jpg"
        for folder in (images, masks, names.parent):
            folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(images / f"{split}_{i:02}.{suffix}")
            Image.fromarray(rng.integers(0, 12, (12, 16), dtype=np.uint8)).save(masks / f"{split}_{i:02}.png")
            path = f"/SegNet/CamVid/{split}/{split}_{i:02}.png /SegNet/CamVid/{split}annot/{split}_{i:02}.png"
            lines.append(path if layout == "segnet" else f"{split}_{i:02}")
        names.write_text("\n".join(lines) + "\n")
    return root


def camvid(root, **changes):
    return CamVid(root, **{"batch_size": 4, "steps": 3, **changes})


@pytest.mark.parametrize("layout", ["segnet", "own"])
def test_both_layouts_are_read(tmp_path, layout):
    data = camvid(stand_in(tmp_path, layout))
    data.check()
    assert data.counts() == {"train": 16, "labelled": 16, "unlabelled": 0, "val": 3, "test": 2}
    _, mask = data.samples("val")[1]
    file = tmp_path / ("valannot" if layout == "segnet" else "labels/val") / "val_01.png"
    raw = np.array(Image.open(file)).astype(np.int64)
    assert np.array_equal(mask.numpy(), np.where(raw == 11, 255, raw))


@pytest.mark.parametrize(
    ("fraction", "kept"), [(1.0, range(16)), (0.5, range(0, 16, 2)), (0.125, (0, 8)), (0.01, (0,))]
)
def test_a_fraction_keeps_evenly_spaced_masks(tmp_path, fraction, kept):
    whole = camvid(stand_in(tmp_path, "own"))
    data = camvid(tmp_path, train_fraction=fraction)
    data.check()
    assert [pair.image.stem for pair in data.pairs("train")] == [f"train_{i:02}" for i in kept]
    assert data.num_labelled + data.num_unlabelled == data.num_samples == 16
    names = {pair.image for part in ("train", "unlabelled") for pair in data.pairs(part)}
    assert names == {pair.image for pair in whole.pairs("train")}
    assert all(pair.mask is None for pair in data.pairs("unlabelled"))
    assert (data.split_hash() == whole.split_hash()) == (fraction == 1.0)


def test_a_missing_file_is_named(tmp_path):
    stand_in(tmp_path, "segnet")
    (tmp_path / "trainannot" / "train_05.png").unlink()
    with pytest.raises(DataError, match=r"train\.txt lists train_05, but .*trainannot/train_05\.png is missing"):
        camvid(tmp_path).check()


def test_missing_data_set_says_how_to_get_it(tmp_path):
    with pytest.raises(DataError, match="kdlvfm download camvid"):
        camvid(tmp_path / "none").check()


@pytest.mark.parametrize("fraction", [0.0, 1.5, -1.0])
def test_fraction_out_of_range_is_refused(tmp_path, fraction):
    with pytest.raises(DataError, match="train_fraction"):
        camvid(tmp_path, train_fraction=fraction)


def test_the_configuration_builds_it(tmp_path, monkeypatch):
    stand_in(tmp_path / "camvid", "own")
    monkeypatch.setenv("KDLVFM_DATA", str(tmp_path))
    config = OmegaConf.create(
        {
            "data": OmegaConf.load(CONFIGS / "data" / "camvid.yaml"),
            "recipe": {"batch_size": 2, "steps": 3, "augmentation": None},
            "seed": 4,
            "run": {"num_workers": 0},
        }
    )
    del config.data.about
    data = instantiate(config.data)
    data.check()
    assert (data.seed, data.batch_size, data.steps, data.eval_batch_size) == (4, 2, 3, 8)
    monkeypatch.delenv("KDLVFM_DATA")
    assert instantiate(config.data).root == Path("data/camvid")


@pytest.mark.data
@pytest.mark.skipif("KDLVFM_DATA" not in os.environ, reason="KDLVFM_DATA is not set")
def test_the_real_files():
    data = camvid(Path(os.environ["KDLVFM_DATA"]) / "camvid")
    data.check()
    assert data.counts() == {"train": 367, "labelled": 367, "unlabelled": 0, "val": 101, "test": 233}
    histogram = torch.zeros(256, dtype=torch.int64)
    samples = data.samples("val")
    for i in range(len(samples)):
        image, mask = samples[i]
        assert image.shape == (3, 360, 480)
        histogram += mask.flatten().bincount(minlength=256)
    # Counted apart from this code when the files were published: classes 0 to 10, then void.
    published = [1601620, 4531180, 98499, 5053176, 1521751, 2851125, 155724, 537197, 304716, 113531, 387010, 297271]
    assert [*histogram[:11].tolist(), histogram[255].item()] == published
