"""`ggam-fast data`: list data sets, check one, or draw some of its images."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.table import Table

from ggam_fast.training.config.options import DataName
from ggam_fast.training.data.image_set import ImageSet
from ggam_fast.training.data.readers import READERS, read_images
from ggam_fast.training.data.repeats import across_splits
from ggam_fast.training.data.scan import scan
from ggam_fast.training.errors import TrainError
from ggam_fast.training.model.feature_cache import default_cache_dir
from ggam_fast.training.show.console import Report
from ggam_fast.training.show.figures import BLUE, VERMILION, YELLOW, literal
from ggam_fast.training.system.files import write_atomically

logger = logging.getLogger(__name__)

_COLUMNS = 6


@dataclass(frozen=True)
class ShowConfig:
    data: DataName = "elpv"
    """Data set."""
    root: Path | None = None
    """Folder of the data set."""
    cache_dir: Path | None = None
    """Where composed images are kept. By default $XDG_CACHE_HOME/ggam_fast or ~/.cache."""
    split: str = "train"
    """Split whose images the preview shows."""
    images: int = 24
    """Number of images in the preview. They are spread over the classes."""
    out: Path = field(default_factory=lambda: Path("preview.png"))
    """PNG file of the preview."""


def show_list(report: Report) -> None:
    """Print every data set: its name and source, what --root must hold, and its annotations."""
    table = Table(title="--data", title_justify="left")
    for column in ("name", "what", "--root holds", "annotations"):
        table.add_column(column, overflow="fold")
    for name, reader in READERS.items():
        table.add_row(name, reader.source, reader.holds, reader.annotations)
    report.console.print(table)


def check(config: ShowConfig, report: Report) -> int:
    """Count, read and compare all files. The exit code is 0, or 2 if some file cannot be read."""
    images = _read(config)
    table = Table(title=images.summary(), title_justify="left")
    for column in ("split", "images", "classes", "smallest class", "largest class"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, rows in images.splits.items():
        counts = Counter(images.labels[rows].tolist())
        least, most = min(counts.values()), max(counts.values())
        table.add_row(split, str(len(rows)), str(len(counts)), str(least), str(most))
    report.console.print(table)
    kinds = images.annotations.kinds() if images.annotations else ()
    logger.info(f"annotations: {', '.join(kinds) or 'none'}")
    with report.bar("reading", len(images.files)) as bar:
        found = scan(images, range(len(images.files)), lambda: bar.advance(1))
    bad = [one for one in found if one.problem is not None]
    sizes = [one.size for one in found if one.problem is None]
    if sizes:
        logger.info(f"smallest image {min(sizes, key=min)}, largest {max(sizes, key=max)} (width, height)")
    for group in across_splits(images):
        names = ", ".join(str(images.files[row]) for row in group)
        logger.info(f"one file lies in more than one split: {names}")
    for one in bad:
        logger.info(f"cannot be read: {images.files[one.row]} ({one.problem})")
    logger.info(f"{len(bad)} of {len(images.files)} images cannot be read")
    return 2 if bad else 0


def preview(config: ShowConfig) -> Path:
    """Draw some images of a split with their classes, boxes, parts and masks."""
    images = _read(config)
    if config.split not in images.splits:
        raise TrainError(
            f"--split must be one of {', '.join(images.splits)} for {images.name}; got {config.split}"
        )
    if config.images < 1:
        raise TrainError(f"--images must be 1 or more; got {config.images}")
    if config.out.suffix.lower() != ".png":
        raise TrainError(f"--out must be a .png file; got {config.out}")
    if not config.out.parent.is_dir():
        raise TrainError(f"--out {config.out} cannot be written: there is no folder {config.out.parent}")
    rows = _spread(images, config.split, config.images)
    lines = -(-len(rows) // _COLUMNS)
    figure = Figure(figsize=(2.3 * _COLUMNS, 2.5 * lines), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for axes in figure.subplots(lines, _COLUMNS, squeeze=False).flat:
        axes.axis("off")
    for axes, row in zip(figure.axes, rows, strict=False):
        pixels = np.asarray(images.read(row))
        axes.imshow(pixels)
        axes.set_title(literal(images.classes[int(images.labels[row])]), fontsize=9)
        found = images.annotations
        if found is None:
            continue
        if found.masks is not None:
            axes.contour(found.masks(row).numpy(), levels=[0.5], colors=VERMILION, linewidths=1)
        if found.boxes is not None:
            x0, y0, x1, y1 = found.boxes[row].tolist()
            axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=BLUE, linewidth=1.5))
        if found.parts is not None:
            seen = found.parts[row][found.parts[row][:, 2] > 0]
            axes.plot(seen[:, 0], seen[:, 1], "o", color=YELLOW, markersize=3, markeredgecolor="black")
    write_atomically(config.out, lambda part: figure.savefig(part, format="png"))
    logger.info(f"{len(rows)} images of {images.name}, split {config.split}: {config.out}")
    return config.out


def _spread(images: ImageSet, split: str, count: int) -> list[int]:
    """The first images of each class in turn."""
    rows = images.splits[split]
    labels = images.labels[rows]
    queues = [rows[labels == label].tolist() for label in labels.unique().tolist()]
    longest = max(map(len, queues))
    return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)][:count]


def _read(config: ShowConfig) -> ImageSet:
    images = read_images(config.data, config.root, config.cache_dir or default_cache_dir())
    images.log_notes(images.name)
    return images
