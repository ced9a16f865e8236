"""Write an evaluation as one HTML file that needs no network and no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.colors import to_hex, to_rgb
from PIL import Image
from torch import Tensor

from ggam_fast.training.measure.classification import confused_with
from ggam_fast.training.measure.intervals import RESAMPLES
from ggam_fast.training.measure.localization import localisation_rows
from ggam_fast.training.show.charts import faithfulness_curves, learning_curves, reliability_diagram, svg
from ggam_fast.training.show.figures import BLUE, NOTHING, VERMILION, overlay
from ggam_fast.training.system.files import write_atomically

_MATRIX_CLASSES = 40
_ROWS = 10_000
_TEMPLATES = Environment(
    loader=PackageLoader("ggam_fast.training.show"),
    autoescape=True,  # users choose the names of classes and files
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class Seen(NamedTuple):
    """An evaluated image. `probability` is that of the prediction `guess`, `of_label` that of the label."""

    file: str
    label: str
    guess: str
    probability: float
    of_label: float

    @property
    def right(self) -> bool:
        return self.label == self.guess


class Example(NamedTuple):
    """A picture of the page.

    `row`: its place among the evaluated images. `picture`: (H, W, 3) in [0, 1]. `attention`: a map (h, w), or
    None. `cams`: the Grad-CAM map (h, w) of some classes, by their names.
    """

    row: int
    picture: Tensor
    attention: Tensor | None
    cams: Mapping[str, Tensor]


class Training(NamedTuple):
    """The numbers of every epoch of a run, and the index of the best one."""

    history: Sequence[Mapping[str, float]]
    best: int


class Panel(NamedTuple):
    """One picture of an example. `kind`: what the page's switch calls it."""

    kind: str
    caption: str
    picture: str


def write_html(path: Path, text: str) -> None:
    """Write `text`, a page.

    Raises:
        TrainError: the file cannot be written.
    """
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def page(
    results: Mapping[str, Any],
    seen: Sequence[Seen],
    worst: Sequence[Example] = (),
    others: Sequence[Example] = (),
    training: Training | None = None,
) -> str:
    """The HTML of `results`, the content of evaluation.json.

    `seen`: every evaluated image. `worst`, `others`: pictures of the worst errors and of other images.
    """
    found, classes = results["classification"], results["classes"]
    optim = results["run"]["optim"]
    weights = {"guidance": optim["guidance_weight"], "positions": optim.get("position_weight", 0.0)}
    faithful = results["faithfulness"]
    pictures = [
        [(example.row, seen[example.row], _panels(example, seen)) for example in some]
        for some in (worst, others)
    ]
    panels = [panel for some in pictures for _, _, those in some for panel in those]
    shown = {row for some in pictures for row, _, _ in some}
    order = sorted(range(len(seen)), key=lambda row: (seen[row].of_label, row))
    return _TEMPLATES.get_template("evaluation.html").render(
        results=results,
        found=found,
        tiles=_tiles(found),
        resamples=RESAMPLES,
        training=None if training is None else [svg(one) for one in learning_curves(*training, weights)],
        best=None if training is None else training.history[training.best]["epoch"],
        reliability=svg(reliability_diagram(found["reliability"])),
        localisation=localisation_rows(results["localisation"]) if results["localisation"] else None,
        curves={kind: svg(faithfulness_curves(faithful["maps"], kind)) for kind in ("insertion", "deletion")}
        if faithful
        else None,
        kinds=list(dict.fromkeys(panel.kind for panel in panels)),
        worst=pictures[0],
        others=pictures[1],
        classes=_classes(found, classes),
        matrix=None if len(classes) > _MATRIX_CLASSES else _matrix(found["confusion"], classes),
        mistakes=mistakes(found["confusion"], classes),
        images=[(row, seen[row], row in shown) for row in order[:_ROWS]],
        blue=_channels(BLUE),
        red=_channels(VERMILION),
        heat=_heat_colours(),
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


def _tiles(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value and 95 % interval of the headline numbers."""
    shares = (
        ("accuracy", "accuracy"),
        ("top-5 accuracy", "top5"),
        ("balanced accuracy", "balanced_accuracy"),
        ("macro F1", "macro_f1"),
        ("always the commonest class", "majority"),
    )
    tiles = []
    for name, key in shares:
        if key == "top5" and len(found["support"]) <= 5:
            continue
        ends = found["intervals"].get(key)
        interval = "" if ends is None else " to ".join(f"{100 * end:.1f}" for end in ends) + " %"
        tiles.append((name, f"{100 * found[key]:.1f} %", interval))
    return [*tiles, ("calibration error", f"{found['calibration_error']:.3f}", "")]


def _classes(found: Mapping[str, Any], classes: Sequence[str]) -> list[tuple[str, int, str, str, str, str]]:
    """A line for each class: name, images, precision, recall, F1, and the class it is most confused with.

    A number that is not defined is a dash.
    """
    claimed = [sum(column) for column in zip(*found["confusion"], strict=True)]
    lines = []
    for index, name in enumerate(classes):
        support = found["support"][index]
        there = {"precision": claimed[index], "recall": support, "f1": claimed[index] + support}
        shares = [f"{100 * found[key][index]:.1f}" if count else "-" for key, count in there.items()]
        precision, recall, f1 = shares
        lines.append(
            (name, support, precision, recall, f1, confused_with(found["confusion"], index, classes))
        )
    return lines


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


def _panels(example: Example, seen: Sequence[Seen]) -> list[Panel]:
    """The image itself, and its maps over it."""
    panels = [Panel("image", "image", _jpeg(example.picture))]
    if example.attention is not None:
        panels.append(_heated("attention", "attention", example.picture, example.attention))
    label = seen[example.row].label
    for name, heat in example.cams.items():
        role = "class" if name == label else "prediction"
        panels.append(_heated("Grad-CAM", f"Grad-CAM of the {role} {name}", example.picture, heat))
    return panels


def _heated(kind: str, caption: str, picture: Tensor, heat: Tensor) -> Panel:
    return Panel(kind, caption if heat.any() else f"{caption}: {NOTHING}", _jpeg(overlay(picture, heat)))


def _jpeg(picture: Tensor) -> str:
    """A picture (H, W, 3) in [0, 1] as the address of an inline JPEG image."""
    buffer = io.BytesIO()
    pixels = picture.clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).save(buffer, format="jpeg", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _heat_colours() -> str:
    """The colours of a map over a medium grey, from lowest to highest, for a gradient."""
    ramp = overlay(torch.full((1, 9, 3), 0.5), torch.linspace(0.0, 1.0, 9)[None])[0]
    return ", ".join(to_hex(colour) for colour in ramp.tolist())


def _channels(colour: str) -> str:
    """A colour such as #0072B2 as the three numbers of CSS's rgb()."""
    return " ".join(str(round(255 * part)) for part in to_rgb(colour))
