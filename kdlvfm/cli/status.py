# SPDX-License-Identifier: Apache-2.0
"""`kdlvfm status`: how far sweeps are."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from kdlvfm.cli.sweep import Sweep

_STYLES = {"done": "green", "running": "cyan", "failed": "red", "interrupted": "yellow", "waiting": "dim"}


def run(arguments: Sequence[str]) -> int:
    """Entry point of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="kdlvfm status",
        description="The grid of each sweep below the folders: cells that are done, running, failed, interrupted or "
        "waiting, then what failed, with its error and log, and what runs, with the process that computes it.",
    )
    parser.add_argument("runs", nargs="*", type=Path, default=[Path("runs")], metavar="RUNS", help="(default: runs)")
    parser.add_argument("--json", action="store_true", help="for other programs")
    options = parser.parse_args(arguments)
    from kdlvfm.cli.sweep import as_json, find

    sweeps = find(options.runs)
    if options.json:
        print(json.dumps({str(sweep.folder): as_json(sweep) for sweep in sweeps}, indent=2))
        return 0
    from rich.console import Console

    console = Console()
    for sweep in sweeps:
        _show(sweep, console if console.is_terminal else Console(width=120))
    return 0


def _show(sweep: Sweep, console: Console) -> None:
    """A row for each combination, a column for each seed; below it what one would ask about next."""
    from rich.table import Table
    from rich.text import Text

    from kdlvfm.cli.sweep import DONE, WAITING, counts

    states = sweep.states()
    seeds = sorted({cell.seed for cell in states})
    console.print(Text(f"{sweep.folder}: {counts(states.values())}", "bold"), soft_wrap=True)
    grid = Table()
    grid.add_column("")
    for seed in seeds:
        grid.add_column(f"seed {seed}")
    for title in dict.fromkeys(cell.title for cell in states):
        row = {cell.seed: state.name for cell, state in states.items() if cell.title == title}
        shown = [Text(row[seed], _STYLES[row[seed]]) if seed in row else Text("") for seed in seeds]
        grid.add_row(Text(title), *shown)
    console.print(grid)
    for cell, state in states.items():
        if state.name in (DONE, WAITING):
            continue
        detail = f": {state.detail}" if state.detail else ""
        console.print(Text(f"{state.name}: {cell.name}{detail}"), soft_wrap=True)
        if sweep.log(cell).exists():
            console.print(Text(f"  log  {sweep.log(cell)}"), soft_wrap=True)
