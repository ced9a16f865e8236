"""Calibration: is a classifier right as often as its probabilities say?

Guo et al., On Calibration of Modern Neural Networks (arXiv 1706.04599). The images are sorted into bins of
equal width by the probability of their prediction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

BINS = 15


class Bin(NamedTuple):
    """The images of one bin: mean probability of the prediction, share of right ones, both in [0, 1]."""

    images: int
    confidence: float
    accuracy: float


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error of `logits` (N, K): the mean of |accuracy - confidence| of the bins."""
    error = multiclass_calibration_error(
        logits.softmax(1), labels, num_classes=logits.shape[1], n_bins=BINS, norm="l1"
    )
    return error.item()


def reliability(logits: Tensor, labels: Tensor) -> list[Bin | None]:
    """The `BINS` bins of `logits` (N, K), in the order of probability. An empty one is None."""
    confidence, guess = logits.softmax(1).max(1)
    right = (guess == labels).float()
    # The same borders as torchmetrics: a bin holds its lower end.
    place = torch.bucketize(confidence, torch.linspace(0, 1, BINS + 1), right=True) - 1
    place.clamp_(max=BINS - 1)  # a probability of 1
    bins: list[Bin | None] = []
    for index in range(BINS):
        inside = place == index
        count = int(inside.sum())
        mean = (confidence[inside].mean().item(), right[inside].mean().item()) if count else None
        bins.append(None if mean is None else Bin(count, *mean))
    return bins
