"""Intervals are those of their formulas, and cover the truth as often as they say."""

import pytest
import torch

from ggam_fast.training.measure.classification import classification_metrics
from ggam_fast.training.measure.intervals import bootstrapped, wilson


def test_wilson_by_its_formula():
    z, n, p = 1.959964, 20, 0.9
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    assert wilson(18, 20) == pytest.approx((centre - half, centre + half), abs=1e-6)
    assert wilson(0, 5)[0] == 0.0
    assert wilson(5, 5)[1] == 1.0


def test_samples_vary_as_sets_of_other_images_do():
    """The interval of balanced accuracy has the width that 300 other sets of images give."""
    torch.manual_seed(0)

    def drawn():
        labels = torch.randint(3, (400,))
        return torch.where(torch.rand(400) < 0.7, labels, (labels + 1) % 3), labels

    sets = [drawn() for _ in range(300)]
    found = [classification_metrics(torch.eye(3)[guesses], labels) for guesses, labels in sets]
    names = ("balanced_accuracy", "macro_f1")
    intervals = bootstrapped(*drawn(), 3)
    assert set(intervals) == set(names)
    for name in names:
        values = torch.tensor([getattr(one, name) for one in found])
        low, high = values.quantile(torch.tensor([0.025, 0.975])).tolist()
        assert intervals[name][1] - intervals[name][0] == pytest.approx(high - low, rel=0.2)


def test_without_a_mistake_and_without_variation_there_is_no_width():
    labels = torch.tensor([0, 0, 2])  # no image of class 1
    assert bootstrapped(labels, labels, 3) == {"balanced_accuracy": (1.0, 1.0), "macro_f1": (1.0, 1.0)}
    assert bootstrapped(torch.tensor([1]), torch.tensor([0]), 2)["macro_f1"] == (0.0, 0.0)


def test_the_same_images_have_the_same_interval():
    guesses, labels = torch.arange(60) % 3, torch.arange(60) % 4
    assert bootstrapped(guesses, labels, 4) == bootstrapped(guesses, labels, 4)
