# SPDX-License-Identifier: Apache-2.0
"""A folder of images and nothing else, such as photographs from the web."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from kdlvfm.data.base import DataError
from kdlvfm.data.images import IMAGE_SUFFIXES, decode, pixels, read_bytes


class ImageFolder:
    """The images of a folder and of the folders in it, in the order of their names, decoded when they are asked for.

    Other files are passed over.

    Args:
        root: the folder.

    Attributes:
        paths: the files.

    Raises:
        DataError: it is missing, or holds no image.
    """

    def __init__(self, root: str | Path) -> None:
        folder = Path(root)
        if not folder.is_dir():
            raise DataError(f"{folder} is missing: name a folder of images.")
        self.paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not self.paths:
            raise DataError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)}): put some there.")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """An image, uint8 (3, H, W).

        Raises:
            DataError: the file cannot be read, or is no image.
        """
        path = self.paths[index]
        return pixels(decode(path, read_bytes(path)))
