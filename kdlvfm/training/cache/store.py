# SPDX-License-Identifier: Apache-2.0
"""The folder of a cache: what it is of, and its rows, each under the checksum of the image that it belongs to.

    index.json                          what the features are of
    map.-1.fp16.json                    the form of a tap's rows, and what storing them cost
    shards/00000/map.-1.fp16.bin        a table of `shard_rows` entries, then as many rows
    shards/00000/lock                   there while a process computes rows of the shard

Row `view * samples + sample` has the features of a view of a sample. Its entry is 16 bytes BLAKE2b of the image as the
teacher was given it, and the CRC-32 of the row; it is written after the row, so that a row without one does not count.
Files are read and written at offsets and not mapped: a damaged disk, or a full one, is then an error and no crash.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor
from typing_extensions import Self

from kdlvfm.training.cache.formats import CacheError, TapFormat

SCHEMA = "kdlvfm.teacher_cache/1"
INDEX = "index.json"
SHARDS = "shards"
SHARD_ROWS = 1024

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
class CacheStore:
    """A cache on disk.

    Attributes:
        folder: where it is.
        samples: training samples of the data.
        shard_rows: rows in a file.
        description: what decides the features: teacher, precision, data, augmentation, seed.
        config: nodes of the configuration from which teacher and data can be built again.
        facts: when and with which versions of which libraries the cache was begun.
    """

    folder: Path
    samples: int
    shard_rows: int
    description: Mapping[str, Any]
    config: Mapping[str, Any]
    facts: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The cache in a folder.

        Raises:
            CacheError: there is none, or its index cannot be read.
        """
        path = folder / INDEX
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise CacheError(f"{path} is of schema {content['schema']}; this version reads {SCHEMA}.")
            rest = {name: dict(content[name]) for name in ("description", "config", "facts")}
            return cls(folder, int(content["samples"]), int(content["shard_rows"]), **rest)
        except OSError as error:
            raise CacheError(f"{folder} is no teacher cache: {INDEX} cannot be read ({error.strerror}).") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise CacheError(f"{path} is no index of a teacher cache ({type(error).__name__}: {error}).") from error
        except ValueError as error:
            if isinstance(error, CacheError):
                raise
            raise CacheError(f"{path} is no JSON file ({error}).") from error

    def write_index(self) -> None:
        """Make the folder, and say in it what the cache is of.

        Raises:
            CacheError: it cannot be written to.
        """
        parts = {name: dict(vars(self)[name]) for name in ("description", "config", "facts")}
        numbers = {"schema": SCHEMA, "samples": self.samples, "shard_rows": self.shard_rows}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"{self.folder} cannot be made ({error.strerror}).") from error
        _write_json(self.folder / INDEX, {**numbers, **parts})

    def formats(self) -> dict[str, tuple[TapFormat, dict[str, float]]]:
        """What is stored: the form of each tap's rows by file name, and the error that was measured."""
        found = {}
        for path in sorted(self.folder.glob("*.json")):
            if path.name != INDEX:
                found[path.stem] = self._read_format(path)
        return found

    def format(self, tap: str, dtype: str) -> TapFormat | None:
        """The form of a tap's rows in a dtype; `None` if there are none.

        Raises:
            CacheError: the file that says so cannot be read.
        """
        path = self.folder / f"{_file_name(tap, dtype)}.json"
        return self._read_format(path)[0] if path.exists() else None

    def add_format(self, format: TapFormat, error: Mapping[str, float], images: int) -> None:
        """Note the form of a tap's rows, and the error of storing some images."""
        path = self.folder / f"{_file_name(format.tap, format.dtype)}.json"
        _write_json(path, {**format.plain(), "measured_error": {**error, "images": images}})

    def _read_format(self, path: Path) -> tuple[TapFormat, dict[str, float]]:
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
            return TapFormat.read(plain), dict(plain["measured_error"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{path} cannot be read ({type(error).__name__}: {error}): remove the cache.") from error

    def row(self, view: int, sample: int) -> int:
        """The number of a row."""
        return view * self.samples + sample

    def by_shard(self, rows: Iterable[int]) -> dict[int, list[int]]:
        """Rows in order, by the number of their shard."""
        found: dict[int, list[int]] = {}
        for row in sorted(rows):
            found.setdefault(row // self.shard_rows, []).append(row)
        return found

    def shard(self, number: int) -> Path:
        """The folder of a shard."""
        return self.folder / SHARDS / f"{number:05d}"

    def stored(self, format: TapFormat) -> list[int]:
        """The rows that are there."""
        name = f"{_file_name(format.tap, format.dtype)}.bin"
        shards = sorted(int(path.parent.name) for path in (self.folder / SHARDS).glob(f"*/{name}"))
        return [row for shard in shards for row in self._present(format, shard)]

    def missing(self, format: TapFormat, rows: Iterable[int]) -> list[int]:
        """Those of `rows` that are not there."""
        found = []
        for shard, wanted in self.by_shard(rows).items():
            present = self._present(format, shard)
            found += [row for row in wanted if row not in present]
        return found

    def _present(self, format: TapFormat, shard: int) -> dict[int, None]:
        """The rows of a shard that are there, in order."""
        path = self._file(format, shard)
        if not path.exists():
            return {}
        with path.open("rb") as file:
            table = file.read(self.shard_rows * _ENTRY)
        entries = (table[at : at + _DIGEST] for at in range(0, len(table), _ENTRY))
        return {shard * self.shard_rows + i: None for i, entry in enumerate(entries) if entry.strip(b"\0")}

    def write(self, format: TapFormat, rows: Sequence[int], digests: Sequence[bytes], stored: Tensor) -> None:
        """Write rows of one shard.

        Args:
            format: of the tap.
            rows: their numbers.
            digests: `image_digest` of their images.
            stored: uint8 (B, row_bytes), as `TapFormat.encode` gives it.

        Raises:
            CacheError: the disk is full, or does not take them for another reason; the rows do not count then.
        """
        (shard,) = {row // self.shard_rows for row in rows}
        path = self._file(format, shard)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                for row, digest, data in zip(rows, digests, stored.cpu().contiguous(), strict=True):
                    content = memoryview(data.numpy())
                    _write_at(descriptor, content, self._offset(format, row))
                    entry = digest + zlib.crc32(content).to_bytes(4, "little")
                    _write_at(descriptor, memoryview(entry), row % self.shard_rows * _ENTRY)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CacheError(
                f"{path} cannot be written to ({error.strerror}); what was stored before is kept, and the same command "
                "goes on from there."
            ) from error

    def read(self, format: TapFormat, row: int, digest: bytes) -> Tensor:
        """A row, uint8 (row_bytes,), if it is whole and belongs to the image of this digest.

        Raises:
            RowError: it is not there, damaged, or of another image.
            CacheError: its file cannot be read.
        """
        entry, data = self._bytes(format, row)
        if entry[:_DIGEST] == digest and _is_whole(format, entry, data):
            return torch.frombuffer(data, dtype=torch.uint8)
        if not entry.strip(b"\0"):
            cause = "is not stored"
        elif entry[:_DIGEST] != digest:
            cause = "is of another image: the data or its augmentation changed since"
        else:
            cause = "is damaged"
        raise RowError(
            f"{self.folder}: view {row // self.samples} of sample {row % self.samples} at {format.tap} {cause}. kdlvfm "
            f"cache verify {self.folder} --all --drop takes out what is wrong; teacher_cache=build computes it again.",
            cause,
        )

    def is_whole(self, format: TapFormat, row: int) -> bool:
        """Whether a row has the checksum that it had when it was written."""
        return _is_whole(format, *self._bytes(format, row))

    def drop(self, format: TapFormat, row: int) -> None:
        """Take a row out: from now on it is missing."""
        with self._file(format, row // self.shard_rows).open("r+b") as file:
            file.seek(row % self.shard_rows * _ENTRY)
            file.write(bytes(_ENTRY))

    def _bytes(self, format: TapFormat, row: int) -> tuple[bytes, bytearray]:
        """The entry of a row, and the row; nothing where there is no file."""
        path = self._file(format, row // self.shard_rows)
        try:
            with path.open("rb", buffering=0) as file:
                entry = os.pread(file.fileno(), _ENTRY, row % self.shard_rows * _ENTRY)
                data = bytearray(format.row_bytes)
                length = os.preadv(file.fileno(), [data], self._offset(format, row))
        except FileNotFoundError:
            return b"", bytearray()
        except OSError as error:
            raise CacheError(f"{path} cannot be read ({error.strerror}).") from error
        return entry, data[:length] if length < len(data) else data

    def _file(self, format: TapFormat, shard: int) -> Path:
        return self.shard(shard) / f"{_file_name(format.tap, format.dtype)}.bin"

    def _offset(self, format: TapFormat, row: int) -> int:
        table = -(-self.shard_rows * _ENTRY // _PAGE) * _PAGE
        return table + row % self.shard_rows * format.row_bytes


def _file_name(tap: str, dtype: str) -> str:
    """The name of a tap's files; a tap may hold a slash or a colon."""
    return f"{quote(tap, safe='')}.{dtype}"


def _is_whole(format: TapFormat, entry: bytes, data: bytearray) -> bool:
    return len(data) == format.row_bytes and zlib.crc32(data).to_bytes(4, "little") == entry[_DIGEST:]


def _write_at(descriptor: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file in one piece."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise CacheError(f"{path} cannot be written ({error.strerror}).") from error
