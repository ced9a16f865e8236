"""What the numbers of the finished epochs say: which one is the best, and whether to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

By = Literal["accuracy", "loss"]


def score(epoch: Mapping[str, float], by: By) -> float:
    """The larger, the better: validation accuracy or minus validation loss.

    Without a validation split it is minus the training loss.
    """
    if by == "accuracy" and "val_accuracy" in epoch:
        return epoch["val_accuracy"]
    return -epoch.get("val_loss", epoch["loss"])


def best_epoch(history: Sequence[Mapping[str, float]], by: By) -> int:
    """Index of the best epoch, the first of equal ones. A score that is not a number is the worst.

    `history` has one epoch or more.
    """
    scores = [score(epoch, by) for epoch in history]
    return max(range(len(scores)), key=lambda i: -math.inf if math.isnan(scores[i]) else scores[i])


def exhausted(history: Sequence[Mapping[str, float]], by: By, patience: int) -> bool:
    """Whether the last `patience` epochs were no better than the best one. 0 has endless patience."""
    return patience > 0 and len(history) > 0 and len(history) - 1 - best_epoch(history, by) >= patience


def best_text(history: Sequence[Mapping[str, float]], by: By) -> str:
    """A line about the best epoch."""
    epoch = history[best_epoch(history, by)]
    name = "training loss"
    if "val_accuracy" in epoch:
        name = f"validation {by}"
    return f"best of {len(history)} epochs by {name}: epoch {epoch['epoch']}, {abs(score(epoch, by)):.4g}"
