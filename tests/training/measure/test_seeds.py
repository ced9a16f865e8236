"""Intervals over seeds are those of scipy's t-tests."""

import pytest
from scipy import stats

from ggam_fast.training.measure.seeds import estimate, holm, paired

OURS, THEIRS = {0: 0.71, 1: 0.74, 2: 0.75, 9: 0.1}, {2: 0.72, 1: 0.70, 0: 0.70, 7: 0.9}


def test_the_interval_is_students():
    values = list(OURS.values())
    found = estimate(values)
    interval = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert found.mean - found.half_width == pytest.approx(interval.low)
    assert found.mean + found.half_width == pytest.approx(interval.high)
    assert estimate([0.5]) == (0.5, None)


def test_a_difference_is_of_common_seeds():
    found = paired(OURS, THEIRS)
    expected = stats.ttest_rel([OURS[s] for s in (0, 1, 2)], [THEIRS[s] for s in (0, 1, 2)])
    assert found.seeds == 3
    assert found.p == pytest.approx(expected.pvalue)
    assert found.mean - found.half_width == pytest.approx(expected.confidence_interval(0.95).low)
    assert paired(OURS, {9: 0.2}) is None
    assert paired({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6})[:3] == (0.0, 0.0, 1.0)


def test_holms_correction():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
