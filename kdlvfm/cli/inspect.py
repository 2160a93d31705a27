# SPDX-License-Identifier: Apache-2.0
"""`kdlvfm inspect`: the taps of a teacher and a student and which pair up by stride, or how a run distilled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from kdlvfm.cli import CommandError
from kdlvfm.cli.diagnosis import show_diagnostics
from kdlvfm.core import TapInfo

_Built = TypeVar("_Built")

_HELP = """\
usage: kdlvfm inspect [teacher=NAME] [student=NAME] [KEY=VALUE ...]
       kdlvfm inspect RUN

Taps of a teacher and a student with channels and stride, and the pairs of maps that lie closest in stride.
Needs no weights and downloads nothing.

Of a run's folder: gradients of its terms and similarity of its taps at the last step that was looked at.

examples:
  kdlvfm inspect teacher=dinov3_vits16 student=resnet18_deeplabv3plus
  kdlvfm inspect runs/camvid/resnet18_deeplabv3plus/kd-from_run-seed0-1a2b3c
"""


def run(arguments: Sequence[str]) -> int:
    """Entry point of the subcommand."""
    if {"-h", "--help"} & set(arguments):
        print(_HELP)
        return 0
    if len(arguments) == 1 and "=" not in arguments[0]:
        show_diagnostics(Path(arguments[0]))
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
        found = pairs(student.taps(), teacher.taps())
        if not found:
            print("next  kdlvfm list distiller    (these networks have no maps to pair)")
            return 0
        console.print("[bold]pairs by stride[/]")
        table = Table(box=box.SIMPLE_HEAD)
        for column in ("student_tap", "teacher_tap", "strides", "channels"):
            table.add_column(column, style="cyan" if "tap" in column else "")
        for one, other in found:
            a, b = student.tap_info(one), teacher.tap_info(other)
            table.add_row(one, other, f"{a.stride} : {b.stride}", f"{a.dim} : {b.dim}")
        console.print(table)
        example = ([pair for pair in found if pair[0].startswith("map.")] or found)[-1]
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
    except NotImplementedError:
        # What torch raises for open_clip, which moves its networks to a device: weights without memory cannot move.
        return build()


def pairs(student: Mapping[str, TapInfo], teacher: Mapping[str, TapInfo]) -> list[tuple[str, str]]:
    """For each map of the student, the deepest map of the teacher, or of each, whose stride is nearest (as a ratio).

    The levels of a detector's pyramid pair with those of the teacher's, or with maps of a teacher that has no levels.
    """
    members: dict[str, dict[str, TapInfo]] = {}
    for tap, info in teacher.items():
        members.setdefault(tap.rpartition("/")[0], {})[tap] = info
    found = []
    for kind in ("map.", "fpn."):
        for tap, info in _maps(student, kind).items():
            for taps in members.values():
                maps = _maps(taps, kind) or _maps(taps, "map.")
                if not maps:
                    continue  # a classifier of images, say
                nearest = min(reversed(maps.items()), key=lambda item: abs(_log_ratio(info.stride, item[1].stride)))
                found.append((tap, nearest[0]))
    return found


def _maps(taps: Mapping[str, TapInfo], kind: str) -> dict[str, TapInfo]:
    return {tap: info for tap, info in taps.items() if tap.rpartition("/")[2].startswith(kind)}


def _log_ratio(a: int | None, b: int | None) -> float:
    from math import log2

    return log2(a or 1) - log2(b or 1)
