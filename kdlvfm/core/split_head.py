# SPDX-License-Identifier: Apache-2.0
"""The split head: what a detector can do if its head can be entered half-way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from kdlvfm.core.features import FeatureModel, TapError


@dataclass(frozen=True)
class HeadTails:
    """The rest of a detector's head at one level.

    Attributes:
        cls: from the tap `cls_mid.<i>` to `cls.<i>`.
        reg: from the tap `reg_mid.<i>` to `reg.<i>`.
        boxes: what `reg.<i>` means, for a head of plain numbers: from there to (B, 4 A, H, W), for each of the A boxes
            of a position the distances to its left, top, right and bottom side. From which point and in which unit
            does not matter, such as from the anchor's centre in sides of the anchor. `None` for a head whose `reg.<i>`
            are distributions of the four distances.
    """

    cls: Callable[[Tensor], Tensor]
    reg: Callable[[Tensor], Tensor]
    boxes: Callable[[Tensor], Tensor] | None = None


@runtime_checkable
class SplitHead(Protocol):
    """What a detector can do, besides being a `FeatureModel`, if its head can be entered half-way.

    It has the taps `cls_mid.<i>` and `reg_mid.<i>` for every level: the maps between two convolutions of the head, as
    one of them, with its normalisation, leaves them. The activation comes after them and is the tails' first step. A
    tail is the network itself: whatever is frozen there is frozen, and gradients flow through it.
    """

    def head_tails(self, index: int) -> HeadTails:
        """What the head at level `index` does with the two maps."""


def split_head(model: FeatureModel) -> SplitHead:
    """The model, known to have a head that can be entered half-way.

    Raises:
        TapError: it has none.
    """
    if not isinstance(model, SplitHead):
        raise TapError(
            f"the head of {model.card.name} cannot be entered half-way: this distiller needs a detector with two "
            "stacks of convolutions, for classes and for boxes (GFL, ATSS, FCOS, RetinaNet)."
        )
    return model
