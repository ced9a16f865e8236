"""Metrics of a classifier. Some of them also suit splits with rare classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
)


@dataclass(frozen=True)
class Metrics:
    """Metrics of a split. All but `support`, `images` and `confusion` are shares in [0, 1].

    `majority`: the accuracy of always predicting the split's most common class. `balanced_accuracy`: the mean
    recall of the classes that occur in the split. `precision`, `recall`, `f1`: one for each class, 0 where it
    is not defined. `confusion`: rows are true classes.
    """

    images: int
    majority: float
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    precision: list[float]
    recall: list[float]
    f1: list[float]
    support: list[int]
    confusion: list[list[int]]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def confused_with(confusion: Sequence[Sequence[int]], index: int, classes: Sequence[str]) -> str:
    """The class with which class `index` is most often confused, and the number of these images, or a dash.

    `confusion`: rows are true classes, as in `Metrics`.
    """
    mistakes = [0 if other == index else count for other, count in enumerate(confusion[index])]
    worst = max(range(len(mistakes)), key=mistakes.__getitem__)
    return f"{classes[worst]} ({mistakes[worst]})" if mistakes[worst] else "-"


def classification_metrics(logits: Tensor, labels: Tensor) -> Metrics:
    """Metrics of `logits` (N, K) against `labels` (N,) int64, N > 0."""
    classes = logits.shape[1]
    support = torch.bincount(labels, minlength=classes)

    def average(metric, kind: str | None) -> Tensor:
        return metric(logits, labels, num_classes=classes, average=kind)

    recall = average(multiclass_accuracy, "none")
    return Metrics(
        images=len(labels),
        majority=support.max().item() / len(labels),
        accuracy=average(multiclass_accuracy, "micro").item(),
        # For a class that is predicted but never true, torchmetrics' macro average counts a recall of 0.
        balanced_accuracy=recall[support > 0].mean().item(),
        macro_f1=average(multiclass_f1_score, "macro").item(),
        precision=average(multiclass_precision, "none").tolist(),
        recall=recall.tolist(),
        f1=average(multiclass_f1_score, "none").tolist(),
        support=support.tolist(),
        confusion=multiclass_confusion_matrix(logits, labels, num_classes=classes).tolist(),
    )
