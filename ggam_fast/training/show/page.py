"""Write an evaluation as one HTML file that needs no network and no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from ggam_fast.training.measure.classification import confused_with
from ggam_fast.training.measure.localization import localisation_rows
from ggam_fast.training.show.figures import BLUE, VERMILION, new_figure, show_heat, show_image
from ggam_fast.training.show.lettering import fitted
from ggam_fast.training.system.files import write_atomically

_MATRIX_CLASSES = 40
_TEMPLATES = Environment(
    loader=PackageLoader("ggam_fast.training.show"),
    autoescape=True,  # users choose the names of classes and files
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class Example(NamedTuple):
    """One image of the page. `picture`: (H, W, 3) in [0, 1]. `maps`: maps (h, w) by name."""

    file: str
    picture: Tensor
    label: str
    guess: str
    probability: float
    maps: Sequence[tuple[str, Tensor]]


def write_html(path: Path, results: dict[str, Any], examples: Sequence[Example]) -> None:
    """Write the page of `results`, the content of evaluation.json."""
    text = page(results, examples)
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def page(results: dict[str, Any], examples: Sequence[Example]) -> str:
    """The page's HTML."""
    found, classes = results["classification"], results["classes"]
    confusion = found["confusion"]
    return _TEMPLATES.get_template("evaluation.html").render(
        results=results,
        found=found,
        tiles=_tiles(found),
        localisation=localisation_rows(results["localisation"]) if results["localisation"] else None,
        curves=_jpeg(_curves(results["faithfulness"])) if results["faithfulness"] else None,
        examples=[(example, _jpeg(_panels(example))) for example in examples],
        classes=_classes(found, classes),
        matrix=None if len(classes) > _MATRIX_CLASSES else _matrix(confusion, classes),
        mistakes=mistakes(confusion, classes),
        blue=_channels(BLUE),
        red=_channels(VERMILION),
    )


def mistakes(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> list[tuple[str, str, int]]:
    """The most frequent mistakes: class, prediction and number of images, the most frequent first.

    `confusion`: rows are true classes.
    """
    found = [
        (count, classes[row], classes[column])
        for row, line in enumerate(confusion)
        for column, count in enumerate(line)
        if count and row != column
    ]
    return [(label, guess, count) for count, label, guess in sorted(found, reverse=True)[:_MATRIX_CLASSES]]


def _tiles(found: dict[str, Any]) -> list[tuple[str, str]]:
    shares = (
        ("accuracy", "accuracy"),
        ("always the commonest class", "majority"),
        ("top-5 accuracy", "top5"),
        ("balanced accuracy", "balanced_accuracy"),
        ("macro F1", "macro_f1"),
    )
    tiles = [(name, f"{100 * found[key]:.1f} %") for name, key in shares]
    return [*tiles, ("calibration error", f"{found['calibration_error']:.3f}")]


def _classes(found: dict[str, Any], classes: Sequence[str]) -> list[tuple[str, int, str, str]]:
    """A line for each class: its name, images and recall, and the class it is most confused with."""
    return [
        (
            name,
            found["support"][index],
            f"{100 * found['recall'][index]:.1f}" if found["support"][index] else "-",
            confused_with(found["confusion"], index, classes),
        )
        for index, name in enumerate(classes)
    ]


def _matrix(
    confusion: Sequence[Sequence[int]], classes: Sequence[str]
) -> list[tuple[str, list[tuple[str, float, int]]]]:
    """A line for each class: its name and, for each prediction, colour, share and number of images."""
    return [
        (
            classes[row],
            [
                ("blue" if row == column else "red", count / max(sum(line), 1), count)
                for column, count in enumerate(line)
            ],
        )
        for row, line in enumerate(confusion)
    ]


def _curves(found: dict[str, Any]) -> Figure:
    figure = new_figure(9, 3.1)
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("insertion", "deletion"), strict=True):
        for (name, both), line in zip(found["maps"].items(), ("-", "--", ":"), strict=False):
            curve = both[kind]["curve"]
            share = np.linspace(0, 100, len(curve))
            axes.plot(share, curve, line, linewidth=1.8, label=f"{name} ({both[kind]['area']:.3f})")
        axes.set_xlabel(f"pixels {'shown' if kind == 'insertion' else 'blanked'}, %")
        axes.set_title(f"{kind} (area under the curve)", fontsize=10)
        axes.set_ylim(0, 1)
        axes.grid(color="0.9")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("probability of the prediction")
    return figure


def _panels(example: Example) -> Figure:
    panels = 1 + len(example.maps)
    figure = new_figure(2.5 * panels, 2.75)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    show_image(axes[0], example.picture)
    axes[0].set_xlabel("image", fontsize=9)
    for place, (name, heat) in enumerate(example.maps, 1):
        show_heat(axes[place], example.picture, heat)
        axes[place].set_xlabel(fitted(name, 2.3, 9, lines=2), fontsize=9)
    return figure


def _jpeg(figure: Figure) -> str:
    """The figure as a JPEG in base64."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpeg", pil_kwargs={"quality": 88})
    return base64.b64encode(buffer.getvalue()).decode()


def _channels(colour: str) -> str:
    """A colour such as #0072B2 as the three numbers of CSS's rgb()."""
    return " ".join(str(round(255 * part)) for part in to_rgb(colour))
