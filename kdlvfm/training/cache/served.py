# SPDX-License-Identifier: Apache-2.0
"""Reading a cache: what comes with each training sample, and what stands in the teacher's place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from kdlvfm.core import Teacher
from kdlvfm.training.cache.formats import CacheError, TapFormat
from kdlvfm.training.cache.rows import image_digest
from kdlvfm.training.cache.source import Key
from kdlvfm.training.cache.store import CacheStore


@dataclass(frozen=True)
class StoredFeatures:
    """Gives every training sample its rows of a cache: the companion of the data in a run that reads one.

    Attributes:
        store: the cache.
        formats: of the taps that the run reads.
    """

    store: CacheStore
    formats: Sequence[TapFormat]

    def __call__(self, key: Key, image: Tensor) -> dict[str, Tensor]:
        """Rows, uint8 (row_bytes,), by tap.

        Args:
            key: view and index of the sample.
            image: float (3, H, W) in [0, 1], as the student sees it.

        Raises:
            CacheError: a row is missing, damaged, or of another image.
        """
        row, digest = self.store.row(*key), image_digest(image)
        return {format.tap: self.store.read(format, row, digest) for format in self.formats}


class CachedTeacher(Teacher):
    """Gives the features that were stored of a batch's images, and refuses whatever else is asked of a teacher.

    The network itself stays where it is, usually in the memory of the CPU; it still says which taps it has.

    Args:
        teacher: whose features they are.
        formats: of the taps that are stored.
    """

    def __init__(self, teacher: Teacher, formats: Sequence[TapFormat]) -> None:
        super().__init__(teacher.model)
        self._formats = {format.tap: format for format in formats}
        self._images: Tensor | None = None
        self._stored: Mapping[str, Tensor] = {}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        nn.Module._apply(self, fn, recurse)  # type: ignore[no-untyped-call]  # not the network, which has no work here
        return self

    def hold(self, images: Tensor, stored: Mapping[str, Tensor]) -> None:
        """Take over the next batch.

        Args:
            images: (B, 3, H, W); features are given for this very tensor and no other.
            stored: rows of these images, uint8 (B, row_bytes), by tap.
        """
        self._images, self._stored = images, stored

    def forward(
        self, images: Tensor, taps: Collection[str], *, input_grad: bool = False, timesteps: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The stored features of the batch's images, one entry for each tap.

        Raises:
            CacheError: other images, other taps, or a gradient: a network would be needed.
        """
        unknown = [tap for tap in taps if tap not in self._formats]
        if input_grad or unknown or images is not self._images or timesteps is not None:
            asked = "a gradient" if input_grad else f"{unknown[0]}" if unknown else "features of images of its own"
            raise CacheError(
                f"the distiller asks the teacher for {asked}, which the cache does not have: run it with "
                "teacher_cache=none. A method that does so must set `calls_teacher`."
            )
        return {tap: self._formats[tap].decode(self._stored[tap]) for tap in taps}
