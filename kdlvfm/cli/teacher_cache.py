# SPDX-License-Identifier: Apache-2.0
"""The teacher cache of a run: which one it is, whether it can be, how large it is, and filling it with others."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from kdlvfm.cli.lock import leads
from kdlvfm.cli.run_cache import RunCache, digest_of, fitting_keys, shown_seconds, union
from kdlvfm.core import Distiller, Task, Teacher
from kdlvfm.data.base import SampleData
from kdlvfm.reporting.record import environment, now
from kdlvfm.training.cache.compute import check_space, compare, measure, shown_bytes
from kdlvfm.training.cache.formats import DTYPES, CacheError, TapFormat
from kdlvfm.training.cache.projection import check_fit
from kdlvfm.training.cache.source import FeatureSource, Key, check_precision, check_replay, weights_hash
from kdlvfm.training.cache.store import INDEX, SHARD_ROWS, CacheStore

MODES = ("none", "build", "read")

# Settings of data that change nothing about a training image. What is in the files is in the hash of the splits.
_NOT_SEEN = {"root", "batch_size", "steps", "eval_batch_size", "num_workers", "labelled_per_batch", "seed"}
_NOT_SEEN |= {"augment_on_device"}  # never on where there is a cache
_COMPARED = 4  # images of a cache that was there before


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
    form = (settings["dtype"], settings["pca"])
    known = {tap: store.format(tap, *form) for tap in dict.fromkeys(distiller.teacher_taps)}
    lacking = {tap: rows if format is None else store.missing(format, rows) for tap, format in known.items()}
    if settings["mode"] == "read" and any(lacking.values()):
        tap = max(lacking, key=lambda tap: len(lacking[tap]))
        raise CacheError(
            f"{store.folder} lacks {len(lacking[tap])} of {len(rows)} images at {tap}: teacher_cache=build computes "
            "them."
        )
    if any(lacking.values()):
        wanted = {row: rows[row] for row in union(lacking)}
        _begin(store, source, known, lacking, wanted, form, endless=data.distinct_views is None)
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
    form: tuple[str, int | None],
    endless: bool,
) -> None:
    """Measure what is to be computed, say so, and note the formats of taps that are new and need nothing fitted."""
    taps = [tap for tap, rows in lacking.items() if rows]
    measured = measure(source, taps, form[0], list(keys.values()), form[1])
    formats = {format.tap: format for format in measured.formats}
    fitted = fitting_keys(store.samples)
    for format in formats.values():
        check_fit(format, len(fitted))
    needed = sum(len(lacking[tap]) * formats[tap].row_bytes for tap in taps)
    free = check_space(store.folder, needed)
    if not (store.folder / INDEX).exists():
        store.write_index()
    for format, error in measured.formats.items():
        if known[format.tap] is None:
            known[format.tap] = format
            if not format.projected:
                store.add_format(format, error, measured.images)
    if not leads():
        return
    views = len({view for view, _ in keys.values()})
    for tap in taps:
        shape = "x".join(map(str, formats[tap].shape))
        reduced = f", {form[1]} principal components" if formats[tap].projected else ""
        print(f"cache      {tap}, {shape}, {form[0]}{reduced}: {shown_bytes(formats[tap].row_bytes)} an image")
    amount = f"{len(keys)} images{f' in {views} views' if views > 1 else ''}"
    print(f"           {amount} to compute, {shown_bytes(needed)} of {shown_bytes(free)} that are free")
    unfitted = any(format.projected and store.fitted(format).projection is None for format in formats.values())
    if unfitted:
        print(f"           and {len(fitted)} images before, to which principal components are fitted")
    about = shown_seconds((len(keys) + (len(fitted) if unfitted else 0)) * measured.seconds)
    print(f"           about {about} on {source.device.type}, into {store.folder}")
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


def _place(trainer: Mapping[str, Any]) -> tuple[torch.device, int]:
    """Where this process trains, and computes features before that; and how many processes share a batch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `srun` command is available")  # as in `fit`
        names = ("accelerator", "devices", "num_nodes", "strategy")
        fabric = Fabric(**{name: trainer[name] for name in names if name in trainer})
    return fabric.device, fabric.world_size
