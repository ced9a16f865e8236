"""A gallery of where the head looks: image, spatial attention and Grad-CAM side by side."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ggam_fast.training.data.image_set import ImageSet, eval_transform
from ggam_fast.training.model.classifier import GGAMClassifier
from ggam_fast.training.model.heatmaps import heat_maps
from ggam_fast.training.show.figures import BLUE, VERMILION, colour_key, show_heat, show_image
from ggam_fast.training.show.lettering import fitted
from ggam_fast.training.system.files import write_atomically

_ROWS, _COLUMNS = 4, 2
# Room in inches for the names in a title, and for the name in a caption.
_TITLE, _CAPTION = 4.4, 1.2


def choose_examples(logits: Tensor, labels: Tensor, count: int) -> list[int]:
    """Rows for a gallery, spread over all classes. Half of them are mistakes, if there are that many.

    Each class in turn gives its next correct and its next wrong row, in the order of the split.
    """
    right = logits.argmax(1) == labels
    queues = {
        correct: [
            ((labels == label) & (right == correct)).nonzero().flatten().tolist()
            for label in range(logits.shape[1])
        ]
        for correct in (True, False)
    }
    wrong_rows = _round_robin(queues[False], start=1)
    right_rows = _round_robin(queues[True], start=0)
    wrong_count = min(len(wrong_rows), max(count // 2, count - len(right_rows)))
    chosen = wrong_rows[:wrong_count] + right_rows[: count - wrong_count]
    return sorted(chosen, key=lambda row: (int(labels[row]), not right[row], row))


def _round_robin(queues: list[list[int]], start: int) -> list[int]:
    """One element of each queue in turn. Every second queue comes first, beginning at `start`."""
    order = queues[start::2] + queues[1 - start :: 2]
    longest = max(map(len, order), default=0)
    return [queue[turn] for turn in range(longest) for queue in order if turn < len(queue)]


@torch.no_grad()
def draw_gallery(path: Path, model: GGAMClassifier, images: ImageSet, split: str, logits: Tensor) -> Path:
    """Write a PNG of `_ROWS * _COLUMNS` images of a split, whose `logits` (N, K) are given.

    Grad-CAM is that of the predicted class. Each map has its own colour scale. Numbers say how far the
    spatial attention is from uniform.
    """
    rows = images.splits[split]
    chosen = choose_examples(logits, images.labels[rows], _ROWS * _COLUMNS)
    backbone = model.eval().backbone
    device = next(backbone.parameters()).device
    transform = eval_transform(*backbone.preprocessing)
    inputs = torch.stack([transform(images.read(int(rows[row]))) for row in chosen])
    predicted = logits[chosen].argmax(1)
    features = backbone(inputs.to(device))
    found = heat_maps(model.head, features, predicted.to(device))
    grad_cam = found.grad_cam.cpu()
    attention = torch.ones_like(grad_cam) if found.attention is None else found.attention.cpu()
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (backbone.mean, backbone.std))
    pictures = (inputs * std + mean).clamp(0, 1).permute(0, 2, 3, 1)

    lines = -(-len(chosen) // _COLUMNS)
    figure = Figure(figsize=(12.6, 2.62 * lines + 0.55), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    (grid,), (legend,) = figure.subfigures(2, 1, squeeze=False, height_ratios=[2.62 * lines, 0.55])
    panels = grid.subfigures(lines, _COLUMNS, squeeze=False, wspace=0.02, hspace=0).flat
    for index, (panel, row) in enumerate(zip(panels, chosen, strict=False)):
        right = int(images.labels[rows[row]]) == int(predicted[index])
        label = images.classes[int(images.labels[rows[row]])]
        guess = images.classes[int(predicted[index])]
        names = [fitted(name, _TITLE if right else _TITLE / 2, 13, weight="bold") for name in (label, guess)]
        panel.suptitle(
            f"✓ {names[0]}" if right else f"✗ {names[0]}, predicted {names[1]}",
            color=BLUE if right else VERMILION,  # a sign shows it too
            fontsize=13,
            fontweight="bold",
            y=0.97,
        )
        axes = panel.subplots(1, 3)
        panel.subplots_adjust(left=0.015, right=0.985, top=0.87, bottom=0.09, wspace=0.05)
        relative = attention[index] / attention[index].mean()
        _show(axes[0], pictures[index], None, "image")
        _show(
            axes[1],
            pictures[index],
            attention[index],
            f"attention, {relative.min():.2f} to {relative.max():.2f} of mean",
        )
        _show(axes[2], pictures[index], grad_cam[index], f"Grad-CAM, {fitted(guess, _CAPTION, 8.5)}")
    colour_key(legend, (0.36, 0.62, 0.28, 0.2))
    write_atomically(path, lambda part: figure.savefig(part, format="png"))
    return path


def _show(axes: Axes, picture: Tensor, heat: Tensor | None, title: str) -> None:
    if heat is None:
        show_image(axes, picture)
    else:
        show_heat(axes, picture, heat)
    axes.set_xlabel(title, fontsize=8.5, labelpad=4)
