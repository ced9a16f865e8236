"""Test-time augmentation: the mean over an image and its mirror image."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def with_mirrored(logits: Tensor, mirrored: Tensor) -> Tensor:
    """Logits whose probabilities are the means of those of `logits` and `mirrored`, all (N, K)."""
    return torch.logaddexp(logits.log_softmax(1), mirrored.log_softmax(1)) - math.log(2)
