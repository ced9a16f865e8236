"""The pictures of an ablation's report. Each seed is a point."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ggam_fast.training.ablation.group import Group
from ggam_fast.training.data.image_set import ImageSet, eval_transform
from ggam_fast.training.show.figures import BLUE, GREEN, VERMILION, new_figure, show_heat, show_image
from ggam_fast.training.show.lettering import fitted
from ggam_fast.training.system.files import write_atomically

_PLAIN, _GUIDED = BLUE, VERMILION
_STYLES = ((BLUE, "o"), (VERMILION, "s"), (GREEN, "^"))


def draw_table(path: Path, rows: Sequence[Group]) -> bool:
    """Draw test accuracy, one line of points per row.

    A second panel has the pointing game of Grad-CAM, if it was measured.
    """
    panels: list[tuple[str, tuple[str, ...]]] = [("test accuracy, %", ("test", "accuracy"))]
    if rows[0].values("localisation", "grad_cam", "pointing"):
        panels.append(("pointing game of Grad-CAM, %", ("localisation", "grad_cam", "pointing")))
    figure = new_figure(4.6 * len(panels) + 1.6, 0.42 * len(rows) + 1.1)
    for axes, (title, keys) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for place, row in enumerate(rows):
            values = 100 * np.array(row.values(*keys))
            colour = _GUIDED if row.weight else _PLAIN
            axes.plot(values, np.full(len(values), place), "o", color=colour, alpha=0.55, markersize=5)
            axes.plot(values.mean(), place, "|", color=colour, markersize=18, markeredgewidth=2.5)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(title)
        _plain(axes, "x")
    figure.suptitle("each point is a seed, the bar is their mean", fontsize=9)
    return _save(figure, path)


def draw_sweep(path: Path, groups: Sequence[Group], norms: Sequence[str]) -> bool:
    """Draw accuracy against lambda: a line for each norm of beta, and a band for no guidance."""
    both = [group for group in groups if group.attention == "channel_spatial"]
    if not any(group.weight for group in both):
        return False
    figure = new_figure(10, 3.6)
    for axes, split in zip(figure.subplots(1, 2, sharey=True), ("val", "test"), strict=True):
        for group in both:
            if not group.weight:
                values = 100 * np.array(group.values(split, "accuracy"))
                spread = values.std(ddof=1) if len(values) > 1 else 0.0
                axes.axhspan(values.mean() - spread, values.mean() + spread, color="0.88", zorder=0)
                axes.axhline(values.mean(), color="0.45", linewidth=1.2, label="no guidance")
        for index, (norm, (colour, marker)) in enumerate(zip(norms, _STYLES, strict=False)):
            line = sorted((g for g in both if g.weight and g.cam_norm == norm), key=lambda g: g.weight)
            if not line:
                continue
            # Side by side, so that points of different norms do not hide each other.
            x = np.array([group.weight for group in line]) * 1.13 ** (index - 1)
            y = [100 * statistics.mean(group.values(split, "accuracy")) for group in line]
            axes.plot(x, y, color=colour, linewidth=1.4, marker=marker, markersize=6, label=norm)
            for at, group in zip(x, line, strict=True):
                values = 100 * np.array(group.values(split, "accuracy"))
                axes.plot(np.full(len(values), at), values, marker, color=colour, alpha=0.35, markersize=3.5)
        axes.set_xscale("log")
        axes.set_xlabel("lambda")
        axes.set_title({"val": "validation", "test": "test"}[split], fontsize=11)
        _plain(axes, "y")
    figure.axes[0].set_ylabel("accuracy, %")
    figure.axes[0].legend(frameon=False, fontsize=9)
    return _save(figure, path)


def draw_beta(
    path: Path, groups: Sequence[Group], norms: Sequence[str], best: Mapping[str, float | None]
) -> bool:
    """Draw |beta|, the spread of b~ and the correlation of log S and beta, before and after training."""
    chosen = [
        group
        for norm in norms
        for group in groups
        if (group.attention, group.cam_norm, group.weight) == ("channel_spatial", norm, best[norm])
    ]
    if not chosen:
        return False
    figure = new_figure(11, 3.4)
    panels = (
        ("median |beta|", "median", "log"),
        ("spread of b~ over channels", "spread", "log"),
        ("correlation of log S and beta", "correlation", "linear"),
    )
    for axes, (title, name, scale) in zip(figure.subplots(1, 3), panels, strict=True):
        for place, group in enumerate(chosen):
            for offset, when, colour in ((-0.12, "before", _PLAIN), (0.12, "after", _GUIDED)):
                values = group.values("beta", when, name)
                label = f"{when} training" if not place else None
                axes.plot(
                    np.full(len(values), place + offset),
                    values,
                    "o" if when == "before" else "s",
                    color=colour,
                    alpha=0.7,
                    label=label,
                )
        axes.set_yscale(scale)
        axes.set_xticks(
            range(len(chosen)), [f"{g.cam_norm}\nlambda {g.weight:g}" for g in chosen], fontsize=9
        )
        axes.set_xlim(-0.5, len(chosen) - 0.5)
        axes.set_title(title, fontsize=11)
        _plain(axes, "y")
    figure.axes[0].legend(frameon=False, fontsize=9)
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
