# SPDX-License-Identifier: Apache-2.0
"""A folder of images and masks, good and bad."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from kdlvfm.data.base import DataError
from kdlvfm.data.folder import Folder
from kdlvfm.data.transforms import Augmentation

CONFIGS = Path(__file__).parents[2] / "configs"


def write(root, part, name, *, size=(12, 16), values=(0, 1, 2, 255), mask=True, suffix=".jpg", seed=0):
    rng = np.random.default_rng(seed)
    (root / part / "images").mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / part / "images" / f"{name}{suffix}")
    if mask:
        (root / part / "masks").mkdir(parents=True, exist_ok=True)
        pixels = rng.choice(np.array(values, np.uint8), size)
        pixels.flat[: len(values)] = values
        Image.fromarray(pixels).save(root / part / "masks" / f"{name}.png")


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "cracks"
    for i in range(4):
        write(root, "train", f"t{i}", seed=i)
    for i in range(2):
        write(root, "val", f"v{i}", seed=10 + i)
    for i in range(3):
        write(root, "unlabelled", f"u{i}", mask=False, seed=20 + i)
    return root


def folder(root, **changes):
    return Folder(root, ["wall", "crack", "door"], **{"batch_size": 2, "steps": 3, **changes})


def test_samples_are_what_the_files_hold(root):
    data = folder(root)
    data.check()
    assert data.name == "cracks"
    assert data.num_classes == 3
    assert data.counts() == {"train": 7, "labelled": 4, "unlabelled": 3, "val": 2, "test": 0}
    image, mask = data.samples("train")[2]
    pixels = np.array(Image.open(root / "train" / "images" / "t2.jpg"))
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))
    assert np.array_equal(mask.numpy(), np.array(Image.open(root / "train" / "masks" / "t2.png")).astype(np.int64))
    assert (data.unlabelled_samples()[0][1] == -1).all()
    assert len(list(data.train_dataloader())) == 3
    assert len(set(data.palette)) == 3


def test_test_split_is_optional(root):
    data = folder(root)
    assert data.splits == ("train", "val")
    with pytest.raises(DataError, match=r"test/images is missing"):
        data.test_dataloader()
    write(root, "test", "x")
    assert folder(root).splits == ("train", "val", "test")
    assert folder(root).counts()["test"] == 1


def test_another_ignored_value_becomes_void_and_255_is_then_an_error(root):
    for part in ("train", "val"):
        for path in (root / part / "masks").iterdir():
            pixels = np.array(Image.open(path))
            pixels[pixels == 255] = 99
            Image.fromarray(pixels).save(path)
    _, mask = folder(root, ignore_value=99).samples("train")[0]
    assert sorted(mask.unique().tolist()) == [0, 1, 2, 255]
    with pytest.raises(DataError, match=r"t0\.png holds 99, which is outside the classes 0 to 2"):
        folder(root).check()


def test_palette_and_16_bit_masks_are_read_as_numbers(root):
    numbers = np.array(Image.open(root / "train" / "masks" / "t0.png"))
    paletted = Image.frombytes("P", (16, 12), numbers.tobytes())
    paletted.putpalette([(37 * i) % 256 for i in range(768)])
    paletted.save(root / "train" / "masks" / "t0.png")
    Image.fromarray(numbers.astype(np.uint16)).save(root / "train" / "masks" / "t1.png")
    samples = folder(root).samples("train")
    for i in range(2):
        assert np.array_equal(samples[i][1].numpy(), numbers.astype(np.int64))


def test_a_turned_photograph_is_set_upright(root):
    upright = Image.fromarray(np.full((12, 16, 3), 100, np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(root / "train" / "images" / "t0.jpg", exif=exif)
    folder(root).check()
    assert folder(root).samples("train")[0][0].shape == (3, 12, 16)


def drop_mask(root):
    (root / "train" / "masks" / "t1.png").unlink()


def drop_image(root):
    (root / "train" / "images" / "t1.jpg").unlink()


def truncate_image(root):
    path = root / "val" / "images" / "v1.jpg"
    path.write_bytes(path.read_bytes()[:200])


def not_a_mask(root):
    (root / "val" / "masks" / "v0.png").write_text("not an image")


def colour_mask(root):
    Image.new("RGB", (16, 12)).save(root / "train" / "masks" / "t3.png")


def other_size(root):
    Image.new("L", (16, 11)).save(root / "train" / "masks" / "t3.png")


def outside(root):
    write(root, "train", "t3", values=(0, 3, 17))


def empty(root):
    for path in (root / "val" / "images").iterdir():
        path.unlink()


def stranger(root):
    (root / "train" / "images" / "notes.txt").write_text("hello")


def twice(root):
    write(root, "train", "t0", suffix=".png")


def jpeg_mask(root):
    Image.new("L", (16, 12)).save(root / "train" / "masks" / "t9.jpg")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_mask, r"t1\.jpg has no mask .*masks/t1\.png: add it, or move"),
        (drop_image, r"t1\.png is the mask of no image"),
        (truncate_image, r"v1\.jpg is not a readable image .*restore"),
        (not_a_mask, r"v0\.png is not a readable image"),
        (colour_mask, r"t3\.png is a mask in colour \(mode RGB\)"),
        (other_size, r"t3\.jpg and its mask .*t3\.png differ in size .*12x16 and 11x16"),
        (outside, r"t3\.png holds 3, 17, which is outside the classes 0 to 2"),
        (empty, r"val/images is empty"),
        (stranger, r"notes\.txt is not an image file"),
        (twice, r"t0\.jpg and .*t0\.png have the same name"),
        (jpeg_mask, r"t9\.jpg is not a PNG file"),
    ],
)
def test_check_names_the_file_and_the_fix(root, damage, message):
    damage(root)
    with pytest.raises(DataError, match=message):
        folder(root).check()


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere/train/images is missing"):
        folder(tmp_path / "nowhere").check()


def test_images_of_different_sizes_need_a_crop_or_batches_of_one(root):
    write(root, "train", "t4", size=(20, 20))
    write(root, "val", "v4", size=(20, 20))
    with pytest.raises(DataError, match=r"'train' \(\(12, 16\) and \(20, 20\).*recipe\.augmentation\.crop"):
        folder(root).check()
    crop = Augmentation(crop=(8, 8))
    with pytest.raises(DataError, match=r"'val'.*data\.eval_batch_size=1"):
        folder(root, augmentation=crop, eval_batch_size=2).check()
    folder(root, augmentation=crop).check()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": ["a"]}, "2 to 255 different names"),
        ({"classes": ["a", "a"]}, "2 to 255 different names"),
        ({"classes": ["a", "b"], "ignore_value": 1}, "is the number of class 'b'"),
        ({"classes": ["a", "b"], "palette": [[0, 0, 0]]}, "1 colours for 2 classes"),
    ],
)
def test_classes_that_do_not_fit_are_refused(root, arguments, message):
    with pytest.raises(DataError, match=message):
        Folder(root, **arguments, batch_size=2, steps=3)


def test_split_hash_sees_contents_names_and_parts(root):
    first = folder(root).split_hash()
    assert folder(root, seed=9, batch_size=1).split_hash() == first
    (root / "train" / "images" / "t0.jpg").rename(root / "train" / "images" / "s0.jpg")
    (root / "train" / "masks" / "t0.png").rename(root / "train" / "masks" / "s0.png")
    renamed = folder(root).split_hash()
    write(root, "val", "v1", seed=99)
    changed = folder(root).split_hash()
    assert len({first, renamed, changed}) == 3


def test_the_configuration_builds_it(root):
    config = OmegaConf.create(
        {
            "data": OmegaConf.load(CONFIGS / "data" / "folder.yaml"),
            "recipe": {
                "batch_size": 2,
                "steps": 3,
                "augmentation": {"_target_": "kdlvfm.data.transforms.Augmentation", "crop": [8, 8], "scale": [0.5, 2]},
            },
            "seed": 4,
            "run": {"num_workers": 0},
        }
    )
    del config.data.about
    config.data.root = str(root)
    config.data.classes = ["wall", "crack", "door"]
    data = instantiate(config.data)
    data.check()
    assert data.class_names == ("wall", "crack", "door")
    assert next(iter(data.train_dataloader()))["image"].shape == (2, 3, 8, 8)
