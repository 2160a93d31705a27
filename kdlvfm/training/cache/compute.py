# SPDX-License-Identifier: Apache-2.0
"""Computing a cache: features are measured, stored and, later, compared with those computed anew."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kdlvfm.training.cache.formats import LEAST_COSINE, CacheError, TapFormat, likeness, measured_error
from kdlvfm.training.cache.rows import RowError
from kdlvfm.training.cache.source import Drawn, FeatureSource, Key
from kdlvfm.training.cache.store import CacheStore

MARGIN = 2**30
"""Bytes that must stay free on the disk."""

_MEASURED = 3  # batches, or fewer where one takes long
_LONG = 5.0  # seconds


@dataclass(frozen=True)
class Measurement:
    """What a few batches told.

    Attributes:
        formats: of the taps, with the error of storing the images measured: none where there is still to be fitted a
            projection.
        images: how many those were.
        seconds: for one image.
    """

    formats: dict[TapFormat, dict[str, float]]
    images: int
    seconds: float


def measure(
    source: FeatureSource, taps: Sequence[str], dtype: str, keys: Sequence[Key], pca: int | None = None
) -> Measurement:
    """Compute features of a few batches, and throw them away: what they look like, and how long they take.

    Args:
        source: of the features.
        taps: what of them is to be stored.
        dtype: in which.
        keys: view and sample of images, of which the first are measured.
        pca: how many principal components are to take the place of the channels.

    Raises:
        CacheError: features that cannot be stored, or that depend on the other images of a batch.
    """
    size = source.batch_size
    formats: dict[str, TapFormat] = {}
    errors: dict[str, dict[str, float]] = {}
    images, timed, began = 0, 0, time.perf_counter()
    for drawn in source.draw(keys[: _MEASURED * size]):
        features = source.features(drawn.images, taps)
        for tap, value in features.items():
            found = formats.setdefault(tap, TapFormat.of(tap, value, dtype, pca))
            if not found.projected:
                _keep_worst(errors.setdefault(tap, {}), found, value)
        if not images:
            _check_alone(source, drawn, features)
            if len(keys) > size:  # the first batch pays for the loader's start and the choice of algorithms
                began, timed = time.perf_counter(), -len(drawn.keys)
        images, timed = images + len(drawn.keys), timed + len(drawn.keys)
        if timed and time.perf_counter() - began > _LONG:
            break
    seconds = (time.perf_counter() - began) / timed
    return Measurement({formats[tap]: errors.get(tap, {}) for tap in taps}, images, seconds)


def storing_error(
    source: FeatureSource, formats: Sequence[TapFormat], keys: Sequence[Key]
) -> tuple[dict[TapFormat, dict[str, float]], int]:
    """The error of storing a few images, the first of `keys`, beside the teacher's own features; and how many.

    Raises:
        CacheError: features that cannot be stored.
    """
    chosen = keys[: _MEASURED * source.batch_size]
    errors: dict[TapFormat, dict[str, float]] = {format: {} for format in formats}
    for drawn in source.draw(chosen):
        features = source.features(drawn.images, [format.tap for format in formats])
        for format, worst in errors.items():
            _keep_worst(worst, format, features[format.tap])
    return errors, len(chosen)


def _keep_worst(worst: dict[str, float], format: TapFormat, features: Tensor) -> None:
    """Update the errors of storing with those of one more batch."""
    error = measured_error(features, format.decode(format.encode(features)))
    worst["cosine"] = min(worst.get("cosine", 1.0), error["cosine"])
    worst["relative_rms"] = max(worst.get("relative_rms", 0.0), error["relative_rms"])


def _check_alone(source: FeatureSource, drawn: Drawn, features: Mapping[str, Tensor]) -> None:
    """Raise `CacheError` unless an image has the same features alone as in a batch."""
    for tap, alone in source.features(drawn.images[:1], list(features)).items():
        if alone.shape[1:] != features[tap].shape[1:] or likeness(alone, features[tap][:1]).item() < 0.999:
            raise CacheError(
                f"the teacher's features at {tap} depend on the other images of the batch, so they cannot be stored by "
                "image: tap another place, or set teacher_cache=none."
            )


def compute(
    store: CacheStore, source: FeatureSource, missing: Mapping[TapFormat, Sequence[int]], keys: Mapping[int, Key]
) -> Iterator[int]:
    """Compute and store rows; after each batch, how many images it had.

    Args:
        store: the cache.
        source: of the features.
        missing: rows to compute, for each tap, all of one shard.
        keys: view and sample of each row.

    Raises:
        CacheError: the disk is almost full, or features or images are not what was measured.
    """
    rows = {keys[row]: row for row in sorted({row for wanted in missing.values() for row in wanted})}
    size = source.batch_size
    for drawn in source.draw(list(rows)):
        if shutil.disk_usage(store.folder).free < MARGIN + size * sum(format.row_bytes for format in missing):
            raise CacheError(
                f"{store.folder}: less than {shown_bytes(MARGIN)} would stay free on the disk, so computing stopped "
                "before it is full. What is stored is kept: make room, and the same command goes on from there."
            )
        features = source.features(drawn.images, [format.tap for format in missing])
        for format, wanted in missing.items():
            value = features[format.tap]
            if tuple(value.shape[1:]) != format.shape:
                raise CacheError(
                    f"{format.tap} has the shape {tuple(value.shape[1:])} for one image and {format.shape} for others: "
                    "training images differ in size. Give recipe.augmentation.crop a size that every image fills, or "
                    "set teacher_cache=none."
                )
            own = {*wanted}
            chosen = [i for i, key in enumerate(drawn.keys) if rows[key] in own]
            if chosen:
                store.write(
                    format,
                    [rows[drawn.keys[i]] for i in chosen],
                    [drawn.digests[i] for i in chosen],
                    format.encode(value[chosen]),
                )
        yield len(drawn.keys)


@dataclass(frozen=True)
class Finding:
    """A stored row beside the features computed anew.

    Attributes:
        row: its number.
        cosine: of the two; `None` if the row cannot be read.
        problem: what is wrong with it; `None` if nothing is.
    """

    row: int
    cosine: float | None
    problem: str | None


def compare(store: CacheStore, source: FeatureSource, format: TapFormat, keys: Mapping[int, Key]) -> list[Finding]:
    """Compute rows anew and compare: with principal components, what of the features these hold.

    Args:
        store: the cache.
        source: of the features.
        format: of the tap.
        keys: view and sample of the rows.
    """
    rows = {key: row for row, key in keys.items()}
    findings = []
    for drawn in source.draw(list(rows)):
        live = format.kept(source.features(drawn.images, [format.tap])[format.tap]).cpu()
        for key, digest, features in zip(drawn.keys, drawn.digests, live, strict=False):
            try:
                stored = format.decode(store.read(format, rows[key], digest)[None])
            except RowError as error:
                findings.append(Finding(rows[key], None, error.cause))
                continue
            cosine = likeness(stored, features[None]).item()
            least = LEAST_COSINE[format.stored]
            problem = None if cosine >= least else f"has cosine {cosine:.5f} to what the teacher gives now"
            findings.append(Finding(rows[key], cosine, problem))
    return findings


def check_space(folder: Path, needed: int) -> int:
    """Bytes that are free where `folder` is, or will be.

    Raises:
        CacheError: fewer than are needed and must stay free.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + MARGIN:
        raise CacheError(
            f"the teacher cache needs {shown_bytes(needed)} more, and {shown_bytes(MARGIN)} must stay free; the disk "
            f"of {existing} has {shown_bytes(free)}. Choose another with teacher_cache.folder=FOLDER, or take fewer "
            "teacher_cache.views, teacher_cache.dtype=int8, teacher_cache.pca=128 or other taps."
        )
    return free


def shown_bytes(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
