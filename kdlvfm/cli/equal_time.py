# SPDX-License-Identifier: Apache-2.0
"""The second baseline: no distiller, and as many more steps as the time of a method's distillation pays for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdlvfm.cli import CommandError
from kdlvfm.cli.runs import read_run
from kdlvfm.reporting.record import (
    BASELINE,
    Record,
    RecordError,
    differences,
    read_record,
    recipe,
    recipe_hash,
)


def match(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run with `equal_time=RUN` is matched to, for its configuration, and the number of its `steps`.

    The steps of the recipe are multiplied by the measured seconds per step of the method's run over those of the
    baseline that lies beside it, on the same machine: that of the same seed, or else of any. What went before the
    method's first step counts too, divided among its steps: a first stage, and computing the features that a teacher
    cache gave it, whichever run did that.

    Args:
        config: resolved, with the method's run in `equal_time`.

    Raises:
        CommandError: the cause, and what to change.
    """
    folder = Path(str(config["equal_time"]))
    if config["choices"]["distiller"] != BASELINE:
        raise CommandError(
            f"equal_time= is for the baseline, distiller=none, not for {config['choices']['distiller']}."
        )
    method = read_run(folder)
    name = method["distiller"]["name"]
    if name == BASELINE:
        raise CommandError(f"equal_time={folder} is a baseline itself: name the run of a distiller.")
    own = {**config, "equal_time": None}
    if recipe_hash(own) != method["recipe_hash"]:
        changed = differences(own, method["config"], recipe)
        shown = "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")
        raise CommandError(f"equal_time={folder} has another recipe ({shown}): give this run the one of that run.")
    baseline = _baseline(folder, method)
    step = _step_seconds(folder, baseline)
    before = _first_stage_seconds(folder, method) + _cache_seconds(folder, folder, method)
    factor = (_step_seconds(folder, method) + before / method["steps"]) / step
    steps = round(factor * method["steps"])
    if steps <= method["steps"]:
        raise CommandError(
            f"equal_time={folder}: a step of {name} took {factor:.2f} times as long as one of its baseline: there is "
            "no time to make up for."
        )
    return {
        "run": str(folder),
        "method": name,
        "method_hash": method["config_hash"],
        "baseline_hash": baseline["config_hash"],
        "recipe_hash": method["recipe_hash"],
        "recipe_steps": method["steps"],
        "factor": factor,
        "steps": steps,
    }


def _baseline(folder: Path, method: Record) -> Record:
    """The finished baseline of the method's recipe and machine beside it."""
    found = []
    for path in sorted(folder.resolve().parent.glob("*/record.json")):
        try:
            record = read_record(path)
        except RecordError:
            continue  # `kdlvfm table` names it; here another may do
        baseline = record["distiller"]["name"] == BASELINE and not record["config"].get("equal_time")
        same = all(record[key] == method[key] for key in ("recipe_hash", "hardware"))
        same = same and _trainer(record) == _trainer(method)
        if baseline and same and record["status"] == "finished":
            found.append(record)
    if not found:
        raise CommandError(
            f"equal_time={folder} has no finished baseline beside it to compare times with: run the same recipe with "
            f"distiller=none on the same machine, with out= a folder in {folder.resolve().parent}."
        )
    return min(found, key=lambda record: (record["seed"] != method["seed"], record["seed"]))


def _trainer(record: Record) -> dict[str, Any]:
    """The trainer's settings; one that is off is as one that older runs lack."""
    return {name: value for name, value in record["config"]["trainer"].items() if value is not False}


def _first_stage_seconds(folder: Path, method: Record) -> float:
    """The time of the stage before, that of its cache included."""
    before = method["config"].get("after")
    if not before:
        return 0.0
    if before["train_seconds"] is None or before["hardware"] != method["hardware"]:
        raise CommandError(f"equal_time={folder}: its first stage has no time that was measured on the same machine.")
    return float(before["train_seconds"]) + _cache_seconds(folder, Path(before["run"]), before)


def _cache_seconds(folder: Path, run: Path, record: Mapping[str, Any]) -> float:
    """What it took to compute the stored features that a run read, by the runs beside it that computed some of them."""
    read = record.get("teacher_cache")
    if not read:
        return 0.0
    seconds, computed = 0.0, 0
    for path in sorted(run.resolve().parent.glob("*/record.json")):
        try:
            other = read_record(path)
        except RecordError:
            continue
        cache = other.get("teacher_cache")
        if cache and cache["hash"] == read["hash"] and other["hardware"] == record["hardware"] and cache["computed"]:
            seconds, computed = seconds + cache["seconds"], computed + cache["computed"]
    if not computed:
        raise CommandError(
            f"equal_time={folder}: its teacher's features were stored by no run that lies beside {run}, so nobody "
            "knows how long they took: put the run that computed them there, or name one with teacher_cache=none."
        )
    return seconds / computed * float(read["images"])


def _step_seconds(folder: Path, record: Record) -> float:
    speed = record["cost"]["images_per_second"]
    if not speed:
        raise CommandError(
            f"equal_time={folder}: the record of {record['name']} has no time for a step: it had too few of them."
        )
    return float(record["batch_size"] / speed)
