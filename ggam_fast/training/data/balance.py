"""Weights that give rare classes as much say as frequent ones."""

from __future__ import annotations

import torch
from torch import Tensor


def class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """n / (K n_k) for each class k, float32 (K,): the mean over all labels is 1. Absent classes have 0."""
    counts = labels.bincount(minlength=num_classes).float()
    present = counts > 0
    return torch.where(present, len(labels) / (present.sum() * counts.clamp_min(1)), 0.0)


def row_weights(labels: Tensor) -> Tensor:
    """1 / n_k of each row's class k, float64 (N,), with which all classes are drawn equally often."""
    return 1 / labels.bincount().double()[labels]
