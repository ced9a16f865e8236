"""The charts of an evaluation, each one a figure of its own that stays readable on a phone."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ggam_fast.training.measure.intervals import wilson
from ggam_fast.training.show.curves import accuracy_panel, loss_panel
from ggam_fast.training.show.figures import BLUE, GREEN, VERMILION, new_figure

_SIZE = (4.8, 3.4)  # inches
_LINES = ((BLUE, "-"), (VERMILION, "--"), (GREEN, ":"))


def learning_curves(
    history: Sequence[Mapping[str, float]], best: int, weights: Mapping[str, float]
) -> tuple[Figure, Figure]:
    """The losses and the accuracies of every epoch. A grey line marks the epoch with index `best`.

    `weights`: those of the guidance and of the position loss.
    """
    losses, accuracies = _chart(), _chart()
    loss_panel(losses, history, best, weights)
    accuracy_panel(accuracies, history, best)
    return losses.figure, accuracies.figure  # type: ignore[return-value]


def reliability_diagram(bins: Sequence[Mapping[str, float] | None]) -> Figure:
    """Accuracy against probability, with Wilson's 95 % interval of each bin, over the number of images.

    `bins`: those of `measure.calibration.reliability`, as dictionaries.
    """
    figure = _figure()
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    above.plot([0, 100], [0, 100], color="0.6", linewidth=1, label="calibrated")
    found = [one for one in bins if one is not None]
    counts = [int(one["images"]) for one in found]
    confidence = [100 * one["confidence"] for one in found]
    accuracy = [100 * one["accuracy"] for one in found]
    ends = [wilson(round(one["accuracy"] * one["images"]), int(one["images"])) for one in found]
    # Roundings can leave a bar of -1e-15.
    errors = [
        [max(0.0, value - 100 * low) for value, (low, _) in zip(accuracy, ends, strict=True)],
        [max(0.0, 100 * high - value) for value, (_, high) in zip(accuracy, ends, strict=True)],
    ]
    above.errorbar(confidence, accuracy, errors, color=BLUE, marker="o", markersize=4, linewidth=1.4,
                   elinewidth=0.8, capsize=2, label="images of a bin")  # fmt: skip
    above.set_ylim(0, 102)
    above.set_ylabel("right, %")
    above.legend(fontsize=9, frameon=False)
    width = 100 / len(bins)
    middles = [(index + 0.5) * width for index, one in enumerate(bins) if one is not None]
    below.bar(middles, counts, width * 0.9, color=BLUE)
    below.set_ylabel("images")
    below.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    below.set_xlim(0, 101)
    below.set_xlabel("probability of the prediction, %")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def faithfulness_curves(found: Mapping[str, Any], kind: str) -> Figure:
    """The curves of `kind`, "insertion" or "deletion", with the area under each.

    `found`: for each map, the curves that `use.evaluate` writes.
    """
    axes = _chart()
    for (name, both), (colour, line) in zip(found.items(), _LINES, strict=False):
        curve = both[kind]["curve"]
        share = np.linspace(0, 100, len(curve))
        label = f"{name} (area {both[kind]['area']:.3f})"
        axes.plot(share, curve, line, color=colour, linewidth=1.8, label=label)
    axes.set_xlabel(f"pixels {'shown' if kind == 'insertion' else 'blanked'}, %")
    axes.set_ylabel("probability of the prediction")
    axes.set_ylim(0, 1)
    axes.grid(color="0.9")
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return axes.figure  # type: ignore[return-value]


def svg(figure: Figure) -> str:
    """The figure as the address of an inline SVG image. It has no background."""
    buffer = io.BytesIO()
    for axes in figure.axes:
        axes.set_facecolor("none")
    figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _figure() -> Figure:
    return new_figure(*_SIZE)


def _chart() -> Axes:
    return _figure().subplots()
