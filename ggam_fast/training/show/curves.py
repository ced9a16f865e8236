"""The learning curves of a run: losses and accuracies after each epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ggam_fast.training.show.figures import BLUE, GREEN, ORANGE, VERMILION, new_figure
from ggam_fast.training.system.files import write_atomically

# For each panel: names in the history, labels, colours and line styles.
_LOSSES = (
    ("cross_entropy", "training, cross entropy", BLUE, "-"),
    ("guidance", "training, lambda x guidance", ORANGE, ":"),
    ("positions", "training, weighted position loss", GREEN, ":"),
    ("val_loss", "validation, cross entropy", VERMILION, "-"),
    ("val_loss_last", "validation, last weights", GREEN, "--"),
)
_ACCURACIES = (
    ("accuracy", "training", BLUE, "-"),
    ("val_accuracy", "validation", VERMILION, "-"),
    ("val_accuracy_last", "validation, last weights", GREEN, "--"),
)


def draw_curves(
    path: Path,
    history: Sequence[Mapping[str, float]],
    best: int,
    guidance_weight: float,
    position_weight: float = 0.0,
) -> Path:
    """Draw the numbers of every epoch into a PNG file. A grey line marks the epoch with index `best`.

    Raises:
        TrainError: the file cannot be written.
    """
    figure = new_figure(10, 3.8)
    losses, accuracies = figure.subplots(1, 2)
    weights = {"guidance": guidance_weight, "positions": position_weight}
    loss_panel(losses, history, best, weights)
    accuracy_panel(accuracies, history, best)
    write_atomically(path, lambda part: figure.savefig(part))
    return path


def loss_panel(
    axes: Axes, history: Sequence[Mapping[str, float]], best: int, weights: Mapping[str, float]
) -> None:
    """Draw the losses of every epoch, those in `weights` times their weight."""
    _panel(axes, history, _LOSSES, best, weights)
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)


def accuracy_panel(axes: Axes, history: Sequence[Mapping[str, float]], best: int) -> None:
    """Draw the accuracies of every epoch."""
    _panel(axes, history, _ACCURACIES, best, {})
    axes.set_ylabel("accuracy")
    axes.set_ylim(0, 1.02)


def _panel(
    axes: Axes,
    history: Sequence[Mapping[str, float]],
    curves: Sequence[tuple[str, str, str, str]],
    best: int,
    weights: Mapping[str, float],
) -> None:
    for name, label, colour, style in curves:
        # Epochs of older versions lack some numbers.
        points = [(epoch["epoch"], epoch[name]) for epoch in history if name in epoch]
        weight = weights.get(name, 1.0)
        points = [(epoch, weight * value) for epoch, value in points] if weight else []
        if points:
            epochs, values = zip(*points, strict=True)
            marker = "o" if len(history) < 30 else None
            axes.plot(epochs, values, style, color=colour, label=label, marker=marker, markersize=4)
    axes.axvline(history[best]["epoch"], color="0.7", linewidth=1, zorder=0, label="best epoch")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, frameon=False)
