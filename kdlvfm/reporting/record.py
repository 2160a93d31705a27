# SPDX-License-Identifier: Apache-2.0
"""The run record: one validated `record.json` for each training run, from which every table and figure is made."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator

SCHEMA = "kdlvfm.run/1"
BASELINE = "none"
"""Name of the distiller that adds no terms: the baseline of every comparison."""

Record = dict[str, Any]

# The names of the parts, where a run writes, what watches it, where its files lie and what computes it: none of them
# changes a result.
_WITHOUT_EFFECT = (
    "choices",
    "out",
    "run",
    "logger",
    "equal_time.run",
    "data.root",
    "data.num_workers",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
)
# Settings that older runs lack: null and false say the same as their absence.
_OFF_UNLESS_SET = (
    "after",
    "data.augment_on_device",
    "equal_time",
    "teacher.batch",
    "teacher.channels_last",
    "teacher.compile",
    "teacher.precision",
    "trainer.channels_last",
    "trainer.compile",
)
_LIBRARIES = (
    "kdlvfm",
    "torch",
    "torchvision",
    "timm",
    "lightning",
    "hydra-core",
    "segmentation-models-pytorch",
    "open-clip-torch",
    "mmdet",
    "mmengine",
    "mmcv",
    "mmcv-lite",
    "onedl-mmdetection",
    "onedl-mmengine",
    "onedl-mmcv",
    "faster-coco-eval",
    "torchmetrics",
    "numpy",
    "scikit-learn",
)


class RecordError(ValueError):
    """A record that cannot be read, or that is not a valid run record."""


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration that can change a result."""
    kept = copy.deepcopy(dict(config))
    for key in (*_WITHOUT_EFFECT, *_OFF_UNLESS_SET):
        group, _, leaf = key.rpartition(".")
        parent = kept.get(group) if group else kept
        if isinstance(parent, dict) and (key in _WITHOUT_EFFECT or parent.get(leaf) in (None, False)):
            parent.pop(leaf, None)
    if kept.get("after"):
        # The weights that a run starts with follow from the run before it; where their file lies does not matter.
        kept["after"] = kept["after"]["config_hash"]
        encoder = kept["student"].get("encoder")
        (encoder if isinstance(encoder, dict) else kept["student"]).pop("checkpoint", None)
    effect = effect_of_cache(kept)
    kept.pop("teacher_cache", None)
    if effect:
        kept["teacher_cache"] = effect
    return kept


def effect_of_cache(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings of a teacher cache that change a result: one that stores without loss changes none."""
    effect, settings = {}, config.get("teacher_cache", {})
    if settings.get("views") is not None:
        effect["views"] = settings["views"]
    if settings.get("mode", "none") != "none":
        pca = settings.get("pca")
        if pca is not None:
            effect["pca"] = pca
        if pca is not None or settings["dtype"] != "fp32":
            effect["dtype"] = settings["dtype"]
    return effect


def config_hash(config: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that two configurations share if and only if they promise the same result.

    Raises:
        RecordError: the configuration holds something other than plain JSON values.
    """
    return _digest(identity(config))


def recipe_hash(config: Mapping[str, Any]) -> str:
    """The hash of a configuration without distiller, teacher and seeds: a method and its baseline share it.

    A seed is left out wherever it stands, since parts of a configuration repeat the seed of the run. A baseline that
    trains as long as a method has the recipe of that method, though more steps; a run that goes on from another one has
    that of the baseline that does not.
    """
    for setting in ("equal_time", "after"):
        if config.get(setting):
            return str(config[setting]["recipe_hash"])
    return _digest(recipe(config))


def recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that a method shares with its baseline."""
    kept = identity(config)
    kept.pop("distiller", None)
    kept.pop("teacher", None)
    views = kept.pop("teacher_cache", {}).get("views")
    if views is not None:  # how images are augmented; how features are stored belongs to the teacher
        kept["views"] = views
    shared: dict[str, Any] = _without_seeds(kept)
    return shared


def method_of(config: Mapping[str, Any]) -> str:
    """What tables call a run's method: its distiller, and after which one it came if it had a first stage."""
    own, before = str(config["choices"]["distiller"]), config.get("after")
    if not before:
        return own
    return f"after {before['method']}" if own == BASELINE else f"{own} after {before['method']}"


def differences(
    config_a: Mapping[str, Any],
    config_b: Mapping[str, Any],
    part: Callable[[Mapping[str, Any]], dict[str, Any]] = identity,
) -> list[str]:
    """What makes two configurations, or a part of them, different: one line `key: a != b` for each key, sorted."""
    a, b = flatten(part(config_a)), flatten(part(config_b))
    return [
        f"{key}: {a.get(key, '(absent)')} != {b.get(key, '(absent)')}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]


def write_record(path: Path, record: Record) -> None:
    """Validate `record` and write it in one piece: a reader sees the old file or the new one, never half of one.

    Raises:
        RecordError: the record is invalid; the message names the field, and nothing is written.
    """
    _validate(path, record)
    try:
        text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise RecordError(f"{path}: the record is not plain JSON ({error}).") from error
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_record(path: Path) -> Record:
    """The record in the file `path`.

    Raises:
        RecordError: the file cannot be read, is not JSON, or is not a valid record; the message names file and cause.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}.") from error
    except ValueError as error:
        raise RecordError(f"{path}: not a JSON file ({error}).") from error
    _validate(path, record)
    return dict(record)


def now() -> str:
    """The time in UTC as records state it, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def environment() -> dict[str, Any]:
    """The fields `versions`, `hardware` and `git` of a record, for this process."""
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    hardware = {
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
    }
    return {"versions": versions, "hardware": hardware, "git": _git()}


@functools.cache
def _validator() -> Draft202012Validator:
    from jsonschema import Draft202012Validator

    schema = resources.files("kdlvfm.reporting").joinpath("run_schema.json").read_text(encoding="utf-8")
    return Draft202012Validator(json.loads(schema))


def _validate(path: Path, record: object) -> None:
    from jsonschema.exceptions import best_match

    error = best_match(_validator().iter_errors(record))
    if error is not None:
        field = error.json_path.removeprefix("$").removeprefix(".") or "record"
        raise RecordError(f"{path}: not a valid {SCHEMA} record: {field}: {error.message}.")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _digest(plain: object) -> str:
    try:
        canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    except TypeError as error:
        raise RecordError(f"The configuration is not plain data ({error}); resolve it to dicts and lists.") from error
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _without_seeds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_seeds(item) for key, item in value.items() if key != "seed"}
    if isinstance(value, list | tuple):
        return [_without_seeds(item) for item in value]
    return value


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key -> JSON text of the value; an empty group stays as a leaf."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, sort_keys=True)
    return flat


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git() -> dict[str, Any] | None:
    """Revision of this package's checkout, or else of the working directory's; `None` if neither is a checkout."""
    checkout = Path(__file__).parents[2]
    folder = checkout if (checkout / ".git").exists() else Path.cwd()
    try:
        revision, status = (
            subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"revision": revision, "dirty": bool(status)}
