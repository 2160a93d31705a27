# SPDX-License-Identifier: Apache-2.0
"""What seeds and images say: mean and spread, the paired difference to the baseline, and what may be concluded."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["better", "worse", "not shown"]

SEEDS_FOR_A_VERDICT = 3
SIGNIFICANCE = 0.05
RESAMPLES = 2000
_RESAMPLES_AT_A_TIME = 200

Scores = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""From weights of images, (resamples, images), to the score of each resample, (resamples,)."""


@dataclass(frozen=True)
class Summary:
    """Mean of `count` values and their sample standard deviation (n - 1); `std` is `None` for a single value."""

    count: int
    mean: float
    std: float | None


@dataclass(frozen=True)
class Difference:
    """Mean paired difference over `count` seeds, its two-sided t-interval and the p-value of the paired t-test.

    A single seed has no p-value, and an interval only `over` images (see `bootstrap_interval`), which says nothing
    about seeds. Where several methods meet one baseline, `p_value` is the corrected one (see `correct_for_many`); the
    interval is always that of the one comparison. `less_is_better` says what a verdict calls better.
    """

    count: int
    mean: float
    interval: tuple[float, float] | None
    p_value: float | None = None
    over: Literal["seeds", "images"] = "seeds"
    less_is_better: bool = False

    @property
    def verdict(self) -> Verdict | None:
        """What the test shows at 5 %; `None` with fewer than three paired seeds, from which nothing is concluded."""
        if self.p_value is None or self.count < SEEDS_FOR_A_VERDICT:
            return None
        if self.p_value >= SIGNIFICANCE:
            return "not shown"
        return "better" if (self.mean > 0) != self.less_is_better else "worse"


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
    from scipy.special import stdtr, stdtrit

    paired = summarise_values([method[seed] - baseline[seed] for seed in sorted(method.keys() & baseline.keys())])
    if paired is None:
        return None
    if paired.std is None:
        return Difference(paired.count, paired.mean, None)
    error = paired.std / math.sqrt(paired.count)
    half = float(stdtrit(paired.count - 1, (1 + confidence) / 2)) * error
    statistic = abs(paired.mean) / error if error else math.inf if paired.mean else 0.0
    p_value = 2 * float(stdtr(paired.count - 1, -statistic))
    return Difference(paired.count, paired.mean, (paired.mean - half, paired.mean + half), p_value)


def correct_for_many(differences: Mapping[str, Difference]) -> dict[str, Difference]:
    """The same differences with p-values corrected for their number, by Holm's step-down procedure.

    The chance that any method without effect gets a verdict stays below 5 %. Those with too few seeds for a verdict
    are no part of the family and come back as they were.

    Source:
        Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 1979.
    """
    corrected = dict(differences)
    ranked = sorted(
        (difference.p_value, name)
        for name, difference in differences.items()
        if difference.p_value is not None and difference.count >= SEEDS_FOR_A_VERDICT
    )
    highest = 0.0
    for rank, (p_value, name) in enumerate(ranked):
        highest = max(highest, min(1.0, (len(ranked) - rank) * p_value))
        corrected[name] = replace(differences[name], p_value=highest)
    return corrected


def bootstrap_interval(
    method: Scores,
    baseline: Scores,
    images: int,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Interval of the difference of two scores over the images that both were measured on: method minus baseline.

    The images are drawn anew with replacement, the same for both, and both are scored on what was drawn; the interval
    lies between the quantiles of the differences. It says how far the difference depends on these images, and nothing
    about how it would vary from training to training.

    Args:
        method: scores of the method on weighted images; a weight is how often an image was drawn.
        baseline: the same of the baseline.
        images: how many images there are.
        confidence: share of the resamples whose difference lies within.
        resamples: how often the images are drawn.
        seed: of the draws.

    Returns:
        The interval; `None` with fewer than two images, or if a score is not defined on a resample.

    Source:
        Efron, Bootstrap methods: another look at the jackknife, Annals of Statistics 1979; the percentile interval.
    """
    if images < 2:
        return None
    rng = np.random.default_rng(seed)
    differences: list[NDArray[np.float64]] = []
    for start in range(0, resamples, _RESAMPLES_AT_A_TIME):
        drawn = (rng.integers(images, size=images) for _ in range(min(_RESAMPLES_AT_A_TIME, resamples - start)))
        weights: NDArray[Any] = np.stack([np.bincount(line, minlength=images) for line in drawn]).astype(np.float64)
        differences.append(method(weights) - baseline(weights))
    found = np.concatenate(differences)
    if not np.isfinite(found).all():
        return None
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


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


def gap_interval(
    method: Mapping[int, float], baseline: Mapping[int, float], teacher: float | None, confidence: float = 0.95
) -> tuple[float, float] | None:
    """Interval of `gap_closed` over the shared seeds, which takes into account that the gap itself is measured.

    All shares r for which a paired t-test does not reject that method - baseline is r times teacher - baseline; the
    teacher's level counts as exact. `None` where `gap_closed` is, with a single seed, and if even the gap is not
    distinguishable from zero, which leaves the share without bounds.

    Source:
        Fieller, Some problems in interval estimation, Journal of the Royal Statistical Society B 1954.
    """
    from scipy.special import stdtrit

    seeds = sorted(method.keys() & baseline.keys())
    if teacher is None or len(seeds) < 2 or gap_closed(method, baseline, teacher) is None:
        return None
    gains = [method[seed] - baseline[seed] for seed in seeds]
    gaps = [teacher - baseline[seed] for seed in seeds]
    gain, gap = statistics.fmean(gains), statistics.fmean(gaps)
    factor = float(stdtrit(len(seeds) - 1, (1 + confidence) / 2)) ** 2 / len(seeds)
    # The borders are the roots of a r^2 - 2 b r + c, where the test's statistic equals its quantile.
    a = gap**2 - factor * statistics.variance(gaps)
    b = gain * gap - factor * statistics.covariance(gains, gaps)
    c = gain**2 - factor * statistics.variance(gains)
    if a <= 0:
        return None
    half = math.sqrt(max(0.0, b**2 - a * c))
    return (b - half) / a, (b + half) / a
