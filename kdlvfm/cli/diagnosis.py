# SPDX-License-Identifier: Apache-2.0
"""What the record of a run says about its distillation terms and taps, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kdlvfm.cli import CommandError
from kdlvfm.reporting.record import RecordError, read_record


def show_diagnostics(folder: Path) -> None:
    """Print the last diagnostics of a run, whatever became of it.

    Raises:
        CommandError: the folder is no run, or its record cannot be read.
    """
    path = folder / "record.json"
    if not path.is_file():
        raise CommandError(f"{folder} is not a run: it has no record.json. Names are given as in teacher=NAME.")
    try:
        record = read_record(path)
    except RecordError as error:
        raise CommandError(str(error)) from error
    points = record.get("diagnostics", {"points": []})["points"]
    print(f"{record['name']} on {record['data']['name']}, {record['status']}")
    if not points:
        print("No diagnostics: a run writes them at its end, has none without distillation terms, and none with")
        print("run.diagnose_every=null.")
        return
    last = points[-1]
    print(f"step {last['step']} of {record['steps']}")
    _print(("term", "value", "gradient norm", "of the task's", "cosine to the task"), _term_rows(last["terms"]))
    if last["cka"]:
        first = points[0]
        rows = [(pair, _number(first["cka"].get(pair)), _number(x)) for pair, x in last["cka"].items()]
        _print(("student tap~teacher tap", f"CKA, step {first['step']}", f"step {last['step']}"), rows)


def _term_rows(terms: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    for name, facts in terms.items():
        # Groups and terms of a method made of several have names with slashes in them.
        sums = [other for other in terms if other.endswith("/task") and name.startswith(other.removesuffix("task"))]
        label = max(sums, key=len, default="")
        task, norm = terms.get(label, {}).get("grad_norm"), facts["grad_norm"]
        share = f"{100 * norm / task:.1f} %" if name != label and task and norm is not None else "–"
        yield name, _number(facts["value"]), _number(norm), share, _number(facts["cosine"])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _print(columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    first, *others = columns
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first, style="cyan", no_wrap=True)
    for column in others:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
