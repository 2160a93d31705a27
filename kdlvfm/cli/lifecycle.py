# SPDX-License-Identifier: Apache-2.0
"""The life of one run: its record, training, evaluation, and what it says to the user."""

from __future__ import annotations

import json
import shlex
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kdlvfm.cli import CommandError
from kdlvfm.cli.build import Cell, build, check_numbers
from kdlvfm.cli.lock import RunLock, leads
from kdlvfm.cli.measure import measure, whole_forward, write_weights
from kdlvfm.cli.run_folder import checkpoint_of, earlier_record, method_name, run_folder
from kdlvfm.cli.targets import instantiate
from kdlvfm.reporting import record as records
from kdlvfm.reporting.cost import count_macs, count_parameters
from kdlvfm.reporting.reading import reading_of
from kdlvfm.training.fit import fit


def train(config: dict[str, Any], overrides: Sequence[str]) -> int:
    """One run from its resolved configuration to its record."""
    check_numbers(config)
    if config["run"]["threads"]:
        torch.set_num_threads(config["run"]["threads"])
    if config["run"]["progress"] == "auto":
        config["run"]["progress"] = "bar" if sys.stdout.isatty() else "line"
    folder = run_folder(config)
    path = folder / "record.json"
    if _is_finished(path, config):
        return 0
    cell = build(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{folder} cannot be made ({error.strerror}); choose another with out=FOLDER.") from error
    with RunLock(folder) if leads() else nullcontext():
        # Another process may have had the lock, and finished the run, while this one was being built.
        return 0 if _is_finished(path, config) else _compute(config, overrides, cell, folder)


def _is_finished(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether nothing is left to do; it says so."""
    earlier = earlier_record(path, config)
    if earlier is None or earlier["status"] != "finished":
        return False
    print(f"{path.parent} is finished; nothing to do.")
    # Where data lies is no part of a run's identity, so that it may be moved; other data are another run.
    before, now = (str(part["data"].get("root")) for part in (earlier["config"], config))
    if before != now:
        print(f"note       its data lay in {before}; if {now} holds other data, choose another folder with out=FOLDER.")
    _closing(path.parent, earlier)
    return True


def _compute(config: dict[str, Any], overrides: Sequence[str], cell: Cell, folder: Path) -> int:
    """Training, evaluation and what is written about them."""
    path, lead = folder / "record.json", leads()
    earlier = earlier_record(path, config)
    record = _opening_record(config, overrides, cell, earlier)
    if earlier and checkpoint_of(folder).exists() and earlier["data"]["split_hash"] != record["data"]["split_hash"]:
        raise CommandError(
            f"{folder} holds a run that began on other images or labels than these (another split hash); choose "
            "another folder with out=FOLDER."
        )

    def save(**fields: Any) -> None:
        record.update(fields)
        if lead:
            records.write_record(path, record)

    save(status="running", ended=None, error=None)
    if lead:
        _describe(folder, cell, config)
    began = time.perf_counter()
    try:
        record.update(cell.fill_cache())
        result = fit(
            module=cell.module,
            data=cell.data,
            folder=folder,
            trainer=config["trainer"],
            loggers=[instantiate(node, save_dir=str(folder)) for node in (config["logger"] or {}).values()],
            selection=config["recipe"]["selection"],
            val_every=config["recipe"]["val_every"],
            checkpoint_every=config["run"]["checkpoint_every"],
            progress=config["run"]["progress"],
            diagnose_every=config["run"]["diagnose_every"],
            dead_term_steps=config["run"]["dead_term_steps"],
        )
        found = {"curve": result.curve, "diagnostics": {"points": result.diagnostics}}
        if not result.finished:
            cost = _cost(began, earlier, result.cost)
            save(status="interrupted", ended=records.now(), cost=cost, **found)
            if lead:
                print(f"Interrupted. To go on: {command_line(overrides)}")
            return 130
        measured = measure(cell, config, folder, result.device)
        if cell.teacher is not None:
            record["teacher"]["metrics"] = measured.pop("teacher_metrics")
        if lead:
            write_weights(cell.student, folder)
        save(
            status="finished",
            ended=records.now(),
            selected_step=result.selected_step,
            cost=_cost(began, earlier, result.cost),
            **measured,
            **found,
        )
    except (KeyboardInterrupt, SystemExit):
        save(status="interrupted", ended=records.now())
        raise KeyboardInterrupt from None
    except Exception as error:
        save(status="failed", ended=records.now(), error=f"{type(error).__name__}: {error}")
        if lead:
            (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        print(f"kdlvfm train: failed: {error}\nThe traceback is in {folder / 'error.txt'}.", file=sys.stderr)
        return 1
    if lead:
        _closing(folder, record)
    return 0


def _opening_record(
    config: Mapping[str, Any], overrides: Sequence[str], cell: Cell, earlier: Mapping[str, Any] | None
) -> dict[str, Any]:
    """All that is known before training."""
    size = cell.data.input_size()
    teacher = cell.teacher
    return {
        "schema": records.SCHEMA,
        "status": "running",
        "error": None,
        "name": f"{method_name(config)}-seed{config['seed']}",
        "started": earlier["started"] if earlier else records.now(),
        "ended": None,
        "command": ["kdlvfm", "train", *overrides],
        "config": dict(config),
        "config_hash": records.config_hash(config),
        "recipe_hash": records.recipe_hash(config),
        "seed": config["seed"],
        **records.environment(),
        "teacher": None
        if teacher is None
        else {**asdict(teacher.card), "parameters": count_parameters(teacher.model), "metrics": None},
        "student": {
            **asdict(cell.student.card),
            "parameters": count_parameters(cell.student),
            "macs": count_macs(cell.student, size, forward=whole_forward(cell.student, cell.task)),
            "input_size": list(size),
        },
        "distiller": {
            "name": records.method_of(config),
            "settings": {**_settings(config["distiller"]), **_settings_of_stages(config)},
            "parameters": count_parameters(cell.distiller),
            "student_taps": list(cell.distiller.student_taps),
            "teacher_taps": list(cell.distiller.teacher_taps),
        },
        "task": {
            "name": config["choices"]["task"],
            "primary_metric": cell.task.primary_metric,
            "distances": list(cell.task.distances),
            "has_loss": cell.task.has_loss,
        },
        "data": {
            "name": cell.data.name,
            "classes": list(cell.data.class_names),
            "licence": cell.data.licence,
            "split_hash": cell.data.split_hash(),
            "counts": cell.data.counts(),
            "labels": cell.data.labels(),
        },
        "steps": config["recipe"]["steps"],
        "batch_size": config["recipe"]["batch_size"],
        "selection": config["recipe"]["selection"],
        "selected_step": None,
        "metrics": {},
        "curve": [],
        "cost": None,
        "inference": None,
        "per_image": None,
    }


def _settings(node: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in a node; of a part inside it also which method it is."""
    settings: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            target = value.get("_target_", "").removesuffix(".from_context")
            settings[key] = {**({"method": target.rpartition(".")[2]} if target else {}), **_settings(value)}
        elif not key.startswith("_"):
            settings[key] = value
    return settings


def _settings_of_stages(config: Mapping[str, Any]) -> dict[str, Any]:
    """What tells two ways of learning in two stages from each other."""
    before = config["after"]
    if not before:
        return {}
    first = {key: before[key] for key in ("data", "recipe", "settings")}
    return {"frozen": config["student"].get("freeze") is True, "first": {**first, "teacher": before["teacher"]["name"]}}


def _describe(folder: Path, cell: Cell, config: Mapping[str, Any]) -> None:
    teacher = cell.teacher
    print(f"student    {cell.student.card.name}, {cell.student.card.weights} weights")
    if teacher is None:
        print("teacher    none")
    else:
        print(f"teacher    {teacher.card.name}, {teacher.card.weights} weights, licence {teacher.card.licence}")
        if teacher.card.weights == "random":
            print(
                "WARNING    the teacher has RANDOM weights: what it teaches is noise. The record and the table say so."
            )
    taps = [", ".join(taps) for taps in (cell.distiller.student_taps, cell.distiller.teacher_taps)]
    print(
        f"distiller  {config['choices']['distiller']}"
        + (f", student {taps[0]}, teacher {taps[1]}" if any(taps) else "")
    )
    if config["after"]:
        before = config["after"]
        print(f"after      {before['method']} of {before['teacher']['name']}, {before['steps']} steps; {before['run']}")
    if config["equal_time"]:
        longer = config["equal_time"]
        print(
            f"steps      {longer['steps']} instead of {longer['recipe_steps']}: a step of {longer['method']} took "
            f"{longer['factor']:.2f} times as long as one of the baseline"
        )
    made = cell.data.labels()
    if made is not None:
        splits = ", ".join(made["images"])
        print(f"labels     of {splits} made by {made['teacher']['name']}, {made['confidence']:g} or surer")
    print(f"data       {cell.data.name}, {json.dumps(cell.data.counts())[1:-1].replace(chr(34), '')}")
    print(f"run        {folder}")


def _closing(folder: Path, record: Mapping[str, Any]) -> None:
    for split, metrics in record["metrics"].items():
        single = {name: value for name, value in metrics.items() if isinstance(value, float)}
        shown = "  ".join(f"{name} {reading_of(record, name).text(value)}" for name, value in single.items())
        print(f"{split:<10} {shown}")
    per_image = record.get("per_image")
    more = f", {per_image['file']}" if per_image else ""
    print(f"wrote      {folder}/record.json, student.safetensors, checkpoints/last.ckpt{more}")
    split = "" if "test" in record["metrics"] else " --split val"
    then = f"kdlvfm evaluate {folder} --split val"
    if not record["task"]["has_loss"]:
        then = f"a task with labels: kdlvfm train data=NAME student=NAME after={folder}"
    print(f"next       kdlvfm table {folder.parent}{split}    or    {then}")


def _cost(
    began: float, earlier: Mapping[str, Any] | None, training: Mapping[str, float | None]
) -> dict[str, float | None]:
    """The cost of training, and the seconds of everything: of earlier starts too, as far as their records say."""
    before = earlier["cost"]["seconds"] if earlier and earlier["cost"] else 0.0
    # A killed start leaves no record of its seconds, but a checkpoint that knows those of its training.
    seconds = max(time.perf_counter() - began + before, training["train_seconds"] or 0.0)
    return {"seconds": seconds, **training}


def command_line(overrides: Sequence[str]) -> str:
    """The command that repeats a run, as one would type it."""
    return shlex.join(["kdlvfm", "train", *overrides])
