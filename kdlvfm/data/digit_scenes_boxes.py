# SPDX-License-Identifier: Apache-2.0
"""DigitScenes with boxes: the same scenes, for detection of the ten digits."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from kdlvfm.data.base import DataError
from kdlvfm.data.boxes import Sample, make_boxes
from kdlvfm.data.detection import DetectionData, Samples
from kdlvfm.data.digit_scenes import STREAM_FROM, UNLABELLED_FROM, DigitScenes, SceneGenerator, Split


class DigitScenesBoxes(DetectionData):
    """Detection of the digits in DigitScenes: ten classes, a box around what can be seen of each digit.

    Args:
        size: side of the square scenes in pixels.
        train: training scenes with boxes.
        unlabelled: further training scenes whose objects are not known.
        stream: train on none of those, but on scenes that are new in each place of each batch; meant for pre-training a
            teacher, which thus never sees the scenes that a student is trained on.
        val: validation scenes.
        test: test scenes.
        scenes_seed: seed of the scenes themselves; the run's `seed` orders and augments them, so that runs of different
            seeds are trained and measured on the same data.
        **loading: see `DetectionData`.

    Raises:
        DataError: no scene in a split, or scenes too small.
    """

    name = "DigitScenes boxes"
    class_names = DigitScenes.class_names[1:]
    palette = DigitScenes.palette[1:]
    licence = DigitScenes.licence

    def __init__(
        self,
        *,
        size: int = 128,
        train: int = 1000,
        unlabelled: int = 0,
        stream: bool = False,
        val: int = 200,
        test: int = 400,
        scenes_seed: int = 0,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        parts = (("train", train, 1), ("unlabelled", unlabelled, 0), ("val", val, 1), ("test", test, 1))
        for part, count, least in parts:
            if not least <= count <= UNLABELLED_FROM:
                raise DataError(f"{part}={count} scenes: choose from {least} to {UNLABELLED_FROM}.")
        first, drawn = (STREAM_FROM, self.steps * self.batch_size) if stream else (0, train)
        self._scenes = {
            "train": _Scenes("train", size, scenes_seed, first, drawn),
            "val": _Scenes("val", size, scenes_seed, 0, val),
            "test": _Scenes("test", size, scenes_seed, 0, test),
        }
        self._unlabelled = None
        if unlabelled and not stream:
            self._unlabelled = _Scenes("train", size, scenes_seed, UNLABELLED_FROM, unlabelled, boxes=False)

    def samples(self, split: str) -> Samples:
        """Scenes of a split."""
        return self._scenes[split]

    def unlabelled_samples(self) -> Samples | None:
        """Further training scenes, without boxes."""
        return self._unlabelled

    def split_hash(self) -> str:
        """SHA-256 of the first scene of each part, pixel by pixel, and of the number of scenes in each."""
        digest = hashlib.sha256(repr(self.counts()).encode())
        for scenes in filter(None, (*self._scenes.values(), self._unlabelled)):
            image, boxes = scenes[0]
            digest.update(image.numpy().tobytes() + boxes.corners.numpy().tobytes() + boxes.labels.numpy().tobytes())
        return digest.hexdigest()


class _Scenes:
    """`count` scenes of a generator, from index `first` on, as tensors, with their boxes or without."""

    def __init__(self, split: Split, size: int, seed: int, first: int, count: int, *, boxes: bool = True) -> None:
        self._generator = SceneGenerator(split, size=size, seed=seed)
        self._indices = range(first, first + count)
        self._boxes = boxes

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int, /) -> Sample:
        scene = self._generator.scene(self._indices[index])
        boxes = make_boxes(scene.boxes.tolist(), (scene.labels - 1).tolist()) if self._boxes else make_boxes([], [])
        return torch.from_numpy(scene.image).permute(2, 0, 1).contiguous(), boxes
