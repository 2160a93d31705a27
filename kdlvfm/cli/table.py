# SPDX-License-Identifier: Apache-2.0
"""`kdlvfm table`: from run records to a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdlvfm.cli import CommandError
from kdlvfm.cli.console import table_console

if TYPE_CHECKING:
    from kdlvfm.reporting.block import Table
    from kdlvfm.reporting.record import Record

_OUT = (
    "also write table.md, table.csv (all columns), table.tex and the differences as figure.svg and figure.pdf there; "
    "with --cost cost.md and cost.tex too"
)


def run(arguments: Sequence[str]) -> int:
    """Entry point of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="kdlvfm table",
        description="Compare runs: teacher, baseline and methods of one recipe, paired by seed. Two or more paired "
        "seeds give a 95 % interval, three a verdict; a single one gives an interval over the test images alone, which "
        "is marked. Records that cannot be used are named.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="run folders, or folders that hold some")
    parser.add_argument("--split", default="test", help="split whose metrics are compared (default: test)")
    parser.add_argument("--metric", help="metric to compare (default: the task's, mIoU or mAP)")
    parser.add_argument(
        "--format",
        choices=("terminal", "markdown", "csv", "latex", "model-index"),
        default="terminal",
        help="model-index: the results for the YAML head of a model card on the Hugging Face Hub, an entry for each "
        "method (default: terminal)",
    )
    parser.add_argument(
        "--cost",
        action="store_true",
        help="what networks and training cost: parameters, MACs, latency, images/s, time, memory, the teacher's share",
    )
    parser.add_argument("--source", metavar="URL", help="where the records are to be found, for model-index")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=_OUT)
    options = parser.parse_args(arguments)
    if options.source is not None and options.format != "model-index":
        raise CommandError("--source stands in a model-index: add --format model-index.")
    if options.cost and options.format in ("csv", "model-index"):
        raise CommandError(f"--cost chooses columns, which {options.format} does not need: leave it out.")
    print_table(options.runs, options.split, options.metric, options.format, options.out, options.source, options.cost)
    return 0


def print_table(
    runs: Sequence[Path],
    split: str = "test",
    metric: str | None = None,
    form: str = "terminal",
    out: Path | None = None,
    source: str | None = None,
    cost: bool = False,
) -> None:
    """Print the table of all records in or below `runs`, and write it to the folder `out`.

    Args:
        runs: folders, or record files.
        split: the split whose metrics are compared.
        metric: the metric compared; `None`: the primary one of the task.
        form: what is printed, one of the choices of `--format`.
        out: folder for the table as Markdown, CSV and LaTeX, and for its figure.
        source: where the records are to be found, as a model-index says.
        cost: what was spent is shown in place of what was reached, and written beside it.

    Raises:
        CommandError: there is no record to show.
    """
    from kdlvfm.reporting.collect import collect
    from kdlvfm.reporting.latex import to_latex
    from kdlvfm.reporting.plot import draw_differences
    from kdlvfm.reporting.render import to_csv, to_markdown, to_rich
    from kdlvfm.reporting.tables import summarise

    collection = collect(runs)
    for problem in collection.problems:
        print(f"not used: {problem}", file=sys.stderr)
    if not collection.records:
        raise CommandError("there is no run record to show.")
    try:
        table = summarise(collection.records.values(), split, metric, collection.folders)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if form == "terminal":
        table_console().print(to_rich(table, cost=cost))
    elif form == "model-index":
        print(_model_index(table, collection.records.values(), source), end="")
    elif form == "csv":
        print(to_csv(table), end="")
    else:
        print({"markdown": to_markdown, "latex": to_latex}[form](table, cost=cost), end="")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "table.md").write_text(to_markdown(table), encoding="utf-8")
        (out / "table.csv").write_text(to_csv(table), encoding="utf-8")
        (out / "table.tex").write_text(to_latex(table), encoding="utf-8")
        draw_differences(table, [out / "figure.svg", out / "figure.pdf"])
        if cost:
            (out / "cost.md").write_text(to_markdown(table, cost=True), encoding="utf-8")
            (out / "cost.tex").write_text(to_latex(table, cost=True), encoding="utf-8")


def _model_index(table: Table, records: Iterable[Record], source: str | None) -> str:
    from kdlvfm.cli.list import papers_of
    from kdlvfm.reporting.model_index import to_model_index

    papers = {choice: papers_of(choice) for choice in {record["distiller"]["name"] for record in records}}
    try:
        return to_model_index(table, papers, source)
    except ValueError as error:
        raise CommandError(str(error)) from error
