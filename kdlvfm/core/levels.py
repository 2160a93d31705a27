# SPDX-License-Identifier: Apache-2.0
"""Levels: which maps of a detector and of its teacher belong together, and one method at several pairs of them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kdlvfm.core.distiller import Context, Distiller
from kdlvfm.core.features import FeatureModel, Features, level_taps

_SINGLE = ("student_tap", "teacher_tap")
_SEVERAL = ("student_taps", "teacher_taps")


def nearest_tap(model: FeatureModel, kind: str, stride: int | None) -> str:
    """The tap `<kind>.<i>` of the stride nearest, by ratio, to the one given; the deepest of several.

    Args:
        model: any network.
        kind: `"map"`, `"fpn"`, ...
        stride: in pixels.

    Raises:
        TapError: the model has no such taps.
    """

    def distance(tap: str) -> float:
        return abs(math.log2((model.tap_info(tap).stride or 1) / (stride or 1)))

    return min(reversed(level_taps(model, kind)), key=distance)


def level_pairs(student: FeatureModel, teacher: FeatureModel, kind: str) -> list[tuple[str, str]]:
    """Every tap `<kind>.<i>` of the student with the teacher's of the nearest stride.

    Raises:
        TapError: a network has no such taps.
    """
    return _with_nearest(student, level_taps(student, kind), teacher, kind)


def map_pairs(context: Context) -> list[tuple[str, str]]:
    """The maps that a detector is to take from its teacher: pairs of taps, the student's first.

    From a detector, at every level of the student, the teacher's level of the nearest stride. From an encoder, its last
    map, by the level of the nearest stride: there the student has seen as much as in its own encoder's last map, and on
    a finer grid. None from a teacher that has neither, such as an ensemble, whose maps have other names.
    """
    student, teacher = context.student, context.require_teacher().model
    kinds = {tap.rpartition(".")[0] for tap in teacher.taps()}
    if "fpn" in kinds:
        return level_pairs(student, teacher, "fpn")
    if "map" in kinds:
        return [(nearest_tap(student, "fpn", teacher.tap_info("map.-1").stride), "map.-1")]
    return []


def head_pairs(context: Context) -> list[tuple[str, str]]:
    """What a detector's head reads, each tap with the teacher's level, or an encoder's map, of the nearest stride.

    Raises:
        TapError: the teacher has no maps.
    """
    student, teacher = context.student, context.require_teacher().model
    kinds = {tap.rpartition(".")[0] for tap in teacher.taps()}
    return _with_nearest(student, student.head_taps, teacher, "fpn" if "fpn" in kinds else "map")


def _with_nearest(
    student: FeatureModel, taps: Sequence[str], teacher: FeatureModel, kind: str
) -> list[tuple[str, str]]:
    return [(tap, nearest_tap(teacher, kind, student.tap_info(tap).stride)) for tap in taps]


def build_at_levels(context: Context, method: type[Distiller], **hparams: Any) -> Distiller:
    """As `method.from_context`, but taps that are not given are, for a detector, those of `map_pairs`.

    This is where a method for feature maps learns that it is to distil a detector. One that takes several taps gets
    them all. One that takes a single tap of each network is built once for each pair, see `Levels`. Methods that read
    something else, such as class scores, are built as they are, and so are methods that by their own defaults read
    several maps of an encoder.

    Args:
        context: of the run.
        method: the class of the distiller.
        **hparams: its arguments; where a tap is among them, the method is built with that and its own defaults.

    Raises:
        TapError: a network has no such tap.
        ValueError: the method trains networks apart from the student, which it cannot do at several levels.
    """
    parameters = inspect.signature(method).parameters
    names = next((pair for pair in (_SINGLE, _SEVERAL) if {*pair} <= parameters.keys()), None)
    if context.task.truth != "boxes" or names is None or hparams.keys() & {*names}:
        return method.from_context(context, **hparams)
    default = parameters[names[0]].default
    # A method with logits for a default reads maps as well if it can be told how many channels they have.
    reads_maps = default is None or "map." in str(default) or "student_dim" in parameters
    pairs = map_pairs(context) if reads_maps else []
    if names == _SINGLE and pairs:
        taps = [dict(zip(names, pair, strict=True)) for pair in pairs]
        levels = [method.from_context(context, **level, **hparams) for level in taps]
        return levels[0] if len(levels) == 1 else Levels(levels)
    if pairs and (default is None or len(default) == 1 or len(pairs) > 1):
        hparams = {**{name: list(taps) for name, taps in zip(names, zip(*pairs, strict=True), strict=True)}, **hparams}
    return method.from_context(context, **hparams)


class Levels(Distiller):
    """One method at several pairs of maps, each with networks of its own; terms of one name are added.

    So do the authors of PKD, MGD and FGD with a detector's pyramid, all levels with one weight.

    Args:
        levels: the distillers.

    Raises:
        ValueError: there are none, or one moves parameters apart from the student.

    Example:
        >>> import torch
        >>> from kdlvfm.distillers import PKD
        >>> pkd = Levels([PKD(8, 8, student_tap=f"fpn.{i}", teacher_tap=f"fpn.{i}") for i in range(2)])
        >>> maps = {"fpn.0": torch.rand(2, 8, 4, 4), "fpn.1": torch.rand(2, 8, 2, 2)}
        >>> list(pkd(maps, maps))
        ['pkd']
    """

    def __init__(self, levels: Sequence[Distiller]) -> None:
        super().__init__()
        if not levels:
            raise ValueError("there must be levels.")
        for level in levels:
            apart = level.parameter_groups(nn.Identity()).keys() - {"student"}
            if apart:
                raise ValueError(
                    f"{type(level).__name__} trains its {', '.join(sorted(apart))} apart from the student, which it "
                    "can do at one pair of maps only: name the taps, for example student_tap=fpn.0 teacher_tap=fpn.0."
                )
        self.levels = nn.ModuleList(levels)
        self.student_taps = tuple(tap for level in levels for tap in level.student_taps)
        self.teacher_taps = tuple(tap for level in levels for tap in level.teacher_taps)
        self.moves_subsets = any(level.moves_subsets for level in levels)
        self.calls_teacher = any(level.calls_teacher for level in levels)
        self.needs_truth = any(level.needs_truth for level in levels)

    def forward(self, student: Features, teacher: Features, target: Any = None) -> dict[str, Tensor]:
        """The method's terms, sums over the levels."""
        terms: dict[str, Tensor] = {}
        for level in self.levels:
            for name, term in level(student, teacher, target).items():
                terms[name] = terms[name] + term if name in terms else term
        return terms
