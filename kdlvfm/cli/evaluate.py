# SPDX-License-Identifier: Apache-2.0
"""`kdlvfm evaluate`: the student of a finished run, measured again."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdlvfm.cli import CommandError

if TYPE_CHECKING:
    from kdlvfm.core import FeatureModel, Task
    from kdlvfm.reporting.record import Record


def run(arguments: Sequence[str]) -> int:
    """Entry point of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="kdlvfm evaluate",
        description="Measure the student of a finished run on a split, class by class, or with --time its speed, and "
        "compare with its record.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--split", default="test", help="train, val or test (default: test)")
    parser.add_argument("--data-root", metavar="FOLDER", help="where the data lies here, if not where it was trained")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    parser.add_argument(
        "--time",
        type=float,
        metavar="SECONDS",
        help="spend so long on the latency of the student and its images/s, on this device, instead of on its scores",
    )
    options = parser.parse_args(arguments)
    if options.time is not None and options.time <= 0:
        raise CommandError(f"--time must be above 0 seconds, not {options.time:g}.")

    from rich import box
    from rich.console import Console
    from rich.table import Table

    from kdlvfm.cli.build import build_data, build_task, build_teacher
    from kdlvfm.cli.runs import FROM_RUN, find_device, load_student, read_run
    from kdlvfm.cli.targets import check_targets
    from kdlvfm.reporting.reading import reading_of
    from kdlvfm.training.fit import evaluate

    record = read_run(options.run)
    config = {part: dict(record["config"][part]) for part in ("data", "task")}
    if "judge" in config["task"] and config["task"]["judge"] is None:  # it measures by the run's teacher
        if record["teacher"]["weights"] == "random":
            raise CommandError("the run is measured by its teacher, whose random weights cannot be had a second time.")
        config["teacher"] = dict(record["config"]["teacher"])
    check_targets(config, options.run / "record.json", trusted=(FROM_RUN,))
    if options.data_root is not None:
        config["data"]["root"] = options.data_root
    data = build_data(config)
    if options.split not in data.splits:
        raise CommandError(f"{data.name} has no split {options.split!r}; it has {', '.join(data.splits)}.")
    if data.split_hash() != record["data"]["split_hash"]:
        print("note: this data is not what the run saw (its split hash differs).")
    device = find_device(options.device)
    student = load_student(options.run, record)
    task = build_task(config, data, build_teacher(config.get("teacher"), data.class_names))
    if options.time is not None:
        _print_time(student.to(device), task, record, options.time)
        return 0
    result = evaluate(student, data.evaluation_loader(options.split), task, device)
    before = record["metrics"].get(options.split)

    table = Table(title=f"{record['name']} on {data.name} {options.split}", box=box.SIMPLE_HEAD, title_style="bold")
    unit = "" if record["task"].get("distances") else ", %"
    for column in ("metric", f"now{unit}", *([f"in the record{unit}"] if before else [])):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, value in result.items():
        members, read = value.items() if isinstance(value, dict) else [("", value)], reading_of(record, name)
        for member, number in members:
            cells = [number]
            if before:
                cells.append(before[name][member] if member else before[name])
            shown = ("–" if cell is None else read.text(cell).removesuffix(" %") for cell in cells)
            table.add_row(f"{name} {member}".strip(), *shown)
    Console().print(table)
    print(f"next  kdlvfm table {options.run.parent}")
    return 0


def _print_time(student: FeatureModel, task: Task, record: Record, seconds: float) -> None:
    """The time of an inference here, and below it the one in the record, if there is one."""
    from kdlvfm.cli.measure import whole_forward
    from kdlvfm.reporting.cost import measure_inference

    height, width = record["student"]["input_size"]
    forward = whole_forward(student, task)
    now = measure_inference(student, (height, width), forward=forward, seconds=seconds)
    print(f"{record['name']}, images of {height}x{width} pixels (height x width), {now['precision']}")
    for title, found in {"now": now, "record": record.get("inference")}.items():
        if found is not None:
            tail = "" if found["latency_p95"] is None else f", 95 % below {1000 * found['latency_p95']:,.1f} ms"
            single = f"one image {1000 * found['latency_p50']:,.1f} ms (median of {found['repetitions']}){tail}"
            batches = f"{found['images_per_second']:,.1f} images/s in batches of {found['batch_size']}"
            print(f"{title:<7} {found['device']}, threads {found['threads']}; {single}; {batches}")
