"""The bins and the error are those worked out by hand, and belong together."""

import pytest
import torch

from ggam_fast.training.measure.calibration import BINS, calibration_error, reliability


def test_bins_of_known_probabilities():
    logits = torch.log(torch.tensor([[0.61, 0.29, 0.1]] * 4 + [[0.05, 0.05, 0.9]]))
    bins = reliability(logits, torch.tensor([0, 0, 0, 1, 2]))
    assert len(bins) == BINS == 15
    assert [index for index, one in enumerate(bins) if one is not None] == [9, 13]
    assert bins[9] == pytest.approx((4, 0.61, 0.75))
    assert bins[13] == pytest.approx((1, 0.9, 1.0))
    assert calibration_error(logits[:4], torch.tensor([0, 0, 0, 1])) == pytest.approx(0.14)


def test_the_error_is_the_mean_gap_of_the_bins():
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(500, 6), torch.randint(6, (500,))
    logits[0, 0] = 1e4  # a probability of 1 belongs to the last bin
    bins = [one for one in reliability(logits, labels) if one is not None]
    assert sum(one.images for one in bins) == 500
    gap = sum(one.images * abs(one.accuracy - one.confidence) for one in bins) / 500
    assert calibration_error(logits, labels) == pytest.approx(gap, abs=1e-3)
