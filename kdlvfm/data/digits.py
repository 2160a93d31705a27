# SPDX-License-Identifier: Apache-2.0
"""The handwritten digits that come with scikit-learn, as images."""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdlvfm.core.align import resize_map
from kdlvfm.data.base import DataError
from kdlvfm.data.diffusion import DiffusionData

Floats: TypeAlias = NDArray[np.float32]

_PLACES = {"train": (0, 1197), "val": (1197, 1397), "test": (1397, 1797)}
_SPLIT_SEED = 1797  # the split of the digits never changes, whatever the seed of a run
_SIDE = 8


@functools.cache
def digits_of(split: str) -> tuple[Floats, NDArray[np.int64]]:
    """The digits of a split, (n, 8, 8) with ink 1 on 0, and which they are, (n,). No digit is in two splits.

    Every data set made of these digits takes them from here, so that none teaches with what another one tests on.
    """
    from sklearn.datasets import load_digits

    bundle = load_digits()
    first, last = _PLACES[split]
    chosen = np.random.default_rng(_SPLIT_SEED).permutation(len(bundle.images))[first:last]
    return bundle.images[chosen].astype(np.float32) / 16, bundle.target[chosen].astype(np.int64)


class Digits(DiffusionData):
    """1197 training, 200 validation and 400 test images of handwritten digits, white on black (UCI, 8x8 pixels).

    Args:
        size: side of the images in pixels; they are enlarged from 8.
        **loading: see `DiffusionData`.

    Raises:
        DataError: a size below 8.
    """

    name = "Digits"
    class_names = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    palette = (
        (228, 87, 86),
        (245, 133, 24),
        (242, 207, 91),
        (137, 197, 84),
        (56, 148, 89),
        (66, 189, 185),
        (76, 132, 214),
        (136, 102, 201),
        (214, 112, 178),
        (176, 137, 104),
    )
    licence = "CC-BY-4.0 (UCI, as shipped by scikit-learn)"

    def __init__(self, *, size: int = _SIDE, **loading: Any) -> None:
        if size < _SIDE:
            raise DataError(f"the digits have {_SIDE} pixels a side: choose size >= {_SIDE}, not {size}.")
        super().__init__(size=size, **loading)
        self._images = {split: _enlarged(digits_of(split)[0], size) for split in self.splits}

    def images(self, split: str) -> Tensor:
        """Images of a split, uint8 (n, 3, size, size)."""
        return self._images[split]


def _enlarged(digits: Floats, size: int) -> Tensor:
    images = resize_map(torch.from_numpy(digits).unsqueeze(1), (size, size))
    return (images * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
