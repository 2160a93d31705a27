# SPDX-License-Identifier: Apache-2.0
"""Predictions of finished runs beside the truth, as far as weights and data are at hand."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdlvfm.cli import CommandError
from kdlvfm.reporting.block import Block, Row
from kdlvfm.reporting.html import Picture
from kdlvfm.reporting.record import BASELINE

_METHODS = 6
_FROM_RUN = "kdlvfm.cli.runs.teacher_from_run"  # which makes the same check on that run


def draw_block(block: Block, folders: Mapping[str, Path], scenes: int) -> Picture:
    """Predictions of the baseline and the best methods of a block, one run each; or why there are none.

    Args:
        block: of a table.
        folders: hash of a configuration -> folder of its run.
        scenes: how many images.
    """
    if not scenes:
        return Picture(None, "Predictions were not asked for (--scenes).")
    best = sorted((row for row in block.rows if row.role == "method"), key=_score, reverse=True)[:_METHODS]
    runs: dict[str, Path] = {}
    for row in (*(row for row in block.rows if row.role == "baseline"), *best):
        for record in row.records:
            folder = folders[record["config_hash"]]
            if record["status"] == "finished" and (folder / "student.safetensors").is_file():
                runs.setdefault(row.method, folder)
    if not runs:
        return Picture(None, "No run folder holds a finished student (student.safetensors), so nothing can predict.")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "predictions.png"
        try:
            notes = draw_predictions(runs, block.split, scenes, path)
        except (CommandError, ValueError, OSError) as error:
            return Picture(None, f"Predictions could not be drawn: {str(error).splitlines()[0]}")
        shown = f"the {len(best)} best of the methods" if len(best) == _METHODS else "each method"
        caption = f"{scenes} images of the {block.split} split, spread over it; one run of {shown}, the lowest seed."
        return Picture(path.read_bytes(), " ".join([caption, *notes]))


def _score(row: Row) -> float:
    return row.score.mean if row.score else -1.0


def draw_predictions(runs: Mapping[str, Path], split: str, scenes: int, path: Path) -> list[str]:
    """Write a picture with a line for each of some images: image, truth, teacher and students; what is left out.

    Nothing in the folders can execute: their configurations may only name parts of this library.

    Args:
        runs: title of the column -> folder of a finished run; all of one data set.
        split: where the images come from, spread over it.
        scenes: how many.
        path: of the PNG file.

    Raises:
        CommandError, ValueError, OSError: a run, its weights or the data cannot be used.
    """
    import torch

    from kdlvfm.cli.build import build_data, build_task, build_teacher
    from kdlvfm.cli.runs import load_student, read_run
    from kdlvfm.cli.targets import check_targets
    from kdlvfm.reporting.figures import LEAST_SCORE, box_grid, mask_grid
    from kdlvfm.training.fit import predict

    records = {title: read_run(folder) for title, folder in runs.items()}
    first, record = next(iter(records.items()))
    config = {part: record["config"][part] for part in ("data", "task")}
    check_targets(config, runs[first] / "record.json")
    data = build_data(config)
    grid: Any = {"masks": mask_grid, "boxes": box_grid}.get(data.truth)
    if grid is None:
        raise CommandError(f"predictions of masks and boxes can be drawn, {data.truth} not.")
    if any(other["data"]["split_hash"] != data.split_hash() for other in records.values()):
        raise CommandError(f"the {data.name} that is here is not what the runs saw (another hash of the splits).")
    task, samples = build_task(config, data), data.evaluation_set(split)
    count = len(samples)  # type: ignore[arg-type]  # torch's Dataset does not state that it has a length
    chosen = [samples[index] for index in range(0, count, max(1, count // scenes))][:scenes]
    height, width = chosen[0]["image"].shape[-2:]
    shown = [sample for sample in chosen if sample["image"].shape[-2:] == (height, width)]
    notes = [] if len(shown) == len(chosen) else ["Images of other sizes than the first are left out."]
    if data.truth == "boxes":
        notes.append(f"Drawn are boxes with a score of {LEAST_SCORE} or more.")
    images, truth, _ = task.unpack(data.collate(shown))
    models: dict[str, Any] = {}
    taught = next((title for title in records if records[title]["distiller"]["name"] != BASELINE), None)
    if taught is not None and (records[taught]["teacher"] or {}).get("metrics"):
        try:
            node = records[taught]["config"]["teacher"]
            named = {key: value for key, value in node.items() if (key, value) != ("_target_", _FROM_RUN)}
            check_targets(named, runs[taught] / "record.json")
            models["teacher"] = build_teacher(node, data.class_names)
        except (CommandError, ValueError, OSError) as error:
            notes.append(f"The teacher is left out: {str(error).splitlines()[0]}")
    for title, found in records.items():
        models[title] = load_student(runs[title], found)
    with torch.no_grad():
        predictions = {title: predict(model, task, images, truth) for title, model in models.items()}
    # Batches of boxes are padded.
    grid(images[..., :height, :width], truth, predictions, data.class_names, data.palette, path)
    return notes
