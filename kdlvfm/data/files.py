# SPDX-License-Identifier: Apache-2.0
"""Data sets that are files: an image and a PNG mask for each sample."""

from __future__ import annotations

import functools
import hashlib
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdlvfm.data.base import DataError
from kdlvfm.data.images import decode, pixels, read_bytes, sha256
from kdlvfm.data.segmentation import UNLABELLED, VOID, Samples, SegmentationData

_MASK_MODES = ("L", "P", "1", "I", "I;16")


@dataclass(frozen=True)
class Pair:
    """Files of one sample; an unlabelled one has no mask."""

    image: Path
    mask: Path | None


@dataclass(frozen=True)
class Fact:
    """What was found when a sample's files were read: size (height, width), and SHA-256 of each file."""

    size: tuple[int, int]
    digests: tuple[str, ...]


class FileSamples:
    """Samples read from files.

    Args:
        pairs: the files.
        class_names: the classes; masks hold their numbers.
        ignore_value: mask value that is void.
    """

    def __init__(self, pairs: Sequence[Pair], class_names: Sequence[str], ignore_value: int) -> None:
        self._pairs = pairs
        self._num_classes = len(class_names)
        self._ignore_value = ignore_value

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask, _ = self._read(self._pairs[index])
        return image, mask

    def facts(self) -> list[Fact]:
        """Read and validate every file.

        Raises:
            DataError: the first sample, in order, that cannot be used.
        """
        # Decoding and hashing release the interpreter lock, so threads do share the work.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(self._fact, self._pairs))

    def _fact(self, pair: Pair) -> Fact:
        image, _, digests = self._read(pair)
        return Fact((image.shape[1], image.shape[2]), digests)

    def _read(self, pair: Pair) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        content = read_bytes(pair.image)
        image = pixels(decode(pair.image, content))
        if pair.mask is None:
            return image, torch.full(image.shape[1:], UNLABELLED), (sha256(content),)
        mask_content = read_bytes(pair.mask)
        mask = self._mask(pair.mask, decode(pair.mask, mask_content))
        if mask.shape != image.shape[1:]:
            sizes = " and ".join(f"{height}x{width}" for height, width in (image.shape[1:], mask.shape))
            raise DataError(
                f"{pair.image} and its mask {pair.mask} differ in size (height x width {sizes}): "
                "a mask must have one value for each pixel of its image."
            )
        return image, mask, (sha256(content), sha256(mask_content))

    def _mask(self, path: Path, file: Image.Image) -> Tensor:
        if file.mode not in _MASK_MODES:
            raise DataError(
                f"{path} is a mask in colour (mode {file.mode}): save masks as PNG with one number a pixel, the class."
            )
        raw = torch.from_numpy(np.array(file).astype(np.int64))
        mask = torch.where(raw == self._ignore_value, VOID, raw)
        strange = raw[(raw != self._ignore_value) & ((raw < 0) | (raw >= self._num_classes))]
        if strange.numel():
            values = torch.unique(strange).tolist()
            shown = ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
            raise DataError(
                f"{path} holds {shown}, which is outside the classes 0 to {self._num_classes - 1} and not the ignored "
                f"value {self._ignore_value}: correct the mask, the list of classes or the ignored value."
            )
        return mask


class FileData(SegmentationData):
    """A segmentation data set read from files. A subclass says which files make up which part.

    Args:
        **loader: arguments of `SegmentationData`.

    Attributes:
        root: the folder that holds the data set.
        ignore_value: mask value that is void.
    """

    root: Path
    ignore_value: int

    def __init__(self, **loader: Any) -> None:
        super().__init__(**loader)
        self._found: dict[str, list[Pair]] = {}

    @abstractmethod
    def find(self, part: str) -> list[Pair]:
        """List the files of `"train"`, `"val"`, `"test"` or `"unlabelled"`, in an order that never changes.

        Raises:
            DataError: the part or one of its files is missing.
        """

    def pairs(self, part: str) -> list[Pair]:
        """Files of a part, looked up once."""
        if part not in self._found:
            self._found[part] = self.find(part)
        return self._found[part]

    def samples(self, split: str) -> Samples:
        """Labelled samples of a split; files are read on access."""
        return self._file_samples(split)

    def unlabelled_samples(self) -> Samples | None:
        """Training images without masks; `None` if there are none."""
        samples = self._file_samples("unlabelled")
        return samples if len(samples) else None

    def check(self) -> None:
        """Read every file of every part, once.

        Raises:
            DataError: a file is missing, unreadable or not what it should be, or images of different sizes would have
                to share a batch.
        """
        super().check()
        for part, facts in self._facts.items():
            sizes = sorted({fact.size for fact in facts})
            if len(sizes) < 2:
                continue
            example = f"{self.name} has images of different sizes in {part!r} ({sizes[0]} and {sizes[-1]}, for example)"
            if part in ("val", "test"):
                if self.eval_batch_size > 1:
                    raise DataError(f"{example}, which cannot share a batch: set data.eval_batch_size=1.")
            elif self.batch_size > 1 and (self.augmentation is None or self.augmentation.crop is None):
                raise DataError(f"{example}, which cannot share a batch: set a crop, recipe.augmentation.crop=[H,W].")

    def split_hash(self) -> str:
        """SHA-256 over parts, file names and contents of files."""
        digest = hashlib.sha256()
        for part, facts in self._facts.items():
            for pair, fact in zip(self.pairs(part), facts, strict=True):
                files = [path for path in (pair.image, pair.mask) if path is not None]
                for path, content in zip(files, fact.digests, strict=True):
                    digest.update(f"{part} {path.relative_to(self.root).as_posix()} {content}\n".encode())
        return digest.hexdigest()

    def _file_samples(self, part: str) -> FileSamples:
        return FileSamples(self.pairs(part), self.class_names, self.ignore_value)

    @functools.cached_property
    def _facts(self) -> Mapping[str, list[Fact]]:
        return {part: self._file_samples(part).facts() for part in (*self.splits, "unlabelled")}
