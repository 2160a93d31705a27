# SPDX-License-Identifier: Apache-2.0
"""What each image adds to the scores of a run: written beside its record, read where images are drawn anew."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdlvfm.core.distributed import world_size
from kdlvfm.reporting.record import Record

FILE = "per_image.npz"

Counts = NDArray[np.uint32]


class PerImage:
    """Collects what the images of a split add to its scores, from `Task.per_image` of each batch."""

    def __init__(self) -> None:
        self._found: dict[int, dict[str, Counts]] = {}

    def add(self, index: Tensor, results: Mapping[str, Tensor] | None) -> None:
        """One batch: the number of each image in its split, (B,), and what they add, (B, ...) by name, if anything."""
        if results is None:
            return
        arrays = {name: values.cpu().numpy().astype(np.uint32) for name, values in results.items()}
        for place, image in enumerate(index.tolist()):
            self._found[image] = {name: values[place] for name, values in arrays.items()}

    def arrays(self) -> dict[str, Counts]:
        """The images of all processes in order: their numbers, `index`, and (n, ...) by name; empty without any.

        Every process must call it.
        """
        found = self._found
        if world_size() > 1:
            parts: list[Any] = [None] * world_size()
            torch.distributed.all_gather_object(parts, self._found)
            # What fills up the last round has no labels, and repeats an image that a process of lower rank has.
            found = {image: counts for part in reversed(parts) for image, counts in part.items()}
        images = sorted(found)
        if not images:
            return {}
        stacked = {name: np.stack([found[image][name] for image in images]) for name in found[images[0]]}
        return {"index": np.asarray(images, dtype=np.uint32), **stacked}


def write_per_image(folder: Path, splits: Mapping[str, Mapping[str, Counts]]) -> dict[str, str] | None:
    """Write the arrays of all splits to one file; what the record says of it, `None` if there is nothing to write."""
    named = {f"{split}.{name}": values for split, arrays in splits.items() for name, values in arrays.items()}
    if not named:
        return None
    stream = io.BytesIO()
    np.savez_compressed(stream, allow_pickle=False, **named)
    content = stream.getvalue()
    temporary = folder / f".{FILE}.{os.getpid()}.tmp"
    temporary.write_bytes(content)
    temporary.replace(folder / FILE)
    return {"file": FILE, "sha256": hashlib.sha256(content).hexdigest()}


@dataclass(frozen=True)
class PixelCounts:
    """Labelled pixels of each image by class.

    Attributes:
        index: (n,), the number of each image in its split.
        truth: (n, K), pixels of the class.
        predicted: (n, K), pixels that were taken for it.
        hits: (n, K), pixels that are both.
    """

    index: Counts
    truth: Counts
    predicted: Counts
    hits: Counts

    def same_images(self, other: PixelCounts) -> bool:
        """Whether both are of the same images with the same ground truth."""
        return np.array_equal(self.index, other.index) and np.array_equal(self.truth, other.truth)

    def scorer(self, metric: str) -> Callable[[NDArray[np.float64]], NDArray[np.float64]] | None:
        """From weights of the images, (resamples, n), to the metric of each resample; `None` for another metric.

        The metrics are those of `kdlvfm.tasks.segmentation.SegmentationMetrics`: `miou` leaves out classes that are
        neither in the ground truth nor predicted, `pixel_accuracy` is over all labelled pixels.
        """
        return {"miou": self._miou, "pixel_accuracy": self._pixel_accuracy}.get(metric)

    def _miou(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        hits, either = weights @ self.hits, weights @ (self.truth.astype(np.float64) + self.predicted - self.hits)
        present = either > 0
        shares: NDArray[np.float64] = np.divide(hits, either, out=np.zeros_like(hits), where=present)
        return _ratio(shares.sum(axis=1), present.sum(axis=1))

    def _pixel_accuracy(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return _ratio((weights @ self.hits).sum(axis=1), (weights @ self.truth).sum(axis=1))


def _ratio(above: NDArray[np.float64], below: NDArray[Any]) -> NDArray[np.float64]:
    share: NDArray[np.float64] = np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)
    return share


def read_pixel_counts(folder: Path, record: Record, split: str) -> PixelCounts | None:
    """The counts of a run on a split; `None` if its record names no such file, or the file has no such split.

    Raises:
        ValueError: the file is missing or is not the one that the record names; the message is one line.
    """
    named = record.get("per_image")
    if named is None:
        return None
    path = folder / named["file"]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    if hashlib.sha256(content).hexdigest() != named["sha256"]:
        raise ValueError(f"{path} is not the file that the record names (another checksum)")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            parts = ("index", "truth", "predicted", "hits")
            if not all(f"{split}.{part}" in arrays for part in parts):
                return None
            return PixelCounts(*(arrays[f"{split}.{part}"] for part in parts))
    except (BadZipFile, ValueError) as error:
        raise ValueError(f"{path} is no file of counts ({error})") from error
