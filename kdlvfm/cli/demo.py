# SPDX-License-Identifier: Apache-2.0
"""`kdlvfm demo`: teacher, baseline and three distillers on DigitScenes, from nothing to a table and a picture."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdlvfm.cli import CommandError
from kdlvfm.cli.table import print_table

if TYPE_CHECKING:
    from kdlvfm.cli.sweep import Cell

METHODS = {
    "none": (),
    "kd": (),
    "fitnet": ("distiller.student_tap=map.2",),  # of stride 8, as the teacher's maps: `kdlvfm inspect` pairs them
    "cwd": (),
}
_SCENES = 4


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
    from kdlvfm.cli.launch import INTERRUPTED, side_by_side, summarise
    from kdlvfm.cli.sweep import Sweep

    cells = [_cell(method, seed, options.out) for seed in range(options.seeds) for method in METHODS]
    sweep = Sweep.of(options.out, cells)
    sweep.write()
    if not side_by_side(sweep, sweep.due(retry=True), options.jobs):
        print("\nInterrupted. The same command goes on where it stopped.")
        return INTERRUPTED
    code = summarise(sweep)
    print()
    print_table([options.out], out=options.out)
    picture = _picture([cell for cell in sweep.cells if cell.seed == 0], options.out / "predictions.png")
    print(
        f"wrote  {options.out}/: a record.json for each run, table.md, table.csv, table.tex"
        + (", predictions.png" if picture else "")
    )
    if options.seeds < 3:
        print("next   make demo SEEDS=3    (mean, standard deviation, paired intervals, verdicts)")
    else:
        print("next   kdlvfm train --help    (your data, your teacher)")
    return code


def _cell(method: str, seed: int, out: Path) -> Cell:
    from kdlvfm.cli.sweep import cell_of

    chosen = [f"distiller={method}", *METHODS[method], f"seed={seed}", f"out={out / f'{method}-seed{seed}'}"]
    return cell_of(["experiment=demo", *chosen], title="baseline" if method == "none" else method)[0]


def _picture(cells: Iterable[Cell], path: Path) -> bool:
    """Test scenes with the predictions of teacher and students; `False` if a run is missing."""
    from kdlvfm.cli.pictures import draw_predictions

    runs = {cell.title: cell.folder for cell in cells}
    try:
        draw_predictions(runs, "test", _SCENES, path)
    except CommandError:
        return False
    return True
