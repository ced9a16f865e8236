"""Comparisons of groups pair cells with the same seed, and are corrected for their number."""

import pytest

from ggam_fast.training.ablation.group import Group, comparisons, grouped
from ggam_fast.training.ablation.report import percent
from ggam_fast.training.ablation.study import Cell

ACCURACY = ("accuracy", ("test", "accuracy"))


def result(attention, guidance, weight, seed, test=0.5):
    return {"cell": vars(Cell(attention, guidance, weight, seed)), "test": {"accuracy": test}}


def test_differences_are_paired_by_seed():
    plain = [result("channel", "none", 0.0, seed, test) for seed, test in enumerate((0.5, 0.7, 0.9))]
    guided = [result("channel", "paper", 1.0, seed, test) for seed, test in ((2, 0.93), (0, 0.51), (1, 0.72))]
    rows = grouped([*plain, *guided], (0, 1, 2))
    assert [group.weight for group in rows] == [0.0, 1.0]
    (found,) = comparisons(rows, ACCURACY)
    assert (found.ours, found.theirs) == (rows[1], rows[0])
    assert found.difference.mean == pytest.approx(0.02)
    # The differences are 0.03, 0.01 and 0.02. Their deviation is 0.01, and t = 4.3027 for two degrees of
    # freedom.
    assert found.difference.half_width == pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-4)
    assert comparisons([rows[0], Group(*rows[1][:3], guided[:1])], ACCURACY) == []
    assert percent([0.5, 0.6]) == "55.0 ± 7.1"


def test_cells_of_the_choice_are_no_rows():
    cells = [result("channel", "paper", weight, seed) for weight in (0.1, 1.0) for seed in (0, 1, 2)]
    assert [len(group.cells) for group in grouped(cells, (2,))] == [1, 1]
    assert grouped(cells, (5,)) == []


def test_comparisons_of_a_table_are_corrected_together():
    values = {"none": (0.5, 0.6, 0.7), "channel": (0.51, 0.62, 0.73), "spatial": (0.5, 0.65, 0.6)}
    rows = [
        Group(name, "none", 0.0, [result(name, "none", 0.0, seed, x) for seed, x in enumerate(xs)])
        for name, xs in values.items()
    ]
    found = comparisons(rows, ACCURACY)
    assert [(one.ours.attention, one.theirs.attention) for one in found] == [
        ("channel", "none"),
        ("spatial", "none"),
    ]
    assert found[0].p == pytest.approx(2 * found[0].difference.p)
    assert found[1].p == pytest.approx(found[1].difference.p)
