# SPDX-License-Identifier: Apache-2.0
"""Reading images from files."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from kdlvfm.data.base import DataError

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_ORIENTATION, _FIRST_TURNED = 0x0112, 5  # EXIF: values from 5 on exchange width and height


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): restore the file or its permissions.") from error


def decode(path: Path, content: bytes) -> Image.Image:
    """The image that the content of a file holds, as it was stored.

    Raises:
        DataError: it holds none.
    """
    try:
        file = Image.open(io.BytesIO(content))
        file.load()
    except Exception as error:  # Pillow's decoders raise errors of many kinds on broken files
        cause = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{path} is not a readable image ({cause}): restore the file or remove the sample.") from error
    return file


def pixels(file: Image.Image) -> Tensor:
    """An image as one sees it, uint8 (3, H, W)."""
    # Cameras store turned photographs with a note; masks and boxes are drawn on what one sees.
    seen = ImageOps.exif_transpose(file).convert("RGB")
    return torch.from_numpy(np.array(seen)).permute(2, 0, 1).contiguous()


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image as one sees it; only the beginning of the file is read.

    Raises:
        DataError: the file cannot be read, or is no image.
    """
    try:
        with Image.open(path) as file:
            width, height = file.size
            turned = file.getexif().get(_ORIENTATION, 1) >= _FIRST_TURNED
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} is not a readable image ({error}): restore the file or remove the sample.") from error
    return (width, height) if turned else (height, width)


def image_files(folder: Path, layout: str) -> dict[str, Path]:
    """Image files of a folder by name without suffix, sorted; hidden files are passed over.

    Args:
        folder: where to look.
        layout: where files are expected, for the error.

    Raises:
        DataError: the folder is missing or empty, or holds something else.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is missing: {layout}.")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise DataError(f"{path} is not an image file ({', '.join(IMAGE_SUFFIXES)}): move it elsewhere.")
        if path.stem in files:
            raise DataError(f"{files[path.stem]} and {path} have the same name: rename one of them.")
        files[path.stem] = path
    if not files:
        raise DataError(f"{folder} is empty: put images there.")
    return files


def sha256(content: bytes) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
