# SPDX-License-Identifier: Apache-2.0
"""CamVid: street scenes from a moving car, 11 classes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from kdlvfm.data.base import DataError
from kdlvfm.data.files import FileData, Pair


class CamVid(FileData):
    """CamVid as published with SegNet: 367 training, 101 validation and 233 test images of 360x480, 11 classes.

    Brostow, Fauqueur, Cipolla, "Semantic object classes in video: A high-definition ground truth database", 2009; split
    and classes of Badrinarayanan, Kendall, Cipolla, "SegNet", 2017. `kdlvfm download camvid` fetches it.

    Two layouts are read: that of the SegNet tutorial (`train/ID.png`, `trainannot/ID.png`, `train.txt`), and
    `images/train/ID.jpg` (or `.png`), `labels/train/ID.png`, `splits/train.txt`.

    Args:
        root: folder of the data set.
        train_fraction: share of the training images, evenly spaced, that keep their masks; the others become the
            unlabelled samples.
        **loader: arguments of `SegmentationData`.

    Raises:
        DataError: `train_fraction` is not in (0, 1].
    """

    name = "CamVid"
    class_names = (
        "Sky",
        "Building",
        "Pole",
        "Road",
        "Pavement",
        "Tree",
        "SignSymbol",
        "Fence",
        "Car",
        "Pedestrian",
        "Bicyclist",
    )
    palette = (
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    )
    licence = "CC BY-NC 4.0 (SegNet tutorial repository: personal and research use only)"
    ignore_value = 11

    def __init__(self, root: str | Path, *, train_fraction: float = 1.0, **loader: Any) -> None:
        super().__init__(**loader)
        if not 0 < train_fraction <= 1:
            raise DataError(f"train_fraction must be above 0 and at most 1, not {train_fraction}.")
        self.root = Path(root)
        self.train_fraction = train_fraction

    def find(self, part: str) -> list[Pair]:
        """List the files of a part, in the order of the split's list.

        Raises:
            DataError: the data set or one of its files is missing.
        """
        pairs = self._listed("train" if part == "unlabelled" else part)
        if part not in ("train", "unlabelled"):
            return pairs
        kept = {math.floor(i / self.train_fraction + 1e-9) for i in range(round(len(pairs) * self.train_fraction) or 1)}
        if part == "train":
            return [pair for i, pair in enumerate(pairs) if i in kept]
        return [Pair(pair.image, None) for i, pair in enumerate(pairs) if i not in kept]

    def _listed(self, split: str) -> list[Pair]:
        own = (self.root / "images").is_dir()
        names = self.root / "splits" / f"{split}.txt" if own else self.root / f"{split}.txt"
        if not names.is_file():
            raise DataError(
                f"there is no CamVid in {self.root} ({names} is missing): fetch it with `kdlvfm download camvid`, or "
                "point data.root to it."
            )
        images = self.root / "images" / split if own else self.root / split
        masks = self.root / "labels" / split if own else self.root / f"{split}annot"
        suffix = ".jpg" if any(images.glob("*.jpg")) else ".png"
        ids = [Path(line.split()[0]).stem for line in names.read_text(encoding="utf-8").splitlines() if line.strip()]
        pairs = [Pair(images / f"{name}{suffix}", masks / f"{name}.png") for name in ids]
        for path in (path for pair in pairs for path in (pair.image, pair.mask) if path is not None):
            if not path.is_file():
                raise DataError(
                    f"{names} lists {path.stem}, but {path} is missing: restore it or download CamVid again."
                )
        if not pairs:
            raise DataError(f"{names} lists no image: download CamVid again.")
        return pairs
