# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10's binary files, written here by the description of their format."""

import pytest
import torch

from kdlvfm.data.base import DataError
from kdlvfm.data.cifar10 import Cifar10

LOADING = {"batch_size": 2, "steps": 3}


@pytest.fixture
def root(tmp_path):
    """Three images a file; each has its number in the file as class, and its first pixel says which file it is of."""
    for place, name in enumerate([*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]):
        content = b""
        for number in range(3):
            red, green, blue = (bytes([10 * place + number + channel] + [channel] * 1023) for channel in range(3))
            content += bytes([number]) + red + green + blue
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_pixels_are_where_the_format_has_them(root):
    data = Cifar10(root, **LOADING)
    data.check()
    images = data.images("train")
    assert images.shape == (15, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert images[:, :, 0, 0].tolist() == [[10 * (i // 3) + i % 3 + c for c in range(3)] for i in range(15)]
    assert images[4, :, 0, 1].tolist() == images[4, :, 31, 31].tolist() == [0, 1, 2]
    assert data.images("test")[:, 0, 0, 0].tolist() == [50, 51, 52]
    assert data.counts() == {"train": 15, "val": 0, "test": 3}
    assert next(iter(data.train_dataloader()))["image"].shape == (2, 3, 32, 32)


def test_what_is_not_there_or_cut_off_is_named(root):
    (root / "test_batch.bin").write_bytes(b"\0" * 3074)
    with pytest.raises(DataError, match="3074 bytes, no multiple of 3073"):
        Cifar10(root, **LOADING).check()
    (root / "test_batch.bin").unlink()
    with pytest.raises(DataError, match=r"test_batch\.bin is missing: unpack https"):
        Cifar10(root, **LOADING).check()
    with pytest.raises(DataError, match=r"leave data\.size at that"):
        Cifar10(root, size=16, **LOADING)
