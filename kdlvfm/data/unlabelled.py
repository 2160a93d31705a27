# SPDX-License-Identifier: Apache-2.0
"""A folder of images and nothing else, to learn features from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from kdlvfm.data.base import DataError, SampleData
from kdlvfm.data.image_folder import ImageFolder
from kdlvfm.data.images import decode, image_size, pixels, read_bytes
from kdlvfm.data.sampler import SampleKey
from kdlvfm.data.sets import Batch, EvaluationSet, TrainingSet, drawing
from kdlvfm.data.transforms import Augmentation

_MOST_HELD_OUT = 1000


class UnlabelledImages(SampleData):
    """Any images, of any sizes, as squares of one size.

    An image is resized until its shorter side is `size` pixels, and a square of it is taken: at random where training
    is augmented, else from the middle. A batch is `{"image": float (B, 3, size, size) in [0, 1], "index": int64 (B,)}`,
    of validation also `"repeated"`, bool (B,), true for an image that another process counts.

    Args:
        root: the folder; images are looked for in the folders inside it too.
        val: folder of the held-out images; `None` holds out some of those in `root`, spread evenly over their names.
            One inside `root` is no part of the training images.
        held_out: how many, where there is no `val`; `None` for a tenth, but at least 2 and at most 1000.
        size: side of the squares in pixels.
        name: the data set, as tables show it; `None` for the name of the folder.
        licence: licence of the images, for the run record.
        check_images: decode every image before a run; `False` reads only the beginning of each file.
        augmentation: applied to training squares, of the kind for masks and without a crop; `None` leaves them alone.
        **loading: see `SampleData`.

    Raises:
        DataError: a folder without images, too few to hold some out, or arguments out of their range.
    """

    truth = "no labels"
    class_names = ()
    palette = ()
    splits = ("train", "val")
    augmentation: Augmentation | None

    def __init__(
        self,
        root: str | Path,
        *,
        val: str | Path | None = None,
        held_out: int | None = None,
        size: int = 224,
        name: str | None = None,
        licence: str | None = None,
        check_images: bool = True,
        augmentation: Augmentation | None = None,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        if not isinstance(augmentation, Augmentation | None):
            raise DataError("recipe.augmentation is made for boxes: choose another recipe, such as representation.")
        if augmentation is not None and augmentation.crop is not None:
            raise DataError(
                f"recipe.augmentation.crop={list(augmentation.crop)}: images without labels are squares of data.size="
                f"{size} pixels; set recipe.augmentation.crop=null, or choose recipe=representation."
            )
        if size < 1:
            raise DataError(f"data.size must be at least 1 pixel, not {size}.")
        if val is not None and held_out is not None:
            raise DataError(
                "data.held_out takes images of data.root, data.val names a folder of them: set one of both."
            )
        self.root = Path(root)
        self.name = name or self.root.resolve().name
        self.licence = licence
        self.size = size
        self.augmentation = augmentation
        self._check_images = check_images
        self._paths = _split(self.root, None if val is None else Path(val), held_out)

    @property
    def num_samples(self) -> int:
        """Training images."""
        return len(self._paths["train"])

    def counts(self) -> dict[str, int]:
        """Number of images by split."""
        return {**{split: len(self._paths[split]) for split in self.splits}, "test": 0}

    def check(self) -> None:
        """Read every image.

        Raises:
            DataError: a file cannot be read, or is no image.
        """
        read = _read if self._check_images else image_size
        for split in self.splits:
            # Decoding releases the interpreter lock, so threads do share the work.
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                for _ in pool.map(read, self._paths[split]):
                    pass

    def training_set(self) -> TrainingSet:
        """Augmented squares."""
        return _TrainingSet(self._paths["train"], self.size, self.augmentation, self.seed)

    def evaluation_set(self, split: str, rank: int = 0, processes: int = 1) -> Dataset[Batch]:
        """One process's share of a split; what is missing from the last round is an image marked as repeated."""
        return _EvaluationSet(self._paths[split], self.size, rank, processes)

    def split_hash(self) -> str:
        """SHA-256 over the size, and for each image of each split its file's name and length in bytes."""
        digest = hashlib.sha256(f"{self.size}\n".encode())
        for split in self.splits:
            for path in self._paths[split]:
                digest.update(f"{split} {path.name} {path.stat().st_size}\n".encode())
        return digest.hexdigest()


def _split(root: Path, val: Path | None, held_out: int | None) -> dict[str, list[Path]]:
    """Images to train on and to hold out, each in the order of their names."""
    found = ImageFolder(root).paths
    if val is not None:
        kept = ImageFolder(val).paths
        inside = {path.resolve() for path in kept}
        train = [path for path in found if path.resolve() not in inside]
    else:
        count = min(max(len(found) // 10, 2), _MOST_HELD_OUT) if held_out is None else held_out
        if not 2 <= count < len(found):
            raise DataError(
                f"{count} of the {len(found)} images in {root} cannot be held out: it takes 2 or more, and others to "
                "train on. Add images, or change data.held_out."
            )
        chosen = {i * len(found) // count for i in range(count)}
        kept = [path for i, path in enumerate(found) if i in chosen]
        train = [path for i, path in enumerate(found) if i not in chosen]
    if len(kept) < 2 or not train:
        raise DataError(f"{len(train)} images to train on and {len(kept)} held out: it takes 1 and 2 at least.")
    return {"train": train, "val": kept}


def _read(path: Path) -> Tensor:
    return pixels(decode(path, read_bytes(path)))


def _fitted(path: Path, size: int) -> Tensor:
    """An image, uint8 (3, H, W), whose shorter side is `size`."""
    resized: Tensor = F.resize(_read(path), [size], InterpolationMode.BILINEAR, antialias=True)
    return resized


class _TrainingSet(TrainingSet):
    """Augmented squares."""

    def __init__(self, paths: Sequence[Path], size: int, augmentation: Augmentation | None, seed: int) -> None:
        self._paths = paths
        self._size = size
        self._augmentation = augmentation
        self._seed = seed

    def read(self, key: SampleKey) -> Tensor:
        return _fitted(self._paths[key.sample], self._size)

    def finish(self, sample: Tensor, key: SampleKey) -> Batch:
        image, side = sample, self._size
        if self._augmentation is None:
            image = F.center_crop(image, [side])
        else:
            with drawing(self._seed, key):
                top, left = (int(torch.randint(length - side + 1, ())) for length in image.shape[-2:])
                square = image[:, top : top + side, left : left + side]
                image, _ = self._augmentation(square, torch.zeros(side, side, dtype=torch.int64, device=image.device))
        return {"image": image.float() / 255, "index": key.sample}


class _EvaluationSet(EvaluationSet):
    """Squares from the middle."""

    def __init__(self, paths: Sequence[Path], size: int, rank: int, processes: int) -> None:
        super().__init__(len(paths), rank, processes)
        self._paths = paths
        self._size = size

    def read(self, index: int, *, repeated: bool) -> Batch:
        image = F.center_crop(_fitted(self._paths[index], self._size), [self._size])
        return {"image": image.float() / 255, "index": index, "repeated": repeated}
