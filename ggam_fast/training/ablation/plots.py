"""The pictures of an ablation's report. Each seed is a point."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ggam_fast.training.ablation.group import Group
from ggam_fast.training.data.image_set import ImageSet, eval_transform
from ggam_fast.training.show.figures import BLUE, VERMILION, new_figure, show_heat, show_image
from ggam_fast.training.show.lettering import fitted
from ggam_fast.training.system.files import write_atomically

_PLAIN, _GUIDED = BLUE, VERMILION
_MARKERS = "os^Dv"
_COLOURS = colormaps["tab10"]


def draw_table(path: Path, rows: Sequence[Group]) -> bool:
    """Draw test accuracy and negative log likelihood, one line of points per row.

    If localisation was measured, two more panels have the pointing games of attention and of Grad-CAM.
    """
    panels: list[tuple[str, float, tuple[str, ...]]] = [
        ("test accuracy, %", 100, ("test", "accuracy")),
        ("negative log likelihood, nats", 1, ("test", "nll")),
        ("pointing game of attention, %", 100, ("localisation", "attention", "pointing")),
        ("pointing game of Grad-CAM, %", 100, ("localisation", "grad_cam", "pointing")),
    ]
    panels = [panel for panel in panels if any(row.values(*panel[2]) for row in rows)]
    figure = new_figure(3.1 * len(panels) + 2.4, 0.34 * len(rows) + 1.2)
    axes_of = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, factor, keys) in zip(axes_of, panels, strict=True):
        for place, row in enumerate(rows):
            values = factor * np.array(row.values(*keys))
            if not len(values):
                continue
            colour = _PLAIN if row.guidance == "none" else _GUIDED
            axes.plot(values, np.full(len(values), place), "o", color=colour, alpha=0.55, markersize=5)
            axes.plot(values.mean(), place, "|", color=colour, markersize=14, markeredgewidth=2.5)
        axes.set_xlabel(title)
        _plain(axes, "x")
    axes_of[0].set_yticks(range(len(rows)), [row.label for row in rows])
    axes_of[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.suptitle("each point is a seed, the bar is their mean", fontsize=9)
    return _save(figure, path)


def draw_choice(path: Path, tried: Sequence[Group]) -> bool:
    """Draw validation accuracy and negative log likelihood against lambda, a line for each guidance."""
    lines: dict[str, list[Group]] = {}
    for group in tried:
        if group.weight:
            lines.setdefault(group.label, []).append(group)
    if not lines:
        return False
    figure = new_figure(10, 3.8)
    panels = (("validation accuracy, %", 100, "accuracy"), ("val negative log likelihood, nats", 1, "nll"))
    colours = [_COLOURS(index % 10) for index in range(len(lines))]
    for axes, (title, factor, name) in zip(figure.subplots(1, 2), panels, strict=True):
        for index, (label, groups) in enumerate(lines.items()):
            groups = sorted(groups, key=lambda group: group.weight)
            y = [factor * statistics.mean(group.values("val", name)) for group in groups]
            marker = _MARKERS[index % len(_MARKERS)]
            weights = [group.weight for group in groups]
            axes.plot(weights, y, color=colours[index], linewidth=1.3, marker=marker, label=label)
        axes.set_xscale("log")
        axes.set_xlabel("lambda")
        axes.set_ylabel(title)
        _plain(axes, "y")
    figure.axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return _save(figure, path)


def draw_mechanism(path: Path, rows: Sequence[Group]) -> bool:
    """Draw how S follows beta and T the class map, and their entropies, before and after training."""
    rows = [row for row in rows if row.attention != "none"]
    if not rows:
        return False
    panels = (
        ("correlation of log S and beta", "s_beta"),
        ("correlation of T and class map", "t_class_map"),
        ("entropy of S, share of uniform", "s_entropy"),
        ("entropy of T, share of uniform", "t_entropy"),
    )
    figure = new_figure(3.1 * len(panels) + 2.4, 0.34 * len(rows) + 1.3)
    axes_of = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, name) in zip(axes_of, panels, strict=True):
        for place, row in enumerate(rows):
            for offset, when, colour, marker in (
                (-0.15, "before", _PLAIN, "o"),
                (0.15, "after", _GUIDED, "s"),
            ):
                values = row.values("mechanism", when, name)
                label = f"{when} training" if not place else None
                places = np.full(len(values), place + offset)
                axes.plot(values, places, marker, color=colour, alpha=0.7, markersize=4, label=label)
        axes.set_xlabel(title)
        _plain(axes, "x")
    axes_of[0].set_yticks(range(len(rows)), [row.label for row in rows])
    axes_of[0].set_ylim(len(rows) - 0.5, -0.5)
    axes_of[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return _save(figure, path)


def draw_side_by_side(
    path: Path, rows: Sequence[Group], images: ImageSet, preprocessing: tuple[int, int]
) -> bool:
    """Draw the paper's last figure: some test images, each under every variant's Grad-CAM of its label.

    The maps are those of the first seed. `preprocessing`: the side of the network's input, and the length of
    an image's shorter edge before the crop.
    """
    kept = rows[0].cells[0]["pictures"]["rows"]
    size, resize = preprocessing
    transform = eval_transform(size, (0.0,) * 3, (1.0,) * 3, resize)
    figure = new_figure(1.75 * len(kept) + 1.5, 1.85 * (len(rows) + 1))
    grid = figure.subplots(len(rows) + 1, len(kept), squeeze=False)
    for column, row in enumerate(images.splits["test"][kept].tolist()):
        picture = transform(images.read(row)).clamp(0, 1).permute(1, 2, 0)
        show_image(grid[0][column], picture)
        grid[0][column].set_title(
            fitted(images.classes[int(images.labels[row])], 1.6, 9, lines=2), fontsize=9
        )
        for line, group in enumerate(rows, 1):
            heat = torch.tensor(group.cells[0]["pictures"]["grad_cam"][column])
            show_heat(grid[line][column], picture, heat)
    for line, label in enumerate(["image", *(row.label.replace(" + ", "\n+ ") for row in rows)]):
        grid[line][0].set_ylabel(label, fontsize=9)
    seed = rows[0].cells[0]["cell"]["seed"]
    note = f"Grad-CAM of the label, seed {seed}. Each map has its own colours, yellow for its highest value."
    figure.supxlabel(note, fontsize=9)
    return _save(figure, path)


def _plain(axes: Axes, grid: str) -> None:
    axes.grid(axis=grid, color="0.9")  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> bool:
    # As JPEG, photographs take a tenth of the space.
    quality: dict[str, Any] = {"pil_kwargs": {"quality": 88}} if path.suffix == ".jpg" else {}
    write_atomically(path, lambda part: figure.savefig(part, format=path.suffix[1:], **quality))
    return True
