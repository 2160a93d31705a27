# SPDX-License-Identifier: Apache-2.0
"""`kdlvfm list`: what there is to choose from."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from kdlvfm.cli.config import config_dir, options

_SHOWN = {
    "teacher": ("title", "licence", "paper"),
    "student": ("title", "licence"),
    "distiller": ("title", "trains", "paper"),
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
    group = parser.parse_args(arguments).group
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console = Console(width=None if console.is_terminal else 140)
    for shown in [group] if group else _SHOWN:
        table = Table(title=f"{shown}=", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("name", style="cyan", no_wrap=True)
        for column in _SHOWN[shown]:
            table.add_column(column)
        for name in options(shown):
            about = read_about(shown, name)
            table.add_row(name, *(_cell(column, about.get(column)) for column in _SHOWN[shown]))
        console.print(table)
    return 0


def _cell(column: str, value: Any) -> str:
    """A value as shown; of a paper, who and when."""
    if column == "paper" and value and value.count(",") > 1:
        authors, *_, year = str(value).split(",")
        return f"{authors},{year}"
    return str(value or "–")


def read_about(group: str, name: str) -> dict[str, Any]:
    """What the YAML file of an option says about it for people."""
    import yaml

    node = yaml.safe_load((config_dir() / group / f"{name}.yaml").read_text(encoding="utf-8")) or {}
    about: dict[str, Any] = node.get("about") or {}
    return about
