# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
from scipy import stats

from kdlvfm.reporting.statistics import gap_closed, paired_difference, summarise_values


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
