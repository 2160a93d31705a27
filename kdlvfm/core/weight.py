# SPDX-License-Identifier: Apache-2.0
"""The weight of a part of a loss, as a function of how far the run is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

Decay = Literal["constant", "cosine"]


@dataclass(frozen=True)
class Weight:
    """The weight of a part over a run, in which `start`, `warmup` and `stop` are shares of the run.

    It is 0 until `start`, rises linearly for `warmup`, then stays or falls until `stop`, and is 0 from there on. While
    it is 0 the part rests: it is neither computed nor trained.

    Attributes:
        value: the full weight, which multiplies the terms of the part as it returns them.
        start: where the weight leaves 0.
        warmup: how long it rises.
        decay: `"constant"`, or `"cosine"`: half a cosine from the full weight to 0 at `stop`.
        stop: where the part ends; 1 is the end of the run.
        share: calibrate the full weight instead of stating it: the gradient of the part has this share of the length of
            the task's gradient, see `Compose`.

    Raises:
        ValueError: the numbers make no schedule, or `value` and `share` are both given.

    Example:
        >>> weight = Weight(2.0, warmup=0.5)
        >>> [weight.at(progress) for progress in (0.0, 0.25, 0.5, 0.75)]
        [0.0, 1.0, 2.0, 2.0]
    """

    value: float = 1.0
    start: float = 0.0
    warmup: float = 0.0
    decay: Decay = "constant"
    stop: float = 1.0
    share: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value >= 0):
            raise ValueError(f"value must be a number from 0 on, not {self.value}.")
        if not (0 <= self.start < self.stop <= 1 and 0 <= self.warmup <= self.stop - self.start):
            raise ValueError(
                "start, warmup and stop are shares of the run, with 0 <= start < stop <= 1 and a warmup that ends by "
                f"stop; these are {self.start}, {self.warmup} and {self.stop}."
            )
        if self.decay not in ("constant", "cosine"):
            raise ValueError(f"decay must be 'constant' or 'cosine', not {self.decay!r}.")
        if self.share is not None and not (math.isfinite(self.share) and self.share > 0):
            raise ValueError(f"share must be positive, or None for a weight that is not calibrated, not {self.share}.")
        if self.share is not None and self.value != 1:
            raise ValueError(
                f"a calibrated weight has no value of its own: give share={self.share} or value, not both."
            )

    @classmethod
    def of(cls, given: float | Weight | Mapping[str, Any]) -> Weight:
        """A weight from a number, its full value, or from settings by name.

        Raises:
            ValueError: it is none of these.
        """
        if isinstance(given, Weight):
            return given
        if isinstance(given, int | float):
            return cls(given)
        names = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or not given.keys() <= set(names):
            raise ValueError(f"it must be a number, or settings among {', '.join(names)}; it is {given!r}.")
        return cls(**given)

    def at(self, progress: float) -> float:
        """The weight when a share `progress` of the run is done; of a calibrated one, the factor on its full weight."""
        if not self.start <= progress < self.stop:
            return 0.0
        since, length = progress - self.start - self.warmup, self.stop - self.start - self.warmup
        if since < 0:
            return self.value * (1 + since / self.warmup)
        return self.value * (0.5 + 0.5 * math.cos(math.pi * since / length) if self.decay == "cosine" else 1.0)
