"""`ggam-fast explain`: draw for each image where a classifier looks and what it predicts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ggam_fast.training.data.image_set import eval_transform, read_image, without_banner
from ggam_fast.training.errors import TrainError
from ggam_fast.training.model.heatmaps import heat_maps
from ggam_fast.training.model.model_file import Checkpoint
from ggam_fast.training.show.figures import BLUE, ORANGE, colour_key, new_figure, show_heat, show_image
from ggam_fast.training.show.lettering import fitted
from ggam_fast.training.system.devices import resolve_device
from ggam_fast.training.system.files import writable_folder, write_atomically
from ggam_fast.training.use.open_run import open_run

logger = logging.getLogger(__name__)

_TOP = 5
_KEY = 0.55  # height in inches of the key of the colours
# Colours of the first and of the second run.
_BARS = (BLUE, ORANGE)


@dataclass(frozen=True)
class ExplainConfig:
    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Image files."""
    run: Path = tyro.MISSING
    """Folder of a run, or a checkpoint in it."""
    compare: Path | None = None
    """A second run with the same classes, such as one without guidance."""
    class_name: str | None = None
    """Class whose Grad-CAM is drawn for both runs. By default the class that --run predicts."""
    weights: Literal["last", "best"] = "last"
    """Classifier of each run. best is that of the best epoch, as --best-by of the training chose
    it."""
    out: Path = Path("explained")
    """Folder of the figures. Each is named after its image, and older figures are replaced."""
    enlarge: bool = False
    """Allow images that are smaller than the network's input."""
    device: str = "auto"
    """Device, such as cpu or cuda:1. auto is the first GPU, or the CPU if there is none."""


class Seen(NamedTuple):
    """One image as one classifier sees it.

    It has the crop (H, W, 3) in [0, 1], `attention` and `grad_cam` (h, w), probabilities (K,) and the class
    of `grad_cam`.
    """

    picture: Tensor
    attention: Tensor | None
    grad_cam: Tensor
    probabilities: Tensor
    of: int


def explain(config: ExplainConfig) -> list[Path]:
    """Draw the figures and return their paths. All images are read before the first figure is written.

    Raises:
        TrainError: an option or an image is unfit, or a file cannot be read or written.
    """
    if not config.images:
        raise TrainError("ggam-fast explain needs one or more image files; got none")
    device = resolve_device(config.device)
    runs = [config.run] if config.compare is None else [config.run, config.compare]
    checkpoints = [open_run(run, config.weights) for run in runs]
    classes = checkpoints[0].classes
    if checkpoints[-1].classes != classes:
        raise TrainError(f"--run {runs[0]} and --compare {runs[-1]} must have the same classes")
    if config.class_name is not None and config.class_name not in classes:
        raise TrainError(f"--class-name must be one of {', '.join(classes)}; got {config.class_name}")
    asked = None if config.class_name is None else classes.index(config.class_name)
    for checkpoint in checkpoints:
        checkpoint.model.to(device)
    least = max([one.model.backbone.image_size for one in checkpoints if not _enlarges(one, config)] or [1])
    banner = max(map(_banner, checkpoints))
    pictures = [read(path, least, banner) for path in config.images]
    names = figure_names(config.images)
    labels = run_labels(checkpoints, runs)
    paths = []
    with writable_folder(config.out):
        for source, picture, name in zip(config.images, pictures, names, strict=True):
            seen = [look(checkpoints[0], picture, asked, device)]
            seen += [look(other, picture, seen[0].of, device) for other in checkpoints[1:]]
            figure = draw(source.name, seen, labels, classes)
            path = config.out / name
            write_atomically(path, lambda part, figure=figure: figure.savefig(part, format="png"))  # type: ignore[misc]
            paths.append(path)
            for one, label in zip(seen, labels, strict=True):
                best = one.probabilities.topk(min(_TOP, len(classes)))
                guesses = ", ".join(
                    f"{classes[index]} {value:.3f}"
                    for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
                )
                logger.info(f"{path}: {f'{label}: ' if label else ''}{guesses}")
    return paths


def _enlarges(checkpoint: Checkpoint, config: ExplainConfig) -> bool:
    return config.enlarge or bool(checkpoint.description["data"].get("enlarge", False))


def _banner(checkpoint: Checkpoint) -> int:
    """Height in pixels of the strip that the run cuts off at the bottom of every image."""
    return int(checkpoint.description["data"].get("banner", 0))


def read(path: Path, least: int, banner: int = 0) -> Image.Image:
    """The image at `path`. Without its lowest `banner` pixels, no side may be shorter than `least`.

    Raises:
        TrainError: the image cannot be read, or it is smaller.
    """
    picture = read_image(path)
    if min(picture.width, picture.height - banner) < least:
        raise TrainError(
            f"{path} ({picture.width} x {picture.height}) is smaller than the crop of {least} x {least}; "
            "enlarge it with --enlarge"
        )
    return picture


def figure_names(images: Sequence[Path]) -> list[str]:
    """The name of each image's figure: the stem of its file. If stems are equal, the folder comes first.

    Raises:
        TrainError: an image is given twice.
    """
    stems = Counter(path.stem for path in images)
    names = [
        f"{path.stem if stems[path.stem] == 1 else f'{path.resolve().parent.name}-{path.name}'}.png"
        for path in images
    ]
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        same = [str(path) for path, one in zip(images, names, strict=True) if one == name]
        raise TrainError(f"{' and '.join(same[:2])} would both be drawn as {name}; draw them in two calls")
    return names


def run_labels(checkpoints: Sequence[Checkpoint], runs: Sequence[Path]) -> list[str]:
    """Labels of the runs: their guidance if it differs, else their names. A single run has an empty label."""
    if len(checkpoints) == 1:
        return [""]
    weights = [float(one.description["optim"]["guidance_weight"]) for one in checkpoints]
    if (weights[0] == 0) != (weights[1] == 0):
        return [f"guidance {weight:g}" if weight else "no guidance" for weight in weights]
    names = [run.resolve().name for run in runs]
    return names if names[0] != names[1] else [str(run) for run in runs]


@torch.no_grad()
def look(checkpoint: Checkpoint, image: Image.Image, asked: int | None, device: torch.device) -> Seen:
    """Where the classifier looks in `image`. Grad-CAM is that of the class `asked`, or the predicted one."""
    backbone = checkpoint.model.backbone
    inputs = eval_transform(*backbone.preprocessing)(without_banner(image, _banner(checkpoint)))
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (backbone.mean, backbone.std))
    features = backbone(inputs[None].to(device))
    found = heat_maps(
        checkpoint.model.head, features, None if asked is None else torch.tensor([asked], device=device)
    )
    return Seen(
        (inputs * std + mean).clamp(0, 1).permute(1, 2, 0),
        None if found.attention is None else found.attention[0].cpu(),
        found.grad_cam[0].cpu(),
        found.logits[0].softmax(0).cpu(),
        int(found.classes[0]),
    )


def draw(name: str, seen: Sequence[Seen], labels: Sequence[str], classes: Sequence[str]) -> Figure:
    """A figure of the image, each run's maps over it, and bars for the likeliest classes."""
    maps = []
    for one, label in zip(seen, labels, strict=True):
        below = f"\n{fitted(label, 2.3, 9)}" if label else ""
        if one.attention is not None:
            maps.append((one.picture, one.attention, f"spatial attention{below}"))
        maps.append((one.picture, one.grad_cam, f"Grad-CAM, {fitted(classes[one.of], 1.7, 9)}{below}"))
    width = 2.5 * (1 + len(maps)) + 4.2
    figure = new_figure(width, 3.1 + _KEY)
    (top,), (legend,) = figure.subfigures(2, 1, squeeze=False, height_ratios=[3.1, _KEY])
    axes = top.subplots(1, 2 + len(maps), width_ratios=[1] * (1 + len(maps)) + [1.2])
    show_image(axes[0], seen[0].picture)
    axes[0].set_xlabel(fitted(name, 2.3, 9, lines=2), fontsize=9)
    for place, (picture, heat, title) in zip(axes[1:-1], maps, strict=True):
        show_heat(place, picture, heat)
        place.set_xlabel(title, fontsize=9)
    _bars(axes[-1], seen, labels, classes)
    # Below the maps, and as wide as one of them.
    colour_key(legend, ((2.5 * (1 + len(maps) / 2) - 1.1) / width, 0.5, 2.2 / width, 0.3))
    return figure


def _bars(axes: Axes, seen: Sequence[Seen], labels: Sequence[str], classes: Sequence[str]) -> None:
    """Draw the classes with the highest mean probability over the runs, with a bar for each run."""
    order = torch.stack([one.probabilities for one in seen]).mean(0).argsort(descending=True)[:_TOP].tolist()
    height = 0.8 / len(seen)
    for turn, (one, label) in enumerate(zip(seen, labels, strict=True)):
        y = [place + height * (turn - (len(seen) - 1) / 2) for place in range(len(order))]
        values = [100 * one.probabilities[index].item() for index in order]
        bars = axes.barh(y, values, height=0.9 * height, color=_BARS[turn], label=fitted(label, 1.5, 8))
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    axes.set_yticks(
        range(len(order)), [fitted(classes[index], 1.6, 9, lines=2) for index in order], fontsize=9
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 115)
    axes.set_xticks([0, 50, 100])
    axes.set_xlabel("probability, %", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    if len(seen) > 1:
        axes.legend(frameon=False, fontsize=8, loc="lower right")
