# SPDX-License-Identifier: Apache-2.0
"""`kdlvfm list`: what there is to choose from."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from kdlvfm.cli import CommandError
from kdlvfm.cli.composites import names_in
from kdlvfm.cli.config import config_dir, options
from kdlvfm.cli.console import table_console

_SHOWN = {
    "teacher": ("title", "licence", "paper"),
    "student": ("title", "licence"),
    "distiller": ("title", "trains", "tasks", "paper"),
    "synthesizer": ("title", "paper"),
    "data": ("title", "licence", "paper"),
    "recipe": ("title",),
    "experiment": ("title",),
}


def run(arguments: Sequence[str]) -> int:
    """Entry point of the subcommand."""
    parser = argparse.ArgumentParser(
        prog="kdlvfm list", description="Names for `kdlvfm train`, with the licence of the weights or data, and papers."
    )
    parser.add_argument("group", nargs="?", choices=tuple(_SHOWN), help="show this group only")
    parser.add_argument(
        "--task", help="distillers for this task only: segmentation, detection, diffusion or representation"
    )
    parser.add_argument("--names", action="store_true", help="names alone, comma-separated, as -m takes them")
    chosen = parser.parse_args(arguments)
    group, task = chosen.group, chosen.task
    if task is not None and (group != "distiller" or task not in options("task")):
        raise CommandError(f"--task is one of {', '.join(options('task'))}, with: kdlvfm list distiller.")
    if chosen.names:
        if group is None:
            raise CommandError("--names needs a group, for example: kdlvfm list distiller --names.")
        print(",".join(_names(group, task)))
        return 0
    from rich import box
    from rich.table import Table

    console = table_console()
    for shown in [group] if group else _SHOWN:
        table = Table(title=f"{shown}=", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("name", style="cyan", no_wrap=True)
        for column in _SHOWN[shown]:
            table.add_column(column)
        for name in _names(shown, task):
            about = read_about(shown, name)
            table.add_row(name, *(_cell(column, about.get(column)) for column in _SHOWN[shown]))
        console.print(table)
    return 0


def _names(group: str, task: str | None) -> list[str]:
    """Options of a group; of distillers, those for a task if one is given."""
    return [name for name in options(group) if task is None or task in read_about(group, name)["tasks"]]


def _cell(column: str, value: Any) -> str:
    """A value as shown; of papers, who and when."""
    if isinstance(value, list):
        return ", ".join(value)
    if column == "paper" and value:
        cited = [paper.split(",") for paper in str(value).split("; ")]
        return "; ".join(",".join([parts[0], parts[-1]] if len(parts) > 2 else parts) for parts in cited)
    return str(value or "–")


def read_about(group: str, name: str) -> dict[str, Any]:
    """What the YAML file of an option says about it for people."""
    import yaml

    node = yaml.safe_load((config_dir() / group / f"{name}.yaml").read_text(encoding="utf-8")) or {}
    about: dict[str, Any] = node.get("about") or {}
    return about


def papers_of(choice: str) -> str:
    """The papers of the distillers in a choice, as far as their YAML files name one."""
    known = options("distiller")
    abouts = [read_about("distiller", name) for name in names_in(choice) if name in known]
    return "; ".join(about["paper"] for about in abouts if about.get("paper"))
