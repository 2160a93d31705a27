# SPDX-License-Identifier: Apache-2.0
"""What several seeds say: mean and spread, the paired difference to the baseline, and what may be concluded."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["better", "worse", "not shown"]

SEEDS_FOR_A_VERDICT = 3


@dataclass(frozen=True)
class Summary:
    """Mean of `count` values and their sample standard deviation (n - 1); `std` is `None` for a single value."""

    count: int
    mean: float
    std: float | None


@dataclass(frozen=True)
class Difference:
    """Mean paired difference over `count` seeds and its two-sided t-interval; no interval for a single seed."""

    count: int
    mean: float
    interval: tuple[float, float] | None

    @property
    def verdict(self) -> Verdict | None:
        """What the interval shows; `None` with fewer than three paired seeds, from which nothing is concluded."""
        if self.interval is None or self.count < SEEDS_FOR_A_VERDICT:
            return None
        low, high = self.interval
        return "better" if low > 0 else "worse" if high < 0 else "not shown"


def summarise_values(values: Sequence[float]) -> Summary | None:
    """Mean and standard deviation of `values`; `None` if there are none."""
    if not values:
        return None
    return Summary(len(values), statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def paired_difference(
    method: Mapping[int, float], baseline: Mapping[int, float], confidence: float = 0.95
) -> Difference | None:
    """Method minus baseline over the seeds that both have, seed -> value; `None` if they share no seed.

    The interval is that of the paired t-test: mean +- t(n - 1) * std / sqrt(n). Pairing by seed removes the spread that
    both share (initialisation, order and augmentation of the images).
    """
    from scipy.special import stdtrit

    paired = summarise_values([method[seed] - baseline[seed] for seed in sorted(method.keys() & baseline.keys())])
    if paired is None:
        return None
    interval = None
    if paired.std is not None:
        quantile = float(stdtrit(paired.count - 1, (1 + confidence) / 2))
        half = quantile * paired.std / math.sqrt(paired.count)
        interval = (paired.mean - half, paired.mean + half)
    return Difference(paired.count, paired.mean, interval)


def gap_closed(method: Mapping[int, float], baseline: Mapping[int, float], teacher: float | None) -> float | None:
    """Share of the gap between baseline and teacher that the method closes, over the seeds that both have.

    1 is the teacher's level, 0 the baseline's, negative is below it. `None` if the teacher is unknown or no better than
    the baseline, or if there is no shared seed.
    """
    seeds = sorted(method.keys() & baseline.keys())
    if teacher is None or not seeds:
        return None
    start = statistics.fmean(baseline[seed] for seed in seeds)
    reached = statistics.fmean(method[seed] for seed in seeds)
    return (reached - start) / (teacher - start) if teacher > start else None
