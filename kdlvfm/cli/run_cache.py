# SPDX-License-Identifier: Apache-2.0
"""The teacher cache of one run, which several processes fill together."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kdlvfm.cli.lock import RunLock, RunTakenError, leads, owner
from kdlvfm.core import Teacher
from kdlvfm.data.base import SampleData
from kdlvfm.data.sampler import SampleKey
from kdlvfm.training.cache.compute import compute, storing_error
from kdlvfm.training.cache.formats import TapFormat
from kdlvfm.training.cache.projection import fit
from kdlvfm.training.cache.served import CachedTeacher, StoredFeatures
from kdlvfm.training.cache.source import FeatureSource, Key
from kdlvfm.training.cache.store import CacheStore

_FITTED = 256  # images, at most, to which principal components are fitted: each gives as many vectors as positions
_TELLS = 10.0  # seconds between two lines about progress
_PAUSE = 1.0  # seconds between two looks at what others compute


@dataclass
class RunCache:
    """The cache of one run.

    Attributes:
        store: where it is.
        source: what its features are made of.
        formats: of the taps that the run reads; with principal components once `fill` was called.
        keys: view and sample of each row that the run reads.
        views: of each sample, as the run was told.
        computed: images computed by this process.
        seconds: that took it, waiting for other processes included.
    """

    store: CacheStore
    source: FeatureSource
    formats: list[TapFormat]
    keys: dict[int, Key]
    views: int | None
    computed: int = 0
    seconds: float = 0.0
    _waiting: set[str] = field(default_factory=set)

    def serve(self, data: SampleData) -> Teacher:
        """Let `data` bring the stored features along, all of which are there; what then takes the teacher's place."""
        # Workers read rows and decode none: they need no components, which the teacher's stand-in may hold on a GPU.
        data.companion = StoredFeatures(self.store, [replace(format, projection=None) for format in self.formats])
        return CachedTeacher(self.source.teacher, self.formats)

    def missing(self) -> dict[TapFormat, list[int]]:
        """Rows that are not there, by tap; a tap of which all are there is left out."""
        found = {format: self.store.missing(format, self.keys) for format in self.formats}
        return {format: rows for format, rows in found.items() if rows}

    def fill(self) -> dict[str, Any]:
        """Compute what is missing, while other processes may do the same, and return what a record says of the cache.

        Raises:
            CacheError: the disk is almost full, or an image is not what others were.
        """
        began = time.perf_counter()
        self._fit()
        filling = shown = time.perf_counter()
        missing = self.missing()
        total = len(union(missing))
        while missing:
            before = self.computed
            for shard, rows in self.store.by_shard(union(missing)).items():
                for count in self._fill_shard(shard, rows):
                    self.computed += count
                    if leads() and time.perf_counter() - shown > _TELLS:
                        shown = time.perf_counter()
                        left = (shown - filling) * (total / self.computed - 1)
                        print(f"cache      {self.computed}/{total} images, {shown_seconds(left)} left", flush=True)
            missing = self.missing()
            if missing and self.computed == before:
                time.sleep(_PAUSE)
        self.source.teacher.cpu()
        self.seconds = time.perf_counter() - began
        if leads() and total:
            print(f"cache      complete, {self.computed} images computed in {self.seconds:.0f} s", flush=True)
        return self.facts()

    def _fit(self) -> None:
        """Fit the principal components that are not there, unless another process does: then wait for them."""
        waited = False
        while lacking := [format for format in self.formats if self.store.format(*format.key) is None]:
            waited = True
            try:
                with RunLock(self.store.folder):
                    lacking = [format for format in lacking if self.store.format(*format.key) is None]
                    if lacking:
                        self._fit_here(lacking)
            except RunTakenError:
                self._tell_other(self.store.folder)
                time.sleep(_PAUSE)
        self.formats = [self.store.fitted(format) for format in self.formats]
        for format in self.formats:
            if waited and leads() and format.projection is not None:
                kept = f"{100 * format.projection.variance:.1f} %"
                print(f"cache      {format.tap}: the components keep {kept} of the variance", flush=True)

    def _fit_here(self, formats: list[TapFormat]) -> None:
        """Fit what no other dtype of the same taps has, and note what storing costs."""
        new = [format for format in formats if self.store.fitted(format).projection is None]
        keys = fitting_keys(self.store.samples)
        if new and leads():
            print(f"cache      fitting {new[0].pca} principal components to {len(keys)} images", flush=True)
        for format, projection in (fit(self.source, new, keys) if new else {}).items():
            self.store.add_components(format, projection)
        fitted = [self.store.fitted(format) for format in formats]
        errors, images = storing_error(self.source, fitted, list(self.keys.values()))
        for format, error in errors.items():
            if format.projection is not None:
                error["variance"] = format.projection.variance
            self.store.add_format(format, error, images)

    def _tell_other(self, folder: Path) -> None:
        """Name the process that has a folder, once."""
        other = owner(folder)
        if leads() and other is not None and other not in self._waiting:
            self._waiting.add(other)
            print(f"cache      {other} computes a part of it", flush=True)

    def _fill_shard(self, shard: int, rows: list[int]) -> Iterator[int]:
        """Compute what is missing of some rows of a shard; nothing while another process has it."""
        folder = self.store.shard(shard)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with RunLock(folder):
                found = {format: self.store.missing(format, rows) for format in self.formats}
                missing = {format: rows for format, rows in found.items() if rows}
                if missing:
                    yield from compute(self.store, self.source, missing, self.keys)
        except RunTakenError:
            self._tell_other(folder)

    def facts(self) -> dict[str, Any]:
        """What the record of a run says."""
        return {
            "hash": digest_of(self.store.description),
            "folder": str(self.store.folder),
            "dtype": self.formats[0].dtype,
            "pca": self.formats[0].pca,
            "views": self.views,
            "images": len(self.keys),
            "bytes_per_image": sum(format.row_bytes for format in self.formats),
            "computed": self.computed,
            "seconds": self.seconds,
        }


def fitting_keys(samples: int) -> list[SampleKey]:
    """The first views of evenly spaced training samples, `_FITTED` or all if there are fewer.

    They follow from the data alone. So the components do not depend on which run came first, and how long it is.
    """
    count = min(_FITTED, samples)
    return [SampleKey(0, samples * i // count) for i in range(count)]


def digest_of(description: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that name a cache: two descriptions that share them are equal."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:12]


def shown_seconds(seconds: float) -> str:
    """A duration for people."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def union(rows: Mapping[Any, Any]) -> list[int]:
    """All rows once, in order."""
    return sorted({row for wanted in rows.values() for row in wanted})
