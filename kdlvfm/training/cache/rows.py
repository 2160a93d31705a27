# SPDX-License-Identifier: Apache-2.0
"""A file of rows: a table of entries, then as many rows, each under the digest of the image that it belongs to.

An entry is 16 bytes BLAKE2b of the image as the teacher was given it, and the CRC-32 of the row; it is written after
the row, so that a row without one does not count. Files are read and written at offsets and not mapped: a damaged disk,
or a full one, is then an error and no crash.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kdlvfm.training.cache.formats import CacheError

_DIGEST = 16
_ENTRY = _DIGEST + 4
_PAGE = 4096


def image_digest(image: Tensor) -> bytes:
    """Sixteen bytes that tell the pixels of an image (3, H, W) from those of all others."""
    digest = hashlib.blake2b(repr((tuple(image.shape), str(image.dtype))).encode(), digest_size=_DIGEST)
    digest.update(image.contiguous().numpy().data)
    return digest.digest()


class RowError(CacheError):
    """A row that cannot be used.

    Args:
        message: the cause and the cure; alone it must do, since so a loader hands on an error of its workers.
        cause: what is wrong with the row.
    """

    def __init__(self, message: str, cause: str = "") -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True)
class RowFile:
    """Some rows of a tap.

    Attributes:
        path: there need be nothing there yet.
        rows: that it has place for.
        row_bytes: of each.
    """

    path: Path
    rows: int
    row_bytes: int

    def present(self) -> list[int]:
        """The numbers of the rows that are there, in order."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            table = file.read(self.rows * _ENTRY)
        return [at // _ENTRY for at in range(0, len(table), _ENTRY) if table[at : at + _DIGEST].strip(b"\0")]

    def write(self, numbers: Sequence[int], digests: Sequence[bytes], stored: Tensor) -> None:
        """Write rows.

        Args:
            numbers: in this file.
            digests: `image_digest` of their images.
            stored: uint8 (B, row_bytes).

        Raises:
            CacheError: the disk is full, or does not take them for another reason; the rows do not count then.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                for number, digest, data in zip(numbers, digests, stored.cpu().contiguous(), strict=True):
                    content = memoryview(data.numpy())
                    _write_at(descriptor, content, self._offset(number))
                    entry = digest + zlib.crc32(content).to_bytes(4, "little")
                    _write_at(descriptor, memoryview(entry), number * _ENTRY)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CacheError(
                f"{self.path} cannot be written to ({error.strerror}); what was stored before is kept, and the same "
                "command goes on from there."
            ) from error

    def read(self, number: int, digest: bytes) -> tuple[bytearray, str | None]:
        """A row, and what speaks against it: it is missing, of another image than that of the digest, or damaged.

        Raises:
            CacheError: the file cannot be read.
        """
        entry, data = self._bytes(number)
        if not entry.strip(b"\0"):
            return data, "is not stored"
        if entry[:_DIGEST] != digest:
            return data, "is of another image: the data or its augmentation changed since"
        return data, None if self._is_whole(entry, data) else "is damaged"

    def is_whole(self, number: int) -> bool:
        """Whether a row has the checksum that it had when it was written."""
        return self._is_whole(*self._bytes(number))

    def drop(self, number: int) -> None:
        """Take a row out: from now on it is missing."""
        with self.path.open("r+b") as file:
            file.seek(number * _ENTRY)
            file.write(bytes(_ENTRY))

    def _bytes(self, number: int) -> tuple[bytes, bytearray]:
        """The entry of a row, and the row; nothing where there is no file."""
        try:
            with self.path.open("rb", buffering=0) as file:
                entry = os.pread(file.fileno(), _ENTRY, number * _ENTRY)
                data = bytearray(self.row_bytes)
                length = os.preadv(file.fileno(), [data], self._offset(number))
        except FileNotFoundError:
            return b"", bytearray()
        except OSError as error:
            raise CacheError(f"{self.path} cannot be read ({error.strerror}).") from error
        return entry, data[:length] if length < len(data) else data

    def _is_whole(self, entry: bytes, data: bytearray) -> bool:
        return len(data) == self.row_bytes and zlib.crc32(data).to_bytes(4, "little") == entry[_DIGEST:]

    def _offset(self, number: int) -> int:
        table = -(-self.rows * _ENTRY // _PAGE) * _PAGE
        return table + number * self.row_bytes


def _write_at(descriptor: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written
