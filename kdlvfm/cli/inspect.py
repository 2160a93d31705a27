# SPDX-License-Identifier: Apache-2.0
"""`kdlvfm inspect`: the taps of a teacher and a student, and which pair up by stride."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from kdlvfm.cli import CommandError
from kdlvfm.core import TapInfo

_Built = TypeVar("_Built")

_HELP = """\
usage: kdlvfm inspect [teacher=NAME] [student=NAME] [KEY=VALUE ...]

Taps of a teacher and a student with channels and stride, and the pairs of maps that lie closest in stride.
Needs no weights and downloads nothing.

example:
  kdlvfm inspect teacher=dinov3_vits16 student=resnet18_deeplabv3plus
"""


def run(arguments: Sequence[str]) -> int:
    """Entry point of the subcommand."""
    if {"-h", "--help"} & set(arguments):
        print(_HELP)
        return 0
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from kdlvfm.cli.build import build_student, build_teacher
    from kdlvfm.cli.config import compose
    from kdlvfm.cli.runs import without_weights

    config = compose(["distiller=kd", *arguments])
    try:
        student = _outline(lambda: build_student(without_weights(config["student"]), num_classes=2))
        node = config["teacher"]
        teacher = None if node is None else _outline(lambda: build_teacher(without_weights(node), ("a", "b")))
    except ValueError as error:
        raise CommandError(str(error)) from error
    console = Console()
    models = {"student": (student.card.name, student.taps())}
    if teacher is not None:
        models["teacher"] = (teacher.card.name, teacher.taps())
    for role, (name, taps) in models.items():
        console.print(f"[bold]{role}[/]  {name}", highlight=False)
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("tap", style="cyan")
        table.add_column("channels", justify="right")
        table.add_column("stride", justify="right")
        for tap, info in taps.items():
            table.add_row(tap, str(info.dim), "–" if info.stride is None else str(info.stride))
        console.print(table)
    if teacher is not None:
        console.print("[bold]pairs by stride[/]")
        table = Table(box=box.SIMPLE_HEAD)
        for column in ("student_tap", "teacher_tap", "strides", "channels"):
            table.add_column(column, style="cyan" if "tap" in column else "")
        for one, other in pairs(student.taps(), teacher.taps()):
            a, b = student.tap_info(one), teacher.tap_info(other)
            table.add_row(one, other, f"{a.stride} : {b.stride}", f"{a.dim} : {b.dim}")
        console.print(table)
        example = pairs(student.taps(), teacher.taps())[-1]
        print(
            f"next  kdlvfm train {' '.join(arguments)} distiller=fitnet "
            f"distiller.student_tap={example[0]} distiller.teacher_tap={example[1]}"
        )
    return 0


def _outline(build: Callable[[], _Built]) -> _Built:
    """What `build` makes, without memory for its weights: those of the largest teachers would fill the machine."""
    import torch

    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*to a meta parameter in the current model, which is a no-op")
            return build()
    except NotImplementedError:  # open_clip moves its networks to a device, and so cannot do without
        return build()


def pairs(student: Mapping[str, TapInfo], teacher: Mapping[str, TapInfo]) -> list[tuple[str, str]]:
    """For each map of the student, the deepest map of the teacher whose stride is nearest (as a ratio)."""
    found = []
    for tap, info in _maps(student).items():
        nearest = min(reversed(_maps(teacher).items()), key=lambda item: abs(_log_ratio(info.stride, item[1].stride)))
        found.append((tap, nearest[0]))
    return found


def _maps(taps: Mapping[str, TapInfo]) -> dict[str, TapInfo]:
    return {tap: info for tap, info in taps.items() if tap.startswith("map.")}


def _log_ratio(a: int | None, b: int | None) -> float:
    from math import log2

    return log2(a or 1) - log2(b or 1)
