# SPDX-License-Identifier: Apache-2.0
"""`kdlvfm demo`: teacher, baseline and three distillers on DigitScenes, from nothing to a table and a picture."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from kdlvfm.cli import CommandError
from kdlvfm.cli.table import print_table

if TYPE_CHECKING:
    from kdlvfm.cli.sweep import Cell


@dataclass(frozen=True)
class Demo:
    """What is compared.

    Attributes:
        experiment: its settings.
        methods: name of a distiller -> what else is set for it.
        libraries: those that it needs beyond the command's own.
    """

    experiment: str
    methods: Mapping[str, Sequence[str]]
    libraries: Sequence[str] = ()


_BASELINE = "none"
DEMOS = {
    "segmentation": Demo(
        "demo",
        {
            _BASELINE: (),
            "kd": (),
            "fitnet": ("distiller.student_tap=map.2",),  # of the teacher's stride: `kdlvfm inspect` pairs them
            "cwd": (),
        },
    ),
    "detection": Demo(
        "demo_detection", {_BASELINE: (), "pkd": (), "ld": (), "crosskd": ()}, ("mmdet", "faster_coco_eval")
    ),
}
_SCENES = 4


def run(arguments: Sequence[str]) -> int:
    """Entry point of the subcommand."""
    listed = "; ".join(f"{task}: {', '.join(_distillers(demo))}" for task, demo in DEMOS.items())
    parser = argparse.ArgumentParser(
        prog="kdlvfm demo",
        description="Train the baseline and three distillers under one recipe on DigitScenes with few labels; a small "
        f"ViT that comes with the package is the teacher ({listed}). Ends with a table and a picture. What is finished "
        "is reused; what was interrupted goes on.",
    )
    parser.add_argument("--task", choices=tuple(DEMOS), default="segmentation", help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method (default: 1; 3 give a verdict)")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/demo, or runs/demo_detection)")
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.jobs < 1:
        raise CommandError("--seeds and --jobs must be at least 1.")
    demo = DEMOS[options.task]
    for library in demo.libraries:
        if find_spec(library) is None:
            raise ModuleNotFoundError(name=library)
    out = options.out or Path("runs", demo.experiment)
    from kdlvfm.cli.launch import INTERRUPTED, side_by_side, summarise
    from kdlvfm.cli.sweep import Sweep

    cells = [_cell(demo, method, seed, out) for seed in range(options.seeds) for method in demo.methods]
    sweep = Sweep.of(out, cells)
    sweep.write()
    if not side_by_side(sweep, sweep.due(retry=True), options.jobs):
        print("\nInterrupted. The same command goes on where it stopped.")
        return INTERRUPTED
    code = summarise(sweep)
    print()
    print_table([out], out=out)
    picture = _picture([cell for cell in sweep.cells if cell.seed == 0], out / "predictions.png")
    print(
        f"wrote  {out}/: a record.json for each run, table.md, table.csv, table.tex, figure.svg"
        + (", predictions.png" if picture else "")
    )
    if options.seeds < 3:
        task = "" if options.task == "segmentation" else f" TASK={options.task}"
        print(f"next   make demo{task} SEEDS=3    (mean, standard deviation, paired intervals, verdicts)")
    else:
        print("next   kdlvfm train --help    (your data, your teacher)")
    return code


def _distillers(demo: Demo) -> list[str]:
    return [method for method in demo.methods if method != _BASELINE]


def _cell(demo: Demo, method: str, seed: int, out: Path) -> Cell:
    from kdlvfm.cli.sweep import cell_of

    chosen = [f"distiller={method}", *demo.methods[method], f"seed={seed}", f"out={out / f'{method}-seed{seed}'}"]
    title = "baseline" if method == _BASELINE else method
    return cell_of([f"experiment={demo.experiment}", *chosen], title=title)[0]


def _picture(cells: Iterable[Cell], path: Path) -> bool:
    """Test scenes with the predictions of teacher and students; `False` if a run is missing."""
    from kdlvfm.cli.pictures import draw_predictions

    runs = {cell.title: cell.folder for cell in cells}
    try:
        draw_predictions(runs, "test", _SCENES, path)
    except CommandError:
        return False
    return True
