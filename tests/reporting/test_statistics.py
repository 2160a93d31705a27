# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from kdlvfm.reporting.statistics import (
    RESAMPLES,
    Difference,
    bootstrap_interval,
    correct_for_many,
    gap_closed,
    gap_interval,
    paired_difference,
    summarise_values,
)


@pytest.mark.parametrize("count", [2, 3, 5, 20])
@pytest.mark.parametrize("confidence", [0.95, 0.99])
def test_interval_is_that_of_the_paired_t_test(count, confidence):
    rng = np.random.default_rng(count)
    baseline = rng.normal(0.5, 0.05, count)
    method = baseline + rng.normal(0.02, 0.02, count)
    difference = paired_difference(dict(enumerate(method)), dict(enumerate(baseline)), confidence)
    expected = stats.ttest_rel(method, baseline).confidence_interval(confidence)
    assert difference.count == count
    assert difference.mean == pytest.approx(np.mean(method - baseline))
    assert difference.interval == pytest.approx((expected.low, expected.high))
    assert difference.p_value == pytest.approx(stats.ttest_rel(method, baseline).pvalue)


def test_seeds_are_paired_by_name_not_by_position():
    difference = paired_difference({2: 0.7, 0: 0.5, 9: 0.0}, {0: 0.4, 1: 0.9, 2: 0.5})
    assert difference.count == 2
    assert difference.mean == pytest.approx(0.15)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([0.05, 0.06, 0.05], "better"),
        ([-0.05, -0.06, -0.05], "worse"),
        ([0.05, -0.05, 0.01], "not shown"),
        ([0.0, 0.0, 0.0], "not shown"),
        ([0.25, 0.25, 0.25], "better"),
        ([0.05, 0.0501], None),
        ([0.5], None),
    ],
)
def test_verdict_needs_three_seeds_and_an_interval_beyond_zero(gains, verdict):
    difference = paired_difference(dict(enumerate(gains)), dict.fromkeys(range(len(gains)), 0.0))
    assert difference.verdict == verdict
    assert (difference.interval is None) == (len(gains) == 1)


def ratio(hits, sizes):
    """A score of weighted images that is no mean of theirs, like mIoU."""
    return lambda weights: (weights @ hits) / (weights @ sizes)


@pytest.fixture(params=[5, 40])
def two_scores(request):
    """Hits of a method and of a baseline on some images, and the images' sizes."""
    rng = np.random.default_rng(request.param)
    sizes = rng.integers(50, 200, request.param).astype(float)
    baseline = sizes * rng.uniform(0.3, 0.6, request.param)
    return baseline + sizes * rng.normal(0.03, 0.05, request.param), baseline, sizes


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_interval_over_images_is_that_of_a_slow_bootstrap(two_scores, confidence):
    method, baseline, sizes = two_scores
    rng, differences = np.random.default_rng(3), []
    for _ in range(500):
        drawn = rng.integers(len(sizes), size=len(sizes))
        total = sum(sizes[i] for i in drawn)
        differences.append(sum(method[i] for i in drawn) / total - sum(baseline[i] for i in drawn) / total)
    interval = bootstrap_interval(
        ratio(method, sizes), ratio(baseline, sizes), len(sizes), confidence=confidence, resamples=500, seed=3
    )
    assert interval == pytest.approx(np.quantile(differences, [(1 - confidence) / 2, (1 + confidence) / 2]))


def test_interval_over_images_is_that_of_scipy_but_for_chance(two_scores):
    method, baseline, sizes = two_scores

    def statistic(drawn, axis=-1):
        total = sizes[drawn].sum(axis)
        return method[drawn].sum(axis) / total - baseline[drawn].sum(axis) / total

    images = np.arange(len(sizes))
    found = stats.bootstrap((images,), statistic, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1))
    low, high = bootstrap_interval(ratio(method, sizes), ratio(baseline, sizes), len(sizes), resamples=20_000)
    width = found.confidence_interval.high - found.confidence_interval.low
    assert low == pytest.approx(found.confidence_interval.low, abs=0.03 * width)
    assert high == pytest.approx(found.confidence_interval.high, abs=0.03 * width)


def test_interval_over_images_does_not_change_from_call_to_call(two_scores):
    method, baseline, sizes = two_scores
    scores = ratio(method, sizes), ratio(baseline, sizes), len(sizes)
    assert (
        bootstrap_interval(*scores) == bootstrap_interval(*scores) == bootstrap_interval(*scores, resamples=RESAMPLES)
    )
    assert bootstrap_interval(*scores) != bootstrap_interval(*scores, seed=1)


def test_interval_over_images_needs_two_images_and_scores_that_are_defined():
    ones = np.ones(3)
    assert bootstrap_interval(ratio(ones[:1], ones[:1]), ratio(ones[:1], ones[:1]), 1) is None
    sizes = np.array([1.0, 0.0, 0.0])  # where the first image is not drawn there is nothing to score
    with np.errstate(invalid="ignore"):
        assert bootstrap_interval(ratio(sizes, sizes), ratio(sizes, sizes), 3) is None


def test_an_interval_over_images_gives_no_verdict():
    assert Difference(1, 0.1, (0.05, 0.15), over="images").verdict is None


def test_summary():
    summary = summarise_values([1.0, 2.0, 4.0])
    assert (summary.count, summary.mean) == (3, pytest.approx(7 / 3))
    assert summary.std == pytest.approx(np.std([1, 2, 4], ddof=1))
    assert summarise_values([1.0]).std is None
    assert summarise_values([]) is None


def test_gap_closed():
    baseline = {0: 0.4, 1: 0.5, 2: 0.0}
    assert gap_closed({0: 0.5, 1: 0.6}, baseline, 0.85) == pytest.approx(0.1 / 0.4)
    assert gap_closed({0: 0.85}, baseline, 0.85) == pytest.approx(1.0)
    assert gap_closed({0: 0.2}, baseline, 0.8) == pytest.approx(-0.5)
    assert gap_closed({0: 0.5}, baseline, None) is None
    assert gap_closed({0: 0.5}, baseline, 0.4) is None
    assert gap_closed({7: 0.5}, baseline, 0.9) is None
    assert math.isfinite(gap_closed({0: 0.5}, baseline, 0.4000001))


@pytest.mark.parametrize("count", [1, 2])
def test_correction_of_one_or_two_is_that_of_the_closed_test(count):
    p_values = np.random.default_rng(count).uniform(0, 0.2, count)
    family = {f"m{i}": Difference(3, 0.1, (0.0, 0.2), p) for i, p in enumerate(p_values)}
    corrected = correct_for_many(family)
    for i, expected in enumerate(closed_test(p_values)):
        assert corrected[f"m{i}"].p_value == pytest.approx(expected)
        assert corrected[f"m{i}"].interval == (0.0, 0.2)


def closed_test(p_values):
    """Holm's p-value is the largest Bonferroni p-value of any group of hypotheses that the method is in."""
    count = len(p_values)
    for i in range(count):
        groups = (g for size in range(1, count + 1) for g in itertools.combinations(range(count), size) if i in g)
        yield max(min(1.0, len(group) * min(p_values[j] for j in group)) for group in groups)


@pytest.mark.parametrize("seeds", [[3, 3, 3], [3, 5, 4, 3, 3]])
def test_correction_of_more_leans_on_the_common_variance_and_needs_the_own_test_too(seeds):
    rng = np.random.default_rng(len(seeds))
    gains = [rng.normal(0.03, rng.uniform(0.005, 0.03), count) for count in seeds]
    family = {f"m{i}": paired_difference(dict(enumerate(x)), dict.fromkeys(range(9), 0.0)) for i, x in enumerate(gains)}
    common = sum(((x - x.mean()) ** 2).sum() for x in gains) / sum(len(x) - 1 for x in gains)
    moderated = []
    for x in gains:
        variance = (4 * common + ((x - x.mean()) ** 2).sum()) / (4 + len(x) - 1)
        moderated.append(2 * stats.t.sf(abs(x.mean()) / np.sqrt(variance / len(x)), 4 + len(x) - 1))
    corrected = correct_for_many(family)
    for i, holm in enumerate(closed_test(moderated)):
        own = stats.ttest_1samp(gains[i], 0.0).pvalue
        assert corrected[f"m{i}"].p_value == pytest.approx(max(holm, own))
        assert corrected[f"m{i}"].interval == family[f"m{i}"].interval


@pytest.mark.parametrize("spread", [[1.0], [1.0, 1.0, 1.0, 3.0], [1.0, 0.25], [4.0, 1.0, 1.0, 1.0, 1.0]])
@pytest.mark.parametrize("count", [3, 5, 13])
def test_families_without_an_effect_rarely_get_a_verdict(count, spread):
    """All methods share the baseline of a seed; their own spread differs as `spread` says, in turns."""
    rng, families = np.random.default_rng(0), 1000
    scale = np.resize(spread, count)[:, None]
    wrong = 0
    for _ in range(families):
        baseline = dict(enumerate(rng.normal(size=3)))
        family = {
            str(i): paired_difference(dict(enumerate(row)), baseline)
            for i, row in enumerate(scale * rng.normal(size=(count, 3)))
        }
        wrong += any(difference.verdict != "not shown" for difference in correct_for_many(family).values())
    # 5 % and three standard errors of the simulation.
    assert wrong / families < 0.05 + 3 * math.sqrt(0.05 * 0.95 / families)


def test_a_clear_gain_outlasts_the_correction_for_many():
    """Twelve of three seeds each, all of them like this one, which Holm alone would leave without a verdict."""
    rng = np.random.default_rng(0)
    gains = {f"m{i}": 0.1 + 0.01 * rng.normal(size=3) for i in range(12)}
    family = {name: paired_difference(dict(enumerate(x)), dict.fromkeys(range(3), 0.0)) for name, x in gains.items()}
    assert all(difference.verdict == "better" for difference in correct_for_many(family).values())
    assert 12 * min(stats.ttest_1samp(x, 0.0).pvalue for x in gains.values()) < 0.05
    assert 12 * max(stats.ttest_1samp(x, 0.0).pvalue for x in gains.values()) > 0.05


def test_methods_with_too_few_seeds_for_a_verdict_are_no_part_of_the_family():
    family = {
        "few": Difference(2, 0.1, (0.0, 0.2), 0.01),
        "one": Difference(1, 0.1, None),
        "kd": Difference(3, 1, (0, 2), 0.04),
    }
    assert correct_for_many(family) == family


def test_methods_that_do_not_vary():
    constant = {name: paired_difference({0: v, 1: v, 2: v}, dict.fromkeys(range(3), 0.0)) for name, v in GAINS.items()}
    assert [d.verdict for d in correct_for_many(constant).values()] == ["better", "worse", "not shown"]


GAINS = {"up": 0.25, "down": -0.25, "none": 0.0}


@pytest.mark.parametrize("count", [2, 3, 8])
def test_interval_of_the_gap_holds_the_shares_that_a_t_test_does_not_reject(count):
    rng = np.random.default_rng(count)
    baseline = rng.normal(0.4, 0.004, count)
    method = baseline + rng.normal(0.1, 0.01, count)
    borders = gap_interval(dict(enumerate(method)), dict(enumerate(baseline)), 0.8)
    for border in borders:
        assert stats.ttest_1samp(method - baseline - border * (0.8 - baseline), 0).pvalue == pytest.approx(0.05)
    assert borders[0] < gap_closed(dict(enumerate(method)), dict(enumerate(baseline)), 0.8) < borders[1]


def test_interval_of_the_gap_needs_a_gap_and_two_seeds():
    baseline = {0: 0.4, 1: 0.5}
    assert gap_interval({0: 0.5}, baseline, 0.8) is None
    assert gap_interval({0: 0.5, 1: 0.6}, baseline, None) is None
    assert gap_interval({0: 0.5, 1: 0.6}, baseline, 0.3) is None
    assert gap_interval({0: 0.5, 1: 0.6}, baseline, 0.51) is None  # the gap lies within the spread of the baseline
