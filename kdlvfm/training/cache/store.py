# SPDX-License-Identifier: Apache-2.0
"""The folder of a cache: what it is of, and its rows, each under the checksum of the image that it belongs to.

    index.json                          what the features are of
    map.-1.fp16.json                    the form of a tap's rows, and what storing them cost
    map.-1.pca128.safetensors           principal components, where they are stored instead of channels
    shards/00000/map.-1.fp16.bin        a table of `shard_rows` entries, then as many rows
    shards/00000/lock                   there while a process computes rows of the shard

Row `view * samples + sample` has the features of a view of a sample.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import Self

from kdlvfm.training.cache.formats import CacheError, TapFormat
from kdlvfm.training.cache.projection import Projection
from kdlvfm.training.cache.rows import RowError, RowFile

SCHEMA = "kdlvfm.teacher_cache/1"
INDEX = "index.json"
SHARDS = "shards"
SHARD_ROWS = 1024


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

    def format(self, tap: str, dtype: str, pca: int | None = None) -> TapFormat | None:
        """The form of a tap's rows in a dtype, and with so many principal components; `None` if there are none.

        Raises:
            CacheError: the file that says so cannot be read.
        """
        path = self.folder / f"{_file_name(tap, dtype, pca)}.json"
        return self._read_format(path)[0] if path.exists() else None

    def add_format(self, format: TapFormat, error: Mapping[str, float], images: int) -> None:
        """Note the form of a tap's rows, and the error of storing some images."""
        path = self.folder / f"{_file_name(format.tap, format.dtype, format.pca)}.json"
        _write_json(path, {**format.plain(), "measured_error": {**error, "images": images}})

    def _read_format(self, path: Path) -> tuple[TapFormat, dict[str, float]]:
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
            format = self.fitted(TapFormat.read(plain))
            if format.projected and format.projection is None:
                raise ValueError(f"{self._components(format).name} is gone")
            return format, dict(plain["measured_error"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, CacheError):
                raise
            raise CacheError(f"{path} cannot be read ({type(error).__name__}: {error}): remove the cache.") from error

    def fitted(self, format: TapFormat) -> TapFormat:
        """The format with its principal components, if it has any and they are there.

        Raises:
            CacheError: their file cannot be read.
        """
        path = self._components(format)
        if not format.projected or not path.exists():
            return format
        try:
            return format.with_projection(Projection.of_tensors(load_file(path), format))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CacheError(f"{path} cannot be read ({type(error).__name__}: {error}): remove the cache.") from error

    def add_components(self, format: TapFormat, projection: Projection) -> None:
        """Keep the principal components of a tap, which all its dtypes share.

        Raises:
            CacheError: they cannot be written.
        """
        path = self._components(format)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file(projection.tensors(), temporary)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            raise CacheError(f"{path} cannot be written ({error}).") from error

    def _components(self, format: TapFormat) -> Path:
        return self.folder / f"{quote(format.tap, safe='')}.pca{format.pca}.safetensors"

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
        name = f"{_file_name(format.tap, format.dtype, format.pca)}.bin"
        shards = sorted(int(path.parent.name) for path in (self.folder / SHARDS).glob(f"*/{name}"))
        return [row for shard in shards for row in self._present(format, shard)]

    def missing(self, format: TapFormat, rows: Iterable[int]) -> list[int]:
        """Those of `rows` that are not there."""
        found = []
        for shard, wanted in self.by_shard(rows).items():
            present = {*self._present(format, shard)}
            found += [row for row in wanted if row not in present]
        return found

    def _present(self, format: TapFormat, shard: int) -> list[int]:
        """The rows of a shard that are there, in order."""
        return [shard * self.shard_rows + number for number in self._file(format, shard).present()]

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
        self._file(format, shard).write([row % self.shard_rows for row in rows], digests, stored)

    def read(self, format: TapFormat, row: int, digest: bytes) -> Tensor:
        """A row, uint8 (row_bytes,), if it is whole and belongs to the image of this digest.

        Raises:
            RowError: it is not there, damaged, or of another image.
            CacheError: its file cannot be read.
        """
        shard, number = divmod(row, self.shard_rows)
        data, cause = self._file(format, shard).read(number, digest)
        if cause is None:
            return torch.frombuffer(data, dtype=torch.uint8)
        raise RowError(
            f"{self.folder}: view {row // self.samples} of sample {row % self.samples} at {format.tap} {cause}. kdlvfm "
            f"cache verify {self.folder} --all --drop takes out what is wrong; teacher_cache=build computes it again.",
            cause,
        )

    def is_whole(self, format: TapFormat, row: int) -> bool:
        """Whether a row has the checksum that it had when it was written."""
        shard, number = divmod(row, self.shard_rows)
        return self._file(format, shard).is_whole(number)

    def drop(self, format: TapFormat, row: int) -> None:
        """Take a row out: from now on it is missing."""
        shard, number = divmod(row, self.shard_rows)
        self._file(format, shard).drop(number)

    def _file(self, format: TapFormat, shard: int) -> RowFile:
        path = self.shard(shard) / f"{_file_name(format.tap, format.dtype, format.pca)}.bin"
        return RowFile(path, self.shard_rows, format.row_bytes)


def _file_name(tap: str, dtype: str, pca: int | None) -> str:
    """The name of a tap's files; a tap may hold a slash or a colon."""
    return f"{quote(tap, safe='')}.{dtype}{'' if pca is None else f'.pca{pca}'}"


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file in one piece."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise CacheError(f"{path} cannot be written ({error.strerror}).") from error
