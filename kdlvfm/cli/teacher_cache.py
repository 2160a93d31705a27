# SPDX-License-Identifier: Apache-2.0
"""The teacher cache of a run: which one it is, whether it can be, how large it is, and filling it with others."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from kdlvfm.cli.lock import RunLock, RunTakenError, leads, owner
from kdlvfm.core import Distiller, Task, Teacher
from kdlvfm.data.base import SampleData
from kdlvfm.reporting.record import environment, now
from kdlvfm.training.cache.compute import check_space, compare, compute, measure, shown_bytes
from kdlvfm.training.cache.formats import DTYPES, CacheError, TapFormat
from kdlvfm.training.cache.served import CachedTeacher, StoredFeatures
from kdlvfm.training.cache.source import FeatureSource, Key, check_precision, check_replay, weights_hash
from kdlvfm.training.cache.store import INDEX, SHARD_ROWS, CacheStore

MODES = ("none", "build", "read")

# Settings of data that change nothing about a training image. What is in the files is in the hash of the splits.
_NOT_SEEN = {"root", "batch_size", "steps", "eval_batch_size", "num_workers", "labelled_per_batch", "seed"}
_NOT_SEEN |= {"augment_on_device"}  # never on where there is a cache
_COMPARED = 4  # images of a cache that was there before
_TELLS = 10.0  # seconds between two lines about progress
_PAUSE = 1.0  # seconds between two looks at what others compute


@dataclass
class RunCache:
    """The cache of one run.

    Attributes:
        store: where it is.
        source: what its features are made of.
        formats: of the taps that the run reads.
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
        """Let `data` bring the stored features along; what then takes the teacher's place."""
        data.companion = StoredFeatures(self.store, self.formats)
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
        began = shown = time.perf_counter()
        missing = self.missing()
        total = len(_union(missing))
        while missing:
            before = self.computed
            for shard, rows in self.store.by_shard(_union(missing)).items():
                for count in self._fill_shard(shard, rows):
                    self.computed += count
                    if leads() and time.perf_counter() - shown > _TELLS:
                        shown = time.perf_counter()
                        left = (shown - began) * (total / self.computed - 1)
                        print(f"cache      {self.computed}/{total} images, {shown_seconds(left)} left", flush=True)
            missing = self.missing()
            if missing and self.computed == before:
                time.sleep(_PAUSE)
        self.source.teacher.cpu()
        self.seconds = time.perf_counter() - began
        if leads() and total:
            print(f"cache      complete, {self.computed} images computed in {self.seconds:.0f} s", flush=True)
        return self.facts()

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
            other = owner(folder)
            if leads() and other is not None and other not in self._waiting:
                self._waiting.add(other)
                print(f"cache      {other} computes a part of it", flush=True)

    def facts(self) -> dict[str, Any]:
        """What the record of a run says."""
        return {
            "hash": digest_of(self.store.description),
            "folder": str(self.store.folder),
            "dtype": self.formats[0].dtype,
            "views": self.views,
            "images": len(self.keys),
            "bytes_per_image": sum(format.row_bytes for format in self.formats),
            "computed": self.computed,
            "seconds": self.seconds,
        }


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise `CacheError` for a mode or a dtype that there is not."""
    for key, choices in (("mode", MODES), ("dtype", DTYPES)):
        if settings[key] not in choices:
            raise CacheError(f"teacher_cache.{key} must be {', '.join(choices)}, not {settings[key]!r}.")


def prepare(
    config: Mapping[str, Any], data: SampleData, task: Task, teacher: Teacher | None, distiller: Distiller
) -> RunCache | None:
    """The cache that a configuration asks for; `None` for a run without one, such as a baseline.

    Everything that speaks against it is found here, before any of it is computed.

    Raises:
        CacheError: the cause, and what to change.
    """
    settings = config["teacher_cache"]
    check_settings(settings)
    if settings["mode"] == "none" or teacher is None or not distiller.teacher_taps:
        return None
    check_precision(str(config["trainer"]["precision"]))
    if distiller.calls_teacher:
        raise CacheError(
            f"{config['choices']['distiller']} needs more of the teacher than its features of the training images, so "
            "no cache can take the teacher's place: set teacher_cache=none."
        )
    device, processes = _place(config["trainer"])
    size = max(1, data.batch_size // processes)
    source = FeatureSource(data, task, teacher, device, str(config["trainer"]["precision"]), size)
    keys: list[Key] = sorted({key for batch in data.sampler() for key in batch})
    store = _store(config, source, data, check_replay(source, keys))
    rows = {store.row(*key): key for key in keys}
    known = {tap: store.format(tap, settings["dtype"]) for tap in dict.fromkeys(distiller.teacher_taps)}
    lacking = {tap: rows if format is None else store.missing(format, rows) for tap, format in known.items()}
    if settings["mode"] == "read" and any(lacking.values()):
        tap = max(lacking, key=lambda tap: len(lacking[tap]))
        raise CacheError(
            f"{store.folder} lacks {len(lacking[tap])} of {len(rows)} images at {tap}: teacher_cache=build computes "
            "them."
        )
    if any(lacking.values()):
        wanted = {row: rows[row] for row in _union(lacking)}
        _begin(store, source, known, lacking, wanted, settings["dtype"], endless=data.distinct_views is None)
    elif leads():
        print(f"cache      {', '.join(known)} of {len(rows)} images, all in {store.folder}")
    formats = [format for format in known.values() if format is not None]
    cache = RunCache(store, source, formats, rows, data.distinct_views)
    if leads():
        _compare(cache)
    teacher.cpu()
    return cache


def _begin(
    store: CacheStore,
    source: FeatureSource,
    known: dict[str, TapFormat | None],
    lacking: Mapping[str, Any],
    keys: Mapping[int, Key],
    dtype: str,
    endless: bool,
) -> None:
    """Measure what is to be computed, say so, and note the formats of taps that are new."""
    taps = [tap for tap, rows in lacking.items() if rows]
    measured = measure(source, taps, dtype, list(keys.values()))
    formats = {format.tap: format for format in measured.formats}
    needed = sum(len(lacking[tap]) * formats[tap].row_bytes for tap in taps)
    free = check_space(store.folder, needed)
    if not (store.folder / INDEX).exists():
        store.write_index()
    for format, error in measured.formats.items():
        if known[format.tap] is None:
            store.add_format(format, error, measured.images)
            known[format.tap] = format
    if not leads():
        return
    views = len({view for view, _ in keys.values()})
    for tap in taps:
        shape = "x".join(map(str, formats[tap].shape))
        print(f"cache      {tap}, {shape}, {dtype}: {shown_bytes(formats[tap].row_bytes)} an image")
    amount = f"{len(keys)} images{f' in {views} views' if views > 1 else ''}"
    print(f"           {amount} to compute, {shown_bytes(needed)} of {shown_bytes(free)} that are free")
    print(
        f"           about {shown_seconds(len(keys) * measured.seconds)} on {source.device.type}, into {store.folder}"
    )
    if views > 1 and endless:
        print(
            f"           every pass has a view of its own, so this run reads each image once: it pays if other runs "
            f"of this seed do, too, or with teacher_cache.views less than {views}"
        )
    sys.stdout.flush()


def _compare(cache: RunCache) -> None:
    """Raise `CacheError` unless a few rows that are there already are what the teacher gives now."""
    for format in cache.formats:
        missing = {*cache.store.missing(format, cache.keys)}
        rows = [row for row in cache.keys if row not in missing]
        chosen = rows[:: max(1, -(-len(rows) // _COMPARED))]
        for finding in compare(cache.store, cache.source, format, {row: cache.keys[row] for row in chosen}):
            if finding.problem is not None:
                view, sample = cache.keys[finding.row]
                raise CacheError(
                    f"{cache.store.folder}: view {view} of sample {sample} at {format.tap} {finding.problem}. kdlvfm "
                    "cache verify says more; kdlvfm cache remove takes the cache away, for instance where it was made "
                    "by another version of a library."
                )


def _store(config: Mapping[str, Any], source: FeatureSource, data: SampleData, size: tuple[int, int]) -> CacheStore:
    """The store of the features that this configuration asks for, on disk or still to be begun."""
    description = {
        "teacher": {
            "name": source.teacher.card.name,
            "config": config["teacher"],
            "weights": weights_hash(source.teacher),
        },
        "precision": source.precision,
        "data": {
            "name": data.name,
            "split_hash": data.split_hash(),
            "samples": data.num_samples,
            "config": {key: value for key, value in config["data"].items() if key not in _NOT_SEEN},
        },
        "image": list(size),
        # Without augmentation an image is the same whatever the seed.
        "seed": None if data.augmentation is None else data.seed,
        # Features that are to be the same to the last bit depend on it.
        "batch_size": source.batch_size if config["teacher_cache"]["dtype"] == "fp32" else None,
    }
    digest = digest_of(description)
    name = re.sub(r"[^\w.-]+", "-", f"{source.teacher.card.name}-{data.name}")
    folder = Path(str(config["teacher_cache"]["folder"])) / f"{name}-{digest}"
    if not (folder / INDEX).exists():
        parts = {part: config[part] for part in ("teacher", "data", "task")}
        machine = environment()
        facts = {"begun": now(), "versions": machine["versions"], "hardware": machine["hardware"]}
        return CacheStore(folder, data.num_samples, SHARD_ROWS, description, parts, facts)
    store = CacheStore.open(folder)
    if digest_of(store.description) != digest:
        raise CacheError(f"{folder} holds another cache than its name says: kdlvfm cache remove {folder}")
    return store


def digest_of(description: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that name a cache: two descriptions that share them are equal."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:12]


def shown_seconds(seconds: float) -> str:
    """A duration for people."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _place(trainer: Mapping[str, Any]) -> tuple[torch.device, int]:
    """Where this process trains, and computes features before that; and how many processes share a batch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `srun` command is available")  # as in `fit`
        names = ("accelerator", "devices", "num_nodes", "strategy")
        fabric = Fabric(**{name: trainer[name] for name in names if name in trainer})
    return fabric.device, fabric.world_size


def _union(rows: Mapping[Any, Any]) -> list[int]:
    """All rows once, in order."""
    return sorted({row for wanted in rows.values() for row in wanted})
