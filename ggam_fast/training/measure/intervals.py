"""95 % intervals of the metrics of one split: how far they would move with other images of the same kind.

They say nothing of other seeds of the training. `seeds` does.
"""

from __future__ import annotations

import numpy as np
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor

RESAMPLES = 1000
Interval = tuple[float, float]


def wilson(successes: int, trials: int) -> Interval:
    """Wilson's score interval of a share, `trials` > 0."""
    low, high = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return float(low), float(high)


def bootstrapped(guesses: Tensor, labels: Tensor, classes: int) -> dict[str, Interval]:
    """Intervals of balanced accuracy and macro F1, from predicted and true classes, both (N,) int64.

    They lie between the 2.5 % and 97.5 % percentiles of `RESAMPLES` samples of N images, drawn with
    replacement. The generator has a fixed seed. The calibration error has no such interval: that of a sample
    is larger on average than that of all images.
    """
    guess, truth = guesses.numpy(), labels.numpy()
    right = guess == truth

    def of(rows: np.ndarray) -> tuple[float, float]:
        support = np.bincount(truth[rows], minlength=classes)
        claimed = np.bincount(guess[rows], minlength=classes)
        hits = np.bincount(truth[rows], right[rows], classes)
        there, seen = support > 0, support + claimed > 0
        recall, f1 = hits[there] / support[there], 2 * hits[seen] / (support + claimed)[seen]
        return float(recall.mean()), float(f1.mean())

    generator, count = np.random.default_rng(0), len(truth)
    samples = [of(generator.integers(count, size=count)) for _ in range(RESAMPLES)]
    low, high = np.percentile(samples, (2.5, 97.5), axis=0).tolist()
    return {"balanced_accuracy": (low[0], high[0]), "macro_f1": (low[1], high[1])}
