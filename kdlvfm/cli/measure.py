# SPDX-License-Identifier: Apache-2.0
"""What is measured at the end of a run: scores, what each image adds to them, and the time of an inference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from kdlvfm.cli.build import Cell
from kdlvfm.cli.lock import leads
from kdlvfm.cli.runs import WEIGHTS, read_run
from kdlvfm.core import FeatureModel, Task, Teacher
from kdlvfm.reporting.cost import measure_inference
from kdlvfm.reporting.per_image import PerImage, write_per_image
from kdlvfm.training.fit import evaluate

Loader = Callable[[], Iterable[Any]]


def measure(cell: Cell, config: Mapping[str, Any], folder: Path, device: torch.device) -> dict[str, Any]:
    """The results of a trained student as fields of its record, and with a teacher `teacher_metrics`, those of it.

    Beside the record it writes what each image adds to the scores, for tasks that say so. Every process of a run must
    call it; only the first one writes, and times the student.
    """
    every = {"val": cell.data.val_dataloader, "test": cell.data.test_dataloader}
    loaders = {split: loader for split, loader in every.items() if split in cell.data.splits}
    found: dict[str, Any] = {"metrics": {}}
    images = {}
    for split, loader in loaders.items():
        collected = PerImage()
        found["metrics"][split] = evaluate(cell.student, loader(), cell.task, device, collected.add)
        images[split] = collected.arrays()
    if cell.teacher is not None:
        found["teacher_metrics"] = _teacher_metrics(cell.teacher, config["teacher"].get("run"), cell, loaders, device)
    if leads():
        found["per_image"] = write_per_image(folder, images)
        seconds = config["run"]["inference_seconds"]
        if seconds is not None:
            size, forward = cell.data.input_size(), whole_forward(cell.student, cell.task)
            found["inference"] = measure_inference(cell.student, size, forward=forward, seconds=seconds)
    return found


def whole_forward(student: FeatureModel, task: Task) -> Callable[[torch.Tensor], Any]:
    """What a student computes for the task's predictions, from images; decoding boxes is not in it."""
    return lambda images: task.one_pass(student, images)


def write_weights(student: FeatureModel, folder: Path) -> None:
    """The network of a student, without what surrounds it here, as safetensors in the folder of its run."""
    from safetensors.torch import save_model

    save_model(student.net.cpu(), str(folder / WEIGHTS))


def _teacher_metrics(
    teacher: Teacher, run: str | None, cell: Cell, loaders: Mapping[str, Loader], device: torch.device
) -> dict[str, Any] | None:
    """The upper bound: the metrics of a teacher that has a head, from its own run where that saw the same data."""
    if not cell.task.solves(teacher.model):
        return None  # no head, or one for other classes, such as a classifier of images
    if run is not None:
        record = read_run(Path(run))
        if record["data"]["split_hash"] == cell.data.split_hash():
            metrics: dict[str, Any] = record["metrics"]
            return metrics
    return {split: evaluate(teacher, loader(), cell.task, device) for split, loader in loaders.items()}
