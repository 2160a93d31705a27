# SPDX-License-Identifier: Apache-2.0
"""Any folder of images and PNG masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdlvfm.data.base import DataError
from kdlvfm.data.files import FileData, Pair
from kdlvfm.data.images import image_files
from kdlvfm.data.labels import read_labels
from kdlvfm.data.palette import distinct_colours
from kdlvfm.data.segmentation import VOID

_LAYOUT = "images are read from SPLIT/images and masks from SPLIT/masks"


class Folder(FileData):
    """Images and masks in a folder of one's own.

        root/train/images/NAME.jpg    root/train/masks/NAME.png
        root/val/images/...           root/val/masks/...
        root/test/images/...          root/test/masks/...      (optional)
        root/unlabelled/images/...                             (optional, training images without masks)

    A mask is a PNG of one channel (a palette is fine) that holds the number of a class for each pixel.

    Args:
        root: the folder; its name is the name of the data set.
        classes: names of the classes, in the order of their numbers.
        palette: a colour (red, green, blue), each 0..255, for each class; `None` chooses distinct ones.
        ignore_value: mask value of pixels that belong to no class.
        licence: licence of the data, for the run record.
        **loader: arguments of `SegmentationData`.

    Raises:
        DataError: classes, palette and ignored value that do not fit each other.
    """

    def __init__(
        self,
        root: str | Path,
        classes: Sequence[str],
        *,
        palette: Sequence[Sequence[int]] | None = None,
        ignore_value: int = VOID,
        licence: str | None = None,
        **loader: Any,
    ) -> None:
        super().__init__(**loader)
        self.root = Path(root)
        self.name = self.root.resolve().name
        self.class_names = tuple(map(str, classes))
        self.licence = licence
        self.ignore_value = ignore_value
        if not 2 <= len(self.class_names) <= VOID or len(set(self.class_names)) != len(self.class_names):
            raise DataError(f"data.classes must be 2 to {VOID} different names, not {list(self.class_names)}.")
        if 0 <= ignore_value < self.num_classes:
            raise DataError(
                f"data.ignore_value={ignore_value} is the number of class {self.class_names[ignore_value]!r}: "
                f"choose a value outside 0 to {self.num_classes - 1}."
            )
        self.palette = (
            distinct_colours(self.num_classes) if palette is None else tuple((r, g, b) for r, g, b in palette)
        )
        if len(self.palette) != self.num_classes:
            raise DataError(f"data.palette has {len(self.palette)} colours for {self.num_classes} classes.")

    @property
    def splits(self) -> tuple[str, ...]:  # type: ignore[override]
        """`train` and `val`, and `test` where the folder has one."""
        return ("train", "val", "test") if (self.root / "test").is_dir() else ("train", "val")

    def labels(self) -> dict[str, Any] | None:
        """Which teacher made the masks, where `kdlvfm label` wrote the folder.

        Raises:
            DataError: it has not come to its end.
        """
        return read_labels(self.root, self.splits)

    def check(self) -> None:
        """Read every file of every part, once.

        Raises:
            DataError: labels that are not finished, or what `FileData.check` finds.
        """
        self.labels()
        super().check()

    def find(self, part: str) -> list[Pair]:
        """List the files of a part, by name.

        Raises:
            DataError: the part is missing or empty, or images and masks do not go together.
        """
        if part == "unlabelled":
            folder = self.root / part / "images"
            return [Pair(path, None) for path in image_files(folder, _LAYOUT).values()] if folder.is_dir() else []
        images, masks = (image_files(self.root / part / kind, _LAYOUT) for kind in ("images", "masks"))
        for name, path in images.items():
            if name not in masks:
                raise DataError(
                    f"{path} has no mask {self.root / part / 'masks' / name}.png: add it, or move the image to "
                    f"{self.root / 'unlabelled' / 'images'}."
                )
        for name, path in masks.items():
            if path.suffix.lower() != ".png":
                raise DataError(f"{path} is not a PNG file: save masks as PNG, which keeps their numbers.")
            if name not in images:
                raise DataError(
                    f"{path} is the mask of no image in {self.root / part / 'images'}: add it or remove this."
                )
        return [Pair(path, masks[name]) for name, path in images.items()]
