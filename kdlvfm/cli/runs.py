# SPDX-License-Identifier: Apache-2.0
"""Finished runs: their records, and their students as models again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kdlvfm.cli import CommandError
from kdlvfm.cli.build import build_student
from kdlvfm.cli.targets import check_targets
from kdlvfm.core import FeatureModel
from kdlvfm.reporting.record import Record, RecordError, read_record

WEIGHTS = "student.safetensors"
FROM_RUN = "kdlvfm.cli.runs.teacher_from_run"  # which makes the same checks on that run as are made on this one


def read_run(folder: Path) -> Record:
    """The record of a finished run.

    Raises:
        CommandError: there is none, it cannot be read, or the run is not finished.
    """
    path = folder / "record.json"
    if not path.is_file():
        raise CommandError(f"{folder} is not a run: it has no record.json.")
    try:
        record = read_record(path)
    except RecordError as error:
        raise CommandError(str(error)) from error
    if record["status"] != "finished":
        raise CommandError(f"the run in {folder} is {record['status']}, not finished; run its command again to go on.")
    return record


def load_student(folder: Path, record: Record) -> FeatureModel:
    """The trained student of a run.

    Nothing in the folder can execute: its configuration may only name parts of this library, its weights are tensors.

    Raises:
        CommandError: the weights are missing or do not fit the configuration.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    weights = folder / WEIGHTS
    if not weights.is_file():
        raise CommandError(f"{folder} has no {WEIGHTS}.")
    node = without_weights(record["config"]["student"])
    check_targets(node, folder / "record.json")
    student = build_student(node, len(record["data"]["classes"]))
    try:
        try:
            load_model(student.net, weights)
        except RuntimeError:
            # A file of weights with another number of classes than timm's left the encoder without its classifier.
            if not isinstance(node.get("encoder"), Mapping):
                raise
            kwargs = {**(node["encoder"].get("model_kwargs") or {}), "num_classes": 0}
            node = {**node, "encoder": {**node["encoder"], "model_kwargs": kwargs}}
            student = build_student(node, len(record["data"]["classes"]))
            load_model(student.net, weights)
    except (RuntimeError, SafetensorError) as error:
        raise CommandError(f"{weights} does not fit the student that the record describes: {error}") from error
    student.card = replace(
        student.card,
        name=f"{student.card.name} ({record['name']})",
        weights="file",
        licence=record["student"]["licence"],
        sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
        source=str(weights),
    )
    return student.eval()


def find_device(name: str) -> torch.device:
    """The device of an option `--device`; for `auto` a GPU if there is one.

    Raises:
        CommandError: it cannot be used here.
    """
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        return torch.empty(0, device=chosen).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise CommandError(f"--device {chosen} cannot be used here: {str(error).splitlines()[0]}") from error


def teacher_from_run(run: str) -> FeatureModel:
    """The student of a run, to be a teacher: `teacher=from_run teacher.run=PATH`."""
    folder = Path(run)
    return load_student(folder, read_run(folder))


def without_weights(node: Mapping[str, Any]) -> dict[str, Any]:
    """The same architecture with no weights to fetch: those of the run follow."""
    changed: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            changed[key] = without_weights(value)
        else:
            changed[key] = {"pretrained": False, "checkpoint": None}.get(key, value)
    return changed
