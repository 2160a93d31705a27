# SPDX-License-Identifier: Apache-2.0
"""`kdlvfm report`: from run records to one page that can be sent to someone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kdlvfm.cli import CommandError


def run(arguments: Sequence[str]) -> int:
    """Entry point of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="kdlvfm report",
        description="Write one HTML file with the table of `kdlvfm table`, to sort and filter, figures, and the "
        "configuration, command, revision and logs of every run. It works offline, in light and dark, and on paper.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="run folders, or folders that hold some")
    parser.add_argument("--out", type=Path, metavar="FILE", default=Path("report.html"), help="(default: report.html)")
    parser.add_argument("--title", help="of the page (default: the names of the data)")
    parser.add_argument("--split", default="test", help="split whose metrics are compared (default: test)")
    parser.add_argument("--metric", help="metric to compare (default: the task's, mIoU or mAP)")
    parser.add_argument(
        "--scenes",
        type=int,
        default=4,
        metavar="N",
        help="images of the split on which predictions are drawn, where students and data are at hand; 0 for none "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--wandb",
        metavar="PROJECT",
        help="also make a run of this project of Weights & Biases, PROJECT or ENTITY/PROJECT, with the table and, as "
        "an artifact, the page; with WANDB_MODE=offline in a folder",
    )
    options = parser.parse_args(arguments)
    if options.scenes < 0:
        raise CommandError("--scenes must be at least 0.")
    if options.out.is_dir():
        raise CommandError(
            f"--out {options.out} is a folder; name a file in it, such as {options.out / 'report.html'}."
        )

    from kdlvfm.cli.pictures import draw_block
    from kdlvfm.reporting.collect import collect
    from kdlvfm.reporting.html import to_html
    from kdlvfm.reporting.tables import summarise
    from kdlvfm.reporting.weights_and_biases import PublishError, check_project, publish

    if options.wandb is not None:
        try:
            check_project(options.wandb)
        except PublishError as error:
            raise CommandError(str(error)) from error
    collection = collect(options.runs)
    for problem in collection.problems:
        print(f"not used: {problem}", file=sys.stderr)
    if not collection.records:
        raise CommandError("there is no run record to show.")
    try:
        table = summarise(collection.records.values(), options.split, options.metric, collection.folders)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if any(block.reading.less_is_better for block in table.blocks):
        raise CommandError("the page shows fractions only, and these runs have distances: use kdlvfm table.")
    pictures = [draw_block(block, collection.folders, options.scenes) for block in table.blocks]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    page = to_html(
        table,
        collection.records,
        options.out.parent.resolve(),
        title=options.title,
        pictures=pictures,
        problems=collection.problems,
    )
    options.out.write_text(page, encoding="utf-8")
    print(f"wrote  {options.out} ({len(page.encode()) / 2**20:.1f} MiB)")
    for block, picture in zip(table.blocks, pictures, strict=True):
        if picture.png is None:
            print(f"note   {block.data}: {picture.note}")
    if options.wandb is not None:
        try:
            run = publish(table, options.out, options.wandb)
        except PublishError as error:
            raise CommandError(str(error)) from error
        print(f"sent   {run.address}" if run.address else f"wrote  {run.folder}; to send it: wandb sync {run.folder}")
    print(f"next   open {options.out} in a browser")
    return 0
