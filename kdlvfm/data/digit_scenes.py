# SPDX-License-Identifier: Apache-2.0
"""DigitScenes: dense scenes of real handwritten digits on real photographs, composed on the fly from a seed."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdlvfm.data.base import DataError
from kdlvfm.data.digits import Digits, digits_of
from kdlvfm.data.segmentation import UNLABELLED, Samples, SegmentationData

Floats: TypeAlias = NDArray[np.float32]
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

_COLUMNS = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}
UNLABELLED_FROM = 10**6  # labelled, unlabelled and streamed scenes never share an index
STREAM_FROM = 10**9


@dataclass(frozen=True)
class Scene:
    """One scene.

    Attributes:
        image: uint8 (H, W, 3), RGB.
        mask: uint8 (H, W); 0 is background, d + 1 is digit d.
        boxes: float32 (n, 4), corners x1, y1, x2, y2 in pixels of the visible part of each digit, x2 and y2 exclusive.
        labels: int64 (n,), the classes of the boxes, as in the mask.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    boxes: Floats
    labels: NDArray[np.int64]


class SceneGenerator:
    """Scenes of one split; each is a pure function of (seed, split, index), and there is no last one.

    Handwritten digits (8x8 pixels, UCI) are enlarged, turned, given bright colours and laid over each other on a crop
    of one of two photographs, darkened as at dusk: that there is a digit is easily seen, which one only by its shape.
    No digit image and no column of a photograph is used by two splits.

    Args:
        split: `"train"`, `"val"` or `"test"`.
        size: side of the square scenes in pixels.
        seed: scenes of two seeds differ; the digits and photographs of a split do not.

    Raises:
        DataError: no such split, or scenes too small to hold a digit.
    """

    digits = (3, 7)  # how many a scene
    side = (0.3, 0.5)  # of a digit's 8x8 square, as a share of the scene
    turn = 0.25  # radians, either way
    crop = (56, 120)  # pixels of the photograph
    least_visible = 0.85  # share of a digit's pixels, else it is not drawn

    def __init__(self, split: Split, *, size: int = 64, seed: int = 0) -> None:
        if split not in SPLITS:
            raise DataError(f"DigitScenes has the splits train, val and test, not {split!r}.")
        if size < 32:
            raise DataError(f"a scene of {size} px is too small to show digits: choose size >= 32.")
        self.split = split
        self.size = size
        self.seed = seed
        self._glyphs, self._digits, self._photographs = _material(split)

    def scene(self, index: int) -> Scene:
        """Scene `index` >= 0."""
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        background = self._background(rng)
        paint = np.zeros_like(background)
        through = np.ones((self.size, self.size), np.float32)  # share of light from behind what is drawn already
        mask = np.zeros((self.size, self.size), np.uint8)
        boxes: list[tuple[int, int, int, int]] = []
        labels: list[int] = []
        wanted = int(rng.integers(self.digits[0], self.digits[1] + 1))
        for _ in range(3 * wanted):  # from front to back, so that a digit hidden too much is simply left out
            chosen = int(rng.integers(len(self._glyphs)))
            (top, left), alpha = self._place(self._glyphs[chosen], rng)
            window = np.s_[top : top + alpha.shape[0], left : left + alpha.shape[1]]
            solid = alpha > 0.5
            visible = solid & (mask[window] == 0)
            if visible.sum() < max(self.least_visible * solid.sum(), 12):
                continue
            colour = rng.random(3, np.float32)
            colour = 0.4 + 0.6 * colour / colour.max()
            light = through[window] * alpha
            paint[window] += light[..., None] * colour
            through[window] -= light
            label = int(self._digits[chosen]) + 1
            mask[window][visible] = label
            rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
            boxes.append((left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1))
            labels.append(label)
            if len(labels) == wanted:
                break
        image = paint + through[..., None] * background
        return Scene(
            image=(image * 255 + 0.5).astype(np.uint8),
            mask=mask,
            boxes=np.asarray(boxes, np.float32).reshape(-1, 4),
            labels=np.asarray(labels, np.int64),
        )

    def _background(self, rng: np.random.Generator) -> Floats:
        """A crop (size, size, 3) in [0, 1] of a photograph as at dusk, mirrored or not."""
        photograph = self._photographs[int(rng.integers(len(self._photographs)))]
        height, width = photograph.shape[:2]
        side = rng.uniform(*self.crop)
        top, left = rng.uniform(0, height - 1 - side), rng.uniform(0, width - 1 - side)
        steps = (np.arange(self.size) + 0.5) * side / self.size
        columns = steps if rng.random() < 0.5 else steps[::-1]
        crop = _bilinear_grid(photograph, top + steps, left + columns)
        contrast, exposure = rng.uniform(0.6, 1.2), rng.uniform(0.35, 0.6)
        return np.asarray(np.clip((crop - 0.5) * contrast + 0.5, 0, 1) * exposure, np.float32)

    def _place(self, glyph: Floats, rng: np.random.Generator) -> tuple[tuple[int, int], Floats]:
        """Corner (top, left) and opacity (h, w) of a glyph, cut off where it leaves the scene."""
        side = self.size * rng.uniform(*self.side)
        stretch, angle = rng.uniform(0.85, 1.15), rng.uniform(-self.turn, self.turn)
        centre_y, centre_x = rng.uniform(0.4 * side, self.size - 0.4 * side, 2)
        reach = 0.5 * side * 1.15 * (abs(np.cos(angle)) + abs(np.sin(angle)))
        top, left = max(0, int(centre_y - reach)), max(0, int(centre_x - reach))
        bottom, right = min(self.size, int(centre_y + reach) + 2), min(self.size, int(centre_x + reach) + 2)
        y = np.arange(top, bottom, dtype=np.float32)[:, None] + 0.5 - np.float32(centre_y)
        x = np.arange(left, right, dtype=np.float32)[None, :] + 0.5 - np.float32(centre_x)
        cos, sin = np.float32(np.cos(angle) * 8 / side), np.float32(np.sin(angle) * 8 / side)
        ink = _bilinear(glyph, (cos * y - sin * x) * np.float32(stretch), (cos * x + sin * y) / np.float32(stretch))
        return (top, left), np.asarray(np.clip((ink - 0.3) * 4, 0, 1), np.float32)


@functools.cache
def _material(split: Split) -> tuple[Floats, NDArray[np.int64], tuple[Floats, ...]]:
    """Glyphs (n, 10, 10) with a border of zeros, their digits (n,), and the split's part of each photograph."""
    from sklearn.datasets import load_sample_images

    digits, labels = digits_of(split)
    glyphs = np.pad(digits, ((0, 0), (1, 1), (1, 1)))
    begin, end = _COLUMNS[split]
    photographs = tuple(
        (photograph[:, int(begin * photograph.shape[1]) : int(end * photograph.shape[1])] / 255).astype(np.float32)
        for photograph in load_sample_images().images
    )
    return glyphs, labels, photographs


def _bilinear(glyph: Floats, y: Floats, x: Floats) -> Floats:
    """A bordered glyph (10, 10) at positions (y, x), in its pixels from its centre; zero outside."""
    last = len(glyph) - 1
    y, x = np.clip(y + last / 2, 0, last - 1e-3), np.clip(x + last / 2, 0, last - 1e-3)
    row, column = y.astype(np.int32), x.astype(np.int32)
    y, x = y - row, x - column
    at, flat = row * len(glyph) + column, glyph.ravel()
    upper = flat[at] * (1 - x) + flat[at + 1] * x
    lower = flat[at + len(glyph)] * (1 - x) + flat[at + len(glyph) + 1] * x
    return np.asarray(upper * (1 - y) + lower * y, np.float32)


def _bilinear_grid(photograph: Floats, y: NDArray[np.float64], x: NDArray[np.float64]) -> Floats:
    """A photograph (H, W, 3) at rows y (h,) and columns x (w,)."""
    row, column = y.astype(np.int64), x.astype(np.int64)
    down, right = (y - row).astype(np.float32)[:, None, None], (x - column).astype(np.float32)[None, :, None]
    rows = photograph[row] * (1 - down) + photograph[row + 1] * down
    return np.asarray(rows[:, column] * (1 - right) + rows[:, column + 1] * right, np.float32)


class DigitScenes(SegmentationData):
    """Segmentation of DigitScenes: eleven classes, background and the ten digits.

    Args:
        size: side of the square scenes in pixels.
        labelled: training scenes with a mask.
        unlabelled: further training scenes whose masks are -1 everywhere.
        stream: train on neither of those, but on labelled scenes that are new in each place of each batch; meant for
            pre-training a teacher, which thus never sees the scenes that a student is trained on.
        val: validation scenes.
        test: test scenes.
        scenes_seed: seed of the scenes themselves; the run's `seed` orders and augments them, so that runs of different
            seeds are trained and measured on the same data.
        **loading: see `SegmentationData`.

    Raises:
        DataError: a count out of its range, or scenes too small.
    """

    name = "DigitScenes"
    class_names = ("background", *Digits.class_names)
    palette = ((38, 40, 48), *Digits.palette)
    licence = "digits CC-BY-4.0 (UCI), photographs CC-BY-2.0 (as shipped by scikit-learn)"

    def __init__(
        self,
        *,
        size: int = 64,
        labelled: int = 64,
        unlabelled: int = 10_000,
        stream: bool = False,
        val: int = 200,
        test: int = 400,
        scenes_seed: int = 0,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        for name, value, least in (
            ("labelled", labelled, 1),
            ("unlabelled", unlabelled, 0),
            ("val", val, 1),
            ("test", test, 1),
        ):
            if not least <= value <= UNLABELLED_FROM:
                raise DataError(f"{name}={value} scenes: choose from {least} to {UNLABELLED_FROM}.")
        self.size = size
        self.labelled = labelled
        self.unlabelled = unlabelled
        self.stream = stream
        self.scenes_seed = scenes_seed
        self.val = val
        self.test = test
        SceneGenerator("train", size=size)  # fails now if the size is too small

    def samples(self, split: str) -> Samples:
        """Labelled scenes of a split."""
        if split == "train":
            first, count = (STREAM_FROM, self.steps * self.batch_size) if self.stream else (0, self.labelled)
            return self._scenes("train", first, count)
        if split == "val":
            return self._scenes("val", 0, self.val)
        return self._scenes("test", 0, self.test)

    def unlabelled_samples(self) -> Samples | None:
        """Further training scenes, masks -1."""
        if self.stream or not self.unlabelled:
            return None
        return self._scenes("train", UNLABELLED_FROM, self.unlabelled, labels=False)

    def split_hash(self) -> str:
        """SHA-256 of the first scenes of each part, pixel by pixel, and of the number of scenes in each."""
        parts = [self.samples("train"), self.unlabelled_samples(), self.samples("val"), self.samples("test")]
        digest = hashlib.sha256(repr([len(part) if part is not None else 0 for part in parts]).encode())
        for part in parts:
            if part is not None:
                image, mask = part[0]
                digest.update(image.numpy().tobytes() + mask.numpy().tobytes())
        return digest.hexdigest()

    def _scenes(self, split: Split, first: int, count: int, *, labels: bool = True) -> Samples:
        generator = SceneGenerator(split, size=self.size, seed=self.scenes_seed)
        return _Scenes(generator, first, count, labels)


class _Scenes:
    """`count` scenes of a generator, from index `first` on, as tensors."""

    def __init__(self, generator: SceneGenerator, first: int, count: int, labels: bool) -> None:
        self._generator = generator
        self._indices = range(first, first + count)
        self._labels = labels

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int, /) -> tuple[Tensor, Tensor]:
        scene = self._generator.scene(self._indices[index])
        image = torch.from_numpy(scene.image).permute(2, 0, 1)
        mask = torch.from_numpy(scene.mask).long()
        return image, mask if self._labels else torch.full_like(mask, UNLABELLED)
