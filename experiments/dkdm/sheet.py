# SPDX-License-Identifier: Apache-2.0
"""Draws what the networks of the study make: a line for each pair, the teacher first, all from the same noise.

python experiments/dkdm/sheet.py runs/dkdm runs/dkdm_teachers docs/images/dkdm.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlvfm.cli.build import build_data, build_task
from kdlvfm.cli.runs import load_student, read_run
from kdlvfm.reporting.canvas import Canvas

ROWS, COLUMNS, SCALE, FRAME = 4, 8, 5, 0.4
KINDS = {"unet": "CNN", "dit": "ViT"}
METHODS = {"none": "data", "synthetic_set": "synthetic set", "dkdm": "DKDM"}


def made(folder: Path) -> tuple[Tensor, float]:
    """A block of images that the student of a run makes, (3, h, w), and its distance on the test images."""
    record: dict[str, Any] = read_run(folder)
    data = build_data(record["config"])
    task, student = build_task(record["config"], data), load_student(folder, record)
    count = ROWS * COLUMNS
    batch = {"image": torch.zeros(count, 3, *data.input_size()), "index": torch.arange(count)}
    with torch.no_grad():
        images = task.predict(student, {}, batch)["image"]
    framed = F.pad(images, (1, 1, 1, 1), value=FRAME)
    block = torch.cat([torch.cat([*framed[line * COLUMNS :][:COLUMNS]], 2) for line in range(ROWS)], 1)
    return block, record["metrics"]["test"]["frechet_distance"]


def main(runs: Path, teachers: Path, path: Path) -> None:
    """Draw the sheet of the runs of seed 0, as `experiments/dkdm/run` names them."""
    pairs = [(teacher, student) for teacher in KINDS for student in KINDS]
    canvas: Canvas | None = None
    for line, (teacher, student) in enumerate(pairs):
        folders = {"teacher": teachers / teacher}
        for method, title in METHODS.items():
            source = student if method == "none" else f"{teacher}-{student}"
            folders[title] = runs / f"{method}-{source}-seed0"
        for column, (title, folder) in enumerate(folders.items()):
            block, distance = made(folder)
            size = (block.shape[1], block.shape[2])
            canvas = canvas or Canvas(len(pairs), len(folders), size, SCALE * size[1], ())
            kind = KINDS[teacher] if title == "teacher" else f"{KINDS[teacher]} to {KINDS[student]}"
            who = KINDS[student] if title == "data" else kind
            canvas.draw(line, column, block.permute(1, 2, 0), title, f"{who}, distance {distance:.1f}")
    assert canvas is not None
    canvas.save(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
