"""Rare classes weigh as much as frequent ones."""

import pytest
import torch

from ggam_fast.training.data.balance import class_weights, row_weights

LABELS = torch.tensor([0] * 6 + [1] * 3 + [3])


def test_every_present_class_has_the_same_share_of_the_loss():
    weights = class_weights(LABELS, 4)
    shares = weights * LABELS.bincount()
    assert shares.allclose(torch.tensor([10 / 3, 10 / 3, 0, 10 / 3]))
    assert weights[LABELS].mean().item() == pytest.approx(1)


def test_every_present_class_is_drawn_equally_often():
    weights = row_weights(LABELS)
    shares = torch.zeros(4, dtype=torch.float64).index_add(0, LABELS, weights)
    assert shares.allclose(torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64))
