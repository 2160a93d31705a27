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
METHODS_THAT_LEND = 3
_LENT = 4.0
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
    interval is always that of the one comparison. `std` is that of the differences of the seeds. `less_is_better` says
    what a verdict calls better.
    """

    count: int
    mean: float
    interval: tuple[float, float] | None
    p_value: float | None = None
    over: Literal["seeds", "images"] = "seeds"
    less_is_better: bool = False
    std: float | None = None

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
    from scipy.special import stdtrit

    paired = summarise_values([method[seed] - baseline[seed] for seed in sorted(method.keys() & baseline.keys())])
    if paired is None:
        return None
    if paired.std is None:
        return Difference(paired.count, paired.mean, None)
    error = paired.std / math.sqrt(paired.count)
    half = float(stdtrit(paired.count - 1, (1 + confidence) / 2)) * error
    p_value = _two_sided(paired.mean, error, paired.count - 1)
    return Difference(paired.count, paired.mean, (paired.mean - half, paired.mean + half), p_value, std=paired.std)


def _two_sided(mean: float, error: float, freedom: float) -> float:
    """The p-value of a t-test."""
    from scipy.special import stdtr

    statistic = abs(mean) / error if error else math.inf if mean else 0.0
    return 2 * float(stdtr(freedom, -statistic))


def correct_for_many(differences: Mapping[str, Difference]) -> dict[str, Difference]:
    """The same differences with p-values corrected for their number, by Holm's step-down procedure.

    The chance that any method without effect gets a verdict stays below 5 %. Those with too few seeds for a verdict
    are no part of the family and come back as they were.

    A few seeds estimate a variance so badly that hardly anything outlasts a correction for many methods. From three
    methods on, what is corrected is therefore the p-value of a t-test whose variance leans on theirs: the mean variance
    of the family counts as if it had been estimated with four degrees of freedom. This is Smyth's moderated test with a
    prior that is set, not estimated. As variances may truly differ, the method's own paired t-test must reject as well:
    the p-value is the larger of the two. A test simulates families with variances that differ up to 16-fold.

    Source:
        Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 1979; Smyth,
        Linear models and empirical Bayes methods for assessing differential expression in microarray experiments,
        Statistical Applications in Genetics and Molecular Biology 2004.
    """
    own = {
        name: difference.p_value
        for name, difference in differences.items()
        if difference.p_value is not None and difference.count >= SEEDS_FOR_A_VERDICT
    }
    lent = _with_lent_variance({name: differences[name] for name in own}) if len(own) >= METHODS_THAT_LEND else own
    corrected = dict(differences)
    highest = 0.0
    for rank, (p_value, name) in enumerate(sorted((p_value, name) for name, p_value in lent.items())):
        highest = max(highest, min(1.0, (len(lent) - rank) * p_value))
        corrected[name] = replace(differences[name], p_value=max(highest, own[name]))
    return corrected


def about_verdicts(tested: int) -> str:
    """One sentence on how the verdicts of `tested` methods were found."""
    lent = ", with variances that lean on one another" if tested >= METHODS_THAT_LEND else ""
    return f"Verdicts: paired t-tests at 5 %, corrected for {tested} methods (Holm){lent}; intervals are not corrected."


def _with_lent_variance(family: Mapping[str, Difference]) -> dict[str, float]:
    """The p-value of each method with a variance that leans on those of all."""
    squares = {name: (difference.count - 1) * (difference.std or 0.0) ** 2 for name, difference in family.items()}
    common = sum(squares.values()) / sum(difference.count - 1 for difference in family.values())
    p_values = {}
    for name, difference in family.items():
        freedom = _LENT + difference.count - 1
        variance = (_LENT * common + squares[name]) / freedom
        p_values[name] = _two_sided(difference.mean, math.sqrt(variance / difference.count), freedom)
    return p_values


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
