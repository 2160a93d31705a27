# SPDX-License-Identifier: Apache-2.0
"""Detection data sets that are files: images, and boxes in one of several formats."""

from __future__ import annotations

import functools
import hashlib
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kdlvfm.data.base import DataError
from kdlvfm.data.boxes import Boxes, Sample, make_boxes
from kdlvfm.data.detection import DetectionData, Samples
from kdlvfm.data.image_folder import ImageFolder
from kdlvfm.data.images import decode, image_size, pixels, read_bytes
from kdlvfm.data.palette import distinct_colours

_SHOWN = 5
_SLACK = 1.0  # pixels that a box may reach out of its image: formats round, and some count from 1


@dataclass(frozen=True)
class Entry:
    """One image of a data set.

    Attributes:
        image: its file.
        boxes: its objects.
        size: height and width as the annotation states them; `None` if it does not.
    """

    image: Path
    boxes: Boxes
    size: tuple[int, int] | None = None


class BoxFileData(DetectionData):
    """A detection data set read from files. A subclass says which files there are and which boxes they have.

    Args:
        root: the folder that holds the data set.
        name: the data set, as tables show it; `None` for the name of the folder.
        licence: licence of the data, for the run record.
        bad_boxes: what happens if a box has no area, or lies outside its image by more than a pixel: `"error"` refuses
            the data set, `"drop"` leaves the box out, and the record says how many there were.
        check_images: decode every image before a run; `False` reads only the beginning of each file.
        unlabelled: a folder, relative to `root`, of further training images whose objects are not known; those that a
            split names are passed over. `None` for none.
        **loading: see `DetectionData`.

    Attributes:
        layout: where files are expected, for errors.

    Raises:
        DataError: arguments out of their range.
    """

    layout: str

    def __init__(
        self,
        root: str | Path,
        *,
        name: str | None = None,
        licence: str | None = None,
        bad_boxes: Literal["error", "drop"] = "error",
        check_images: bool = True,
        unlabelled: str | None = None,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        if bad_boxes not in ("error", "drop"):
            raise DataError(f"data.bad_boxes must be error or drop, not {bad_boxes!r}.")
        self.root = Path(root)
        self.name = name or self.root.resolve().name
        self.licence = licence
        self._drop = bad_boxes == "drop"
        self._check_images = check_images
        self._unlabelled = None if unlabelled is None else self.root / unlabelled
        self._found: dict[str, list[Entry]] = {}
        self._dropped = 0

    @abstractmethod
    def find(self, split: str) -> list[Entry]:
        """List the images and boxes of `"train"`, `"val"` or `"test"`, in an order that never changes.

        Raises:
            DataError: files are missing or not what they should be, or boxes of classes that there are not.
        """

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:  # type: ignore[override]
        """Distinct colours."""
        return distinct_colours(self.num_classes)

    def entries(self, split: str) -> list[Entry]:
        """Images and usable boxes of a split, looked up once.

        Raises:
            DataError: see `find`; or boxes that cannot be used.
        """
        if split not in self._found:
            found = self.find(split)
            sizes = [image_size(entry.image) if entry.size is None else entry.size for entry in found]
            bad = [_bad(entry.boxes, size) for entry, size in zip(found, sizes, strict=True)]
            problems = [
                f"{entry.image.name} {[round(side, 2) for side in corners]}"
                for entry, mask in zip(found, bad, strict=True)
                for corners in entry.boxes.corners[mask].tolist()
            ]
            if problems and not self._drop:
                raise DataError(
                    f"{self.name} has {len(problems)} boxes in {split!r} without area or outside their image, as "
                    f"[x1, y1, x2, y2]: {listed(problems)}. Correct them, or leave them out with data.bad_boxes=drop."
                )
            self._dropped += len(problems)
            self._found[split] = [
                replace(entry, boxes=entry.boxes[~mask], size=size)
                for entry, mask, size in zip(found, bad, sizes, strict=True)
            ]
        return self._found[split]

    def samples(self, split: str) -> Samples:
        """Samples of a split; images are read on access."""
        return _FileSamples(self.entries(split))

    def unlabelled_samples(self) -> Samples | None:
        """Images of the folder `unlabelled`, read on access.

        Raises:
            DataError: it is missing, or holds no image beside those of the splits.
        """
        return None if self._unlabelled is None else _FileSamples(self._further)

    def check(self) -> None:
        """Read all annotations and all images.

        Raises:
            DataError: a split without images, a training set without boxes, or a file that is missing, unreadable or
                not what it should be.
        """
        if not self.class_names or len(set(self.class_names)) < len(self.class_names):
            raise DataError(f"data.classes must be different names, at least one, not {list(self.class_names)}.")
        self.check_filled()
        for split in self.splits:
            entries = self.entries(split)
            twice = [path.name for path, count in Counter(entry.image for entry in entries).items() if count > 1]
            if twice:
                raise DataError(f"{self.name} has {len(twice)} images more than once in {split!r}: {listed(twice)}.")
            # Decoding releases the interpreter lock, so threads do share the work.
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                sizes = list(pool.map(self._size, entries))
            other = [
                f"{entry.image.name} (height x width {_shown(entry.size)}, the file {_shown(size)})"
                for entry, size in zip(entries, sizes, strict=True)
                if entry.size != size
            ]
            if other:
                raise DataError(
                    f"{self.name} states another size than the file has for {len(other)} images in {split!r}: "
                    f"{listed(other)}. Boxes would be in the wrong place: correct the annotations or the images."
                )
        if not any(len(entry.boxes) for entry in self.entries("train")):
            raise DataError(f"{self.name} has no box in 'train': there is nothing to learn.")
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(self._size, self._further))
        super().check()

    def counts(self) -> dict[str, int]:
        """Number of images by split, boxes in all of them, and boxes that were left out."""
        boxes = sum(len(entry.boxes) for split in self.splits for entry in self.entries(split))
        return {**super().counts(), "boxes": boxes, "dropped_boxes": self._dropped}

    def split_hash(self) -> str:
        """SHA-256 over class names, splits, and for each image its file's name and length in bytes and its boxes."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        for split in self.splits:
            for entry in self.entries(split):
                name, length = entry.image.relative_to(self.root).as_posix(), entry.image.stat().st_size
                digest.update(f"{split} {name} {length}\n".encode())
                for part in vars(entry.boxes).values():
                    digest.update(part.numpy().tobytes())
        for entry in self._further:
            digest.update(f"unlabelled {entry.image.name} {entry.image.stat().st_size}\n".encode())
        return digest.hexdigest()

    @functools.cached_property
    def _further(self) -> list[Entry]:
        """The unlabelled images."""
        if self._unlabelled is None:
            return []
        named = {entry.image.resolve() for split in self.splits for entry in self.entries(split)}
        paths = [path for path in ImageFolder(self._unlabelled).paths if path.resolve() not in named]
        if not paths:
            raise DataError(f"data.unlabelled: every image in {self._unlabelled} is one of a split; leave it out.")
        return [Entry(path, make_boxes([], [])) for path in paths]

    def _size(self, entry: Entry) -> tuple[int, int]:
        if not self._check_images:
            return image_size(entry.image)
        height, width = _read(entry.image).shape[1:]
        return height, width


class _FileSamples:
    """Samples read from files."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int, /) -> Sample:
        entry = self._entries[index]
        return _read(entry.image), entry.boxes


def listed(problems: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = len(problems) - _SHOWN
    return ", ".join(problems[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def check_files(paths: Sequence[Path], what: str, layout: str) -> None:
    """Raise `DataError` if one of `paths` is missing: `what` names them."""
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{what} {len(missing)} files that are missing: {listed(missing)} ({layout}).")


def _read(path: Path) -> Tensor:
    return pixels(decode(path, read_bytes(path)))


def _bad(boxes: Boxes, size: tuple[int, int]) -> Tensor:
    """Mask (n,) of the boxes that are no boxes in an image of `size`; a NaN is none either."""
    height, width = size
    start, end = boxes.corners[:, :2], boxes.corners[:, 2:]
    limits = torch.tensor([width, height]) + _SLACK
    good = (end > start) & (start >= -_SLACK) & (end <= limits)
    return ~good.all(dim=1)


def _shown(size: tuple[int, int] | None) -> str:
    return "unknown" if size is None else f"{size[0]}x{size[1]}"
