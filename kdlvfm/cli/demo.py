# SPDX-License-Identifier: Apache-2.0
"""`kdlvfm demo`: teacher, baseline and three distillers on DigitScenes, from nothing to a table and a picture."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kdlvfm.cli import CommandError
from kdlvfm.cli.table import print_table

METHODS = {
    "none": (),
    "kd": (),
    "fitnet": ("distiller.student_tap=map.2",),  # of stride 8, as the teacher's maps: `kdlvfm inspect` pairs them
    "cwd": (),
}
_SCENES = 4
_STEP = re.compile(r"step (\d+)/(\d+)")
_INTERRUPTED = 130


@dataclass(frozen=True)
class Cell:
    """One run of the demo."""

    method: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """As the progress display calls it."""
        return f"{'baseline' if self.method == 'none' else self.method} seed {self.seed}"

    @property
    def overrides(self) -> list[str]:
        """What makes this run, for `kdlvfm train`."""
        chosen = [f"distiller={self.method}", *METHODS[self.method]]
        return ["experiment=demo", *chosen, f"seed={self.seed}", f"out={self.folder}"]


class Display(Protocol):
    """Shows how far each cell is."""

    def step(self, cell: Cell, step: int, steps: int) -> None:
        """A cell took a step."""

    def done(self, cell: Cell, code: int, seconds: float) -> None:
        """A cell ended."""


def run(arguments: Sequence[str]) -> int:
    """Entry point of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="kdlvfm demo",
        description="Train the baseline and three distillers (kd, fitnet, cwd) under one recipe on DigitScenes, few "
        "labels and many unlabelled scenes, with a small ViT that comes with the package as teacher. Ends with a table "
        "and a picture. What is finished is reused; what was interrupted goes on.",
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method (default: 1; 3 give a verdict)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the runs (default: runs/demo)")
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.jobs < 1:
        raise CommandError("--seeds and --jobs must be at least 1.")
    cells = [
        Cell(method, seed, options.out / f"{method}-seed{seed}") for seed in range(options.seeds) for method in METHODS
    ]
    code = _train(cells, options.jobs)
    if code == _INTERRUPTED:
        print("\nInterrupted. The same command goes on where it stopped.")
        return code
    print()
    print_table([options.out], out=options.out)
    picture = _picture([cell for cell in cells if cell.seed == 0], options.out / "predictions.png")
    print(
        f"wrote  {options.out}/: a record.json for each run, table.md, table.csv"
        + (", predictions.png" if picture else "")
    )
    if options.seeds < 3:
        print("next   make demo SEEDS=3    (mean, standard deviation, paired intervals, verdicts)")
    else:
        print("next   kdlvfm train --help    (your data, your teacher)")
    return code


def _train(cells: Sequence[Cell], jobs: int) -> int:
    """Run the cells, some at a time; 0 if all are finished, 130 if interrupted, else 1."""
    codes: dict[Cell, int] = {}
    with _display(cells) as display, ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(_run_cell, cell, display): cell for cell in cells}
        try:
            for future in as_completed(waiting):
                codes[waiting[future]] = future.result()
        except KeyboardInterrupt:
            # The processes got the signal too: they save and stop. No further one starts.
            pool.shutdown(wait=True, cancel_futures=True)
            return _INTERRUPTED
    for cell, code in codes.items():
        if code not in (0, _INTERRUPTED):
            print(f"{cell.name} failed; see {cell.folder.with_suffix('.log')}", file=sys.stderr)
    return max(codes.values()) and (_INTERRUPTED if _INTERRUPTED in codes.values() else 1)


def _run_cell(cell: Cell, display: Display) -> int:
    """One run in a process of its own, its output in a log file beside its folder."""
    command = [sys.executable, "-m", "kdlvfm", "train", *cell.overrides, "run.progress=line"]
    # Several threads in each of several processes on few cores get in each other's way, up to tenfold.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    began = time.perf_counter()
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        cell.folder.with_suffix(".log").open("a", encoding="utf-8", buffering=1) as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process,
    ):
        for line in process.stdout or ():
            log.write(line)
            if found := _STEP.match(line):
                display.step(cell, int(found[1]), int(found[2]))
    display.done(cell, process.returncode, time.perf_counter() - began)
    return process.returncode


@contextmanager
def _display(cells: Sequence[Cell]) -> Iterator[Display]:
    """Bars in a terminal, lines elsewhere."""
    if not sys.stdout.isatty():
        yield _Lines()
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        yield _Bars(progress, cells)


class _Lines:
    """A line when a cell ends."""

    def step(self, cell: Cell, step: int, steps: int) -> None:
        """Nothing: the log file has the steps."""

    def done(self, cell: Cell, code: int, seconds: float) -> None:
        """Say how it ended."""
        print(f"{cell.name}: {'done' if code == 0 else f'ended with code {code}'}, {seconds:.0f} s", flush=True)


class _Bars:
    """A progress bar for each cell."""

    def __init__(self, progress: Any, cells: Sequence[Cell]) -> None:
        self._progress = progress
        self._bars = {cell: progress.add_task(cell.name, total=None, start=False) for cell in cells}

    def step(self, cell: Cell, step: int, steps: int) -> None:
        """Move the bar; it starts with the first step, so that the time left is the training's."""
        if not self._progress.tasks[self._bars[cell]].started:
            self._progress.start_task(self._bars[cell])
        self._progress.update(self._bars[cell], completed=step, total=steps)

    def done(self, cell: Cell, code: int, seconds: float) -> None:
        """Fill the bar, or say that the cell failed."""
        del seconds
        if code == 0:
            self._progress.update(self._bars[cell], completed=1, total=1)
        else:
            self._progress.update(self._bars[cell], description=f"[red]{cell.name}")
        self._progress.stop_task(self._bars[cell])


def _picture(cells: Sequence[Cell], path: Path) -> bool:
    """Test scenes with the predictions of teacher and students; `False` if a run is missing."""
    import torch

    from kdlvfm.cli.build import build_data, build_task, build_teacher
    from kdlvfm.cli.runs import load_student, read_run
    from kdlvfm.data.segmentation import SegmentationData
    from kdlvfm.reporting.figures import prediction_grid
    from kdlvfm.training.fit import predict

    try:
        records = {cell: read_run(cell.folder) for cell in cells}
    except CommandError:
        return False
    config = next(record["config"] for cell, record in records.items() if cell.method != "none")
    data = build_data(config)
    assert isinstance(data, SegmentationData)
    task = build_task(config, data)
    samples = data.samples("test")
    shown = [samples[index] for index in range(0, len(samples), len(samples) // _SCENES)][:_SCENES]
    images = torch.stack([image for image, _ in shown]).float() / 255
    truth = torch.stack([mask for _, mask in shown])
    models: dict[str, Any] = {"teacher": build_teacher(config["teacher"], data.class_names)}
    for cell, record in records.items():
        models["baseline" if cell.method == "none" else cell.method] = load_student(cell.folder, record)
    with torch.no_grad():
        predictions = {name: predict(model, task, images, truth) for name, model in models.items()}
    prediction_grid(images, truth, predictions, data.class_names, data.palette, path)
    return True
