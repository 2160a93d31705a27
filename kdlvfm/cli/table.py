# SPDX-License-Identifier: Apache-2.0
"""`kdlvfm table`: from run records to a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kdlvfm.cli import CommandError


def run(arguments: Sequence[str]) -> int:
    """Entry point of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="kdlvfm table",
        description="Compare runs: teacher, baseline and methods of one recipe, paired by seed. Three or more paired "
        "seeds give a 95 % interval and a verdict; fewer give none. Records that cannot be used are named.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="run folders, or folders that hold some")
    parser.add_argument("--split", default="test", help="split whose metrics are compared (default: test)")
    parser.add_argument("--metric", help="metric to compare (default: the task's, mIoU or mAP)")
    parser.add_argument("--format", choices=("terminal", "markdown", "csv", "latex"), default="terminal")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="also write table.md, table.csv and table.tex there")
    options = parser.parse_args(arguments)
    print_table(options.runs, options.split, options.metric, options.format, options.out)
    return 0


def print_table(
    runs: Sequence[Path],
    split: str = "test",
    metric: str | None = None,
    form: str = "terminal",
    out: Path | None = None,
) -> None:
    """Print the table of all records in or below `runs`, and write it to the folder `out`.

    Raises:
        CommandError: there is no record to show.
    """
    from kdlvfm.reporting.collect import collect
    from kdlvfm.reporting.latex import to_latex
    from kdlvfm.reporting.render import to_csv, to_markdown, to_rich
    from kdlvfm.reporting.tables import summarise

    collection = collect(runs)
    for problem in collection.problems:
        print(f"not used: {problem}", file=sys.stderr)
    if not collection.records:
        raise CommandError("there is no run record to show.")
    try:
        table = summarise(collection.records.values(), split, metric)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if form == "terminal":
        from rich.console import Console

        console = Console()
        # A log has no width of its own; rich would assume 80 columns and fold the table.
        Console(width=None if console.is_terminal else 120).print(to_rich(table))
    else:
        print({"markdown": to_markdown, "csv": to_csv, "latex": to_latex}[form](table), end="")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "table.md").write_text(to_markdown(table), encoding="utf-8")
        (out / "table.csv").write_text(to_csv(table), encoding="utf-8")
        (out / "table.tex").write_text(to_latex(table), encoding="utf-8")
