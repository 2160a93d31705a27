# SPDX-License-Identifier: Apache-2.0
"""Two stages: features from images without labels in a run before, and the task in this one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdlvfm.cli import CommandError
from kdlvfm.cli.config import Launcher, compose_cell
from kdlvfm.cli.runs import WEIGHTS, read_run
from kdlvfm.reporting.record import Record, RecordError, read_record, recipe_hash

_FIRST = "representation"  # the task of a first stage: what it trains is an encoder and nothing else
_STARTS = ("pretrained", "name")  # what decides an encoder's initial weights where no file does


def second_stage(config: Mapping[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], Launcher]:
    """A run that goes on from the one in `after`, in the recipe of the baseline that does not.

    Args:
        config: resolved; `after` is a run of `task=representation`, or a folder that holds just one of this seed.
        overrides: what it was made from.

    Raises:
        CommandError: the cause, and what to change.
    """
    if config["equal_time"] is not None:
        raise CommandError("equal_time= is for a baseline, which has no first stage: leave after= out.")
    folder = _find(Path(str(config["after"])), config["seed"])
    first = _first_stage(folder, config["student"])
    # Whether the second stage moves the encoder is how the method goes on, and no matter of the baseline's.
    others = [override for override in overrides if not override.lstrip("+").startswith("student.freeze=")]
    baseline, launcher = compose_cell([*others, "after=null"])
    place, node = _encoder(config["student"])
    started = {**node, "checkpoint": str(folder / WEIGHTS)}
    student = {**config["student"], "encoder": started} if place == "student.encoder" else started
    return {**config, "student": student, "after": {**first, "recipe_hash": recipe_hash(baseline)}}, launcher


def _first_stage(folder: Path, student: Mapping[str, Any]) -> dict[str, Any]:
    """What tables and cards tell of the run before."""
    first = read_run(folder)
    if first["task"]["name"] != _FIRST:
        raise CommandError(
            f"after={folder} is a run of task={first['task']['name']}: a first stage is one of task={_FIRST}."
        )
    if not (folder / WEIGHTS).is_file():
        raise CommandError(f"after={folder} has no {WEIGHTS}.")
    _check_start(folder, first, student)
    return {
        "run": str(folder),
        "config_hash": first["config_hash"],
        "method": first["distiller"]["name"],
        "settings": first["distiller"]["settings"],
        "recipe": first["recipe_hash"],
        "data": first["data"]["name"],
        "data_licence": first["data"]["licence"],
        "steps": first["steps"],
        "batch_size": first["batch_size"],
        "train_seconds": first["cost"]["train_seconds"],
        "teacher_cache": first.get("teacher_cache"),
        "hardware": first["hardware"],
        "teacher": first["teacher"],
    }


def _find(path: Path, seed: int) -> Path:
    """The run itself, or in a folder of runs the one of this seed."""
    if (path / "record.json").is_file():
        return path
    found = []
    for file in sorted(path.glob("*/record.json")):
        try:
            record = read_record(file)
        except RecordError:
            continue  # `kdlvfm table` names it; here another may do
        if record["seed"] == seed and record["status"] == "finished" and record["task"]["name"] == _FIRST:
            found.append(file.parent)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(folder.name for folder in found)
        raise CommandError(f"after={path} holds several finished runs of seed {seed}: {names}. Name one of them.")
    raise CommandError(f"after={path} is no run, and holds no finished run of task={_FIRST} with seed {seed}.")


def _encoder(student: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Where the encoder's weights are chosen."""
    encoder = student.get("encoder")
    place, node = ("student.encoder", encoder) if isinstance(encoder, Mapping) else ("student", student)
    if "checkpoint" not in node:
        raise CommandError("after= is for students on an encoder of timm, which this one is not.")
    return place, node


def _check_start(folder: Path, first: Record, student: Mapping[str, Any]) -> None:
    """Both stages begin with the same weights, or the baseline without a first stage would begin with others."""
    from kdlvfm.models.weights import sha256_of

    place, node = _encoder(student)
    before = first["config"]["student"]
    if before.get("checkpoint") is not None:
        began, settings = first["student"]["sha256"], {"checkpoint": before["checkpoint"]}
    else:
        settings = {key: before.get(key) for key in _STARTS}
        began = settings if before.get("pretrained") else None
    if node["checkpoint"] is None:
        begins: Any = {key: node.get(key) for key in _STARTS} if node.get("pretrained") else None
    elif Path(node["checkpoint"]).is_file():
        begins = sha256_of(node["checkpoint"])
    else:
        raise CommandError(f"{place}.checkpoint={node['checkpoint']}: there is no such file.")
    if began != begins:
        wanted = " ".join(
            f"{place}.{key}={value if isinstance(value, str) else str(value).lower()}"
            for key, value in settings.items()
        )
        raise CommandError(
            f"after={folder} did not start from the weights that this student and its baseline start from: add "
            f"{wanted}, as that run had it."
        )
