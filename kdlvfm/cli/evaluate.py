# SPDX-License-Identifier: Apache-2.0
"""`kdlvfm evaluate`: the student of a finished run, measured again."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from kdlvfm.cli import CommandError


def run(arguments: Sequence[str]) -> int:
    """Entry point of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="kdlvfm evaluate",
        description="Measure the student of a finished run on a split, class by class, and compare with its record.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--split", default="test", help="train, val or test (default: test)")
    parser.add_argument("--data-root", metavar="FOLDER", help="where the data lies here, if not where it was trained")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    options = parser.parse_args(arguments)

    import torch
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from kdlvfm.cli.build import build_data, build_task
    from kdlvfm.cli.config import check_targets
    from kdlvfm.cli.runs import load_student, read_run
    from kdlvfm.training.fit import evaluate

    record = read_run(options.run)
    config = {part: dict(record["config"][part]) for part in ("data", "task")}
    check_targets(config, options.run / "record.json")
    if options.data_root is not None:
        config["data"]["root"] = options.data_root
    data = build_data(config)
    if options.split not in data.splits:
        raise CommandError(f"{data.name} has no split {options.split!r}; it has {', '.join(data.splits)}.")
    if data.split_hash() != record["data"]["split_hash"]:
        print("note: this data is not what the run saw (its split hash differs).")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise CommandError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    student = load_student(options.run, record)
    result = evaluate(student, data.evaluation_loader(options.split), build_task(config, data), device)
    before = record["metrics"].get(options.split)

    table = Table(title=f"{record['name']} on {data.name} {options.split}", box=box.SIMPLE_HEAD, title_style="bold")
    for column in ("metric", "now, %", *(["in the record, %"] if before else [])):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, value in result.items():
        members = value.items() if isinstance(value, dict) else [("", value)]
        for member, number in members:
            cells = [number]
            if before:
                cells.append(before[name][member] if member else before[name])
            table.add_row(f"{name} {member}".strip(), *("–" if cell is None else f"{100 * cell:.2f}" for cell in cells))
    Console().print(table)
    print(f"next  kdlvfm table {options.run.parent}")
    return 0
