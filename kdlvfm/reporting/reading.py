# SPDX-License-Identifier: Apache-2.0
"""How the numbers of a metric are read: as fractions of which more is better, or as distances of which less is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reading:
    """How the values of a metric are shown.

    Attributes:
        unit: after a value.
        head: below the name of the metric in a table.
        points: after a difference of two values.
        factor: from a value as it is stored to one as it is shown.
        decimals: of what is shown in tables.
        less_is_better: which of two values is the better one.
    """

    unit: str
    head: str
    points: str
    factor: float
    decimals: int
    less_is_better: bool

    def text(self, value: float) -> str:
        """A value by itself, with its unit."""
        return f"{self.factor * value:.2f} {self.unit}" if self.unit else f"{value:.4g}"

    def number(self, value: float, sign: str = "") -> str:
        """A value, or with `sign="+"` a difference, as a table has it."""
        return f"{self.factor * value:{sign}.{self.decimals}f}"

    def gain(self, value: float) -> float:
        """A value or a difference, turned so that more is better."""
        return -value if self.less_is_better else value

    def gains(self, values: Mapping[int, float]) -> dict[int, float]:
        """Values by seed, turned so that more is better."""
        return {seed: self.gain(value) for seed, value in values.items()}


FRACTION = Reading("%", "%", "points", 100, 1, less_is_better=False)
DISTANCE = Reading("", "less is better", "", 1, 3, less_is_better=True)


def reading_of(record: Mapping[str, Any], metric: str) -> Reading:
    """How a record's task wants a metric to be read."""
    return DISTANCE if metric in record["task"].get("distances", ()) else FRACTION
