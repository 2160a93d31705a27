# SPDX-License-Identifier: Apache-2.0
"""Boxes in YOLO's format: one text file an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdlvfm.data.base import DataError
from kdlvfm.data.box_files import BoxFileData, Entry, listed
from kdlvfm.data.boxes import make_boxes
from kdlvfm.data.images import image_files, image_size, read_bytes


class Yolo(BoxFileData):
    """Images, and a text file for each with a line `class x y width height` an object, as shares of the image's sides.

        root/images/train/NAME.jpg    root/labels/train/NAME.txt
        root/images/val/...           root/labels/val/...
        root/images/test/...          root/labels/test/...     (optional)

    x and y are the centre of the box. `root/train/images` and `root/train/labels` will do as well. An image without a
    text file has no objects.

    Args:
        root: folder of the data set.
        classes: names of the classes, in the order of their numbers.
        train: name of the training split's folder.
        val: name of the validation split's folder.
        test: name of the test split's folder; there need not be one.
        **files: see `BoxFileData`.

    Raises:
        DataError: arguments out of their range.
    """

    layout = "images are read from images/SPLIT and boxes from labels/SPLIT (or SPLIT/images and SPLIT/labels)"

    def __init__(
        self,
        root: str | Path,
        classes: Sequence[str],
        *,
        train: str = "train",
        val: str = "val",
        test: str = "test",
        **files: Any,
    ) -> None:
        super().__init__(root, **files)
        self.class_names = tuple(map(str, classes))
        self._parts = {"train": train, "val": val, "test": test}

    @property
    def splits(self) -> tuple[str, ...]:  # type: ignore[override]
        """`train` and `val`, and `test` where the folder has one."""
        return ("train", "val", "test") if self._folder("images", "test").is_dir() else ("train", "val")

    def find(self, split: str) -> list[Entry]:
        """Images by name.

        Raises:
            DataError: a folder is missing, a text file is of no image, or a line is not what it should be.
        """
        images = image_files(self._folder("images", split), self.layout)
        labels = {path.stem: path for path in sorted(self._folder("labels", split).glob("*.txt"))}
        labels.pop("classes", None)  # labelling tools put their list of classes there
        if not labels:
            raise DataError(f"{self._folder('labels', split)} has no text file: {self.layout}.")
        if strange := [path.name for name, path in labels.items() if name not in images]:
            raise DataError(f"{len(strange)} text files in {split!r} are of no image: {listed(strange)}.")
        objects = {name: _read(path) for name, path in labels.items()}
        if strange := [
            f"{labels[name].name} ({number})"
            for name, lines in objects.items()
            for number, *_ in lines
            if number not in range(len(self.class_names))
        ]:
            raise DataError(
                f"{self.name} has {len(strange)} boxes in {split!r} of a class outside 0 to "
                f"{len(self.class_names) - 1}: {listed(strange)}. Correct them, or set data.classes=[...]."
            )
        return [_entry(path, objects.get(name, [])) for name, path in images.items()]

    def _folder(self, kind: str, split: str) -> Path:
        part = self._parts[split]
        turned = self.root / part / kind
        return turned if turned.is_dir() else self.root / kind / part


def _read(path: Path) -> list[tuple[int, float, float, float, float]]:
    objects = []
    for row, line in enumerate(read_bytes(path).decode("utf-8", errors="replace").splitlines(), start=1):
        values = line.split()
        if not values:
            continue
        try:
            number = int(values[0])
            x, y, width, height = map(float, values[1:])
        except ValueError as error:
            raise DataError(
                f"{path}, line {row}, is not `class x y width height`: it has {len(values)} values, {line[:60]!r}."
            ) from error
        objects.append((number, x, y, width, height))
    return objects


def _entry(image: Path, objects: Sequence[tuple[int, float, float, float, float]]) -> Entry:
    size = image_size(image)
    corners = [
        (
            (x - width / 2) * size[1],
            (y - height / 2) * size[0],
            (x + width / 2) * size[1],
            (y + height / 2) * size[0],
        )
        for _, x, y, width, height in objects
    ]
    return Entry(image, make_boxes(corners, [number for number, *_ in objects]), size)
