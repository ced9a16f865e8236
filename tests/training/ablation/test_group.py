"""Differences between groups of cells pair cells with the same seed."""

import pytest

from ggam_fast.training.ablation.group import Group, grouped, paired_difference
from ggam_fast.training.ablation.report import percent
from ggam_fast.training.ablation.study import (
    Cell,
)


def result(attention, norm, weight, seed, val, test=0.5):
    return {
        "cell": vars(Cell(attention, norm, weight, seed)),
        "val": {"accuracy": val},
        "test": {"accuracy": test},
    }


def test_differences_are_paired_by_seed():
    plain = [result("channel", "sigmoid", 0.0, seed, 0, test) for seed, test in enumerate((0.5, 0.7, 0.9))]
    guided = [
        result("channel", "sigmoid", 1.0, seed, 0, test) for seed, test in ((2, 0.93), (0, 0.51), (1, 0.72))
    ]
    ours, theirs = Group("channel", "sigmoid", 1.0, guided), Group("channel", "sigmoid", 0.0, plain)
    mean, width = paired_difference(ours, theirs, "test", "accuracy")
    assert mean == pytest.approx(0.02)
    # The differences are 0.03, 0.01 and 0.02. Their deviation is 0.01, and t = 4.3027 for two degrees of
    # freedom.
    assert width == pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-4)
    assert paired_difference(Group(*ours[:3], guided[:1]), theirs, "test", "accuracy") is None
    assert [group.weight for group in grouped([*plain, *guided])] == [0.0, 1.0]
    assert percent([0.5, 0.6]) == "55.0 ± 7.1"
