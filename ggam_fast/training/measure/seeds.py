"""Means over seeds, and differences of runs with the same seeds, with 95 % intervals of Student's t."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy import stats  # type: ignore[import-untyped]


class Estimate(NamedTuple):
    """A mean, and half the width of its 95 % interval; None if there is one value alone."""

    mean: float
    half_width: float | None


class Difference(NamedTuple):
    """The mean difference over common seeds, half its interval's width, and p of a paired t-test."""

    mean: float
    half_width: float
    p: float
    seeds: int


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of values in any unit, and half the width of its interval."""
    return Estimate(statistics.mean(values), _half_width(values) if len(values) > 1 else None)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """The difference ours - theirs of values by seed; None with fewer than two common seeds."""
    found = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if len(found) < 2:
        return None
    mean, width = statistics.mean(found), _half_width(found)
    if width == 0.0:
        return Difference(mean, width, 1.0 if mean == 0.0 else 0.0, len(found))
    return Difference(mean, width, float(stats.ttest_1samp(found, 0.0).pvalue), len(found))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: p for each comparison so that any false finding among them has that probability.

    Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6 (1979).
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _half_width(values: Sequence[float]) -> float:
    n = len(values)
    return float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5
