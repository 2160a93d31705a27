# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 as images: its binary version, which is numbers and nothing that could execute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdlvfm.data.base import DataError
from kdlvfm.data.diffusion import DiffusionData

_SIDE = 32
_RECORD = 1 + 3 * _SIDE**2  # bytes: the class, then the pixels channel by channel
_FILES = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}


class Cifar10(DiffusionData):
    """50 000 training and 10 000 test images of 32x32 pixels and ten classes.

    Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. The binary version is read, whose archive
    is https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz.

    Args:
        root: folder with `data_batch_1.bin` and so on.
        size: side of the images in pixels; they have 32.
        **loading: see `DiffusionData`.

    Raises:
        DataError: another size.
    """

    name = "CIFAR-10"
    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    palette = (
        (76, 132, 214),
        (228, 87, 86),
        (242, 207, 91),
        (245, 133, 24),
        (176, 137, 104),
        (136, 102, 201),
        (56, 148, 89),
        (214, 112, 178),
        (66, 189, 185),
        (120, 120, 120),
    )
    licence = None
    splits = ("train", "test")

    def __init__(self, root: str | Path, *, size: int = _SIDE, **loading: Any) -> None:
        if size != _SIDE:
            raise DataError(f"CIFAR-10 has images of {_SIDE} pixels: leave data.size at that, not at {size}.")
        super().__init__(size=size, **loading)
        self.root = Path(root)
        self._images: dict[str, Tensor] = {}

    def images(self, split: str) -> Tensor:
        """Images of a split, uint8 (n, 3, 32, 32), read once.

        Raises:
            DataError: a file is missing or no part of CIFAR-10.
        """
        if split not in self._images:
            self._images[split] = torch.cat([_read(self.root / name) for name in _FILES[split]])
        return self._images[split]


def _read(path: Path) -> Tensor:
    if not path.is_file():
        raise DataError(
            f"{path} is missing: unpack https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz and point data.root to "
            "its folder."
        )
    content = np.fromfile(path, dtype=np.uint8)
    if not len(content) or len(content) % _RECORD:
        raise DataError(f"{path} has {len(content)} bytes, no multiple of {_RECORD}: it is cut off, unpack it again.")
    return torch.from_numpy(content).view(-1, _RECORD)[:, 1:].reshape(-1, 3, _SIDE, _SIDE)
