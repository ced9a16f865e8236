"""`ggam-fast data`: list data sets, check one, or draw some of its images."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.table import Table

from ggam_fast.training.config.options import DataName
from ggam_fast.training.data.image_set import ImageSet
from ggam_fast.training.data.readers import READERS, read_images
from ggam_fast.training.data.repeats import copies
from ggam_fast.training.data.scan import refusals, scan, too_small, unreadable
from ggam_fast.training.errors import TrainError
from ggam_fast.training.model.backbones import LITE0, input_size
from ggam_fast.training.model.feature_cache import default_cache_dir
from ggam_fast.training.show.console import Report
from ggam_fast.training.show.figures import BLUE, VERMILION, YELLOW
from ggam_fast.training.show.lettering import fitted
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
    val_fraction: float = 0.0
    """As in train, share of the training images that become the validation split."""
    split_by: Path | None = None
    """As in train, CSV file for --data folder with columns path, label, split and group."""
    split: str = "train"
    """Split whose images the preview shows."""
    images: int = 24
    """Number of images in the preview. They are spread over the classes."""
    out: Path = field(default_factory=lambda: Path("preview.png"))
    """PNG file of the preview."""
    backbone: str = LITE0
    """check: timm model whose input size images must have."""
    image_size: int | None = None
    """check: side of the network's input, in pixels. The default is the backbone's own size."""
    skip_bad_images: bool = False
    """check: as in train, files that cannot be read are left out."""
    enlarge: bool = False
    """check: as in train, images may be smaller than the network's input."""
    json: bool = False
    """list, check: print JSON alone, for programs to read."""


def show_list(config: ShowConfig, report: Report) -> None:
    """Print every data set: its name and source, what --root must hold, and its annotations."""
    if config.json:
        fields = ("source", "holds", "annotations")
        print(json.dumps({n: {f: getattr(one, f) for f in fields} for n, one in READERS.items()}, indent=1))
        return
    table = Table(title="--data", title_justify="left")
    for column in ("name", "what", "--root holds", "annotations"):
        table.add_column(column, overflow="fold")
    for name, reader in READERS.items():
        table.add_row(name, reader.source, reader.holds, reader.annotations)
    report.console.print(table)


def check(config: ShowConfig, report: Report) -> int:
    """Count, read and compare all files. The exit code is 0, or 2 if `train` would refuse the data set."""
    found = checked(config, report)
    if config.json:
        print(json.dumps(found, indent=1))
        return 2 if found["refused"] else 0
    if "images" not in found:
        raise TrainError(found["refused"][0])
    table = Table(title=found["summary"], title_justify="left")
    for column in ("split", "images", "classes", "smallest class", "largest class"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, counts in found["splits"].items():
        table.add_row(split, *map(str, counts.values()))
    report.console.print(table)
    logger.info(f"annotations: {', '.join(found['annotations']) or 'none'}")
    if found["smallest"] is not None:
        smallest, largest = (tuple(found[name]) for name in ("smallest", "largest"))
        logger.info(f"smallest image {smallest}, largest {largest} (width, height)")
    for names in found["copies_across_splits"]:
        logger.info(f"one file lies in more than one split: {', '.join(names)}")
    for names in found["copies_across_classes"]:
        logger.info(f"one file has more than one class: {', '.join(names)}")
    for one in found["unreadable"]:
        logger.info(f"cannot be read: {one['file']} ({one['problem']})")
    logger.info(f"{len(found['unreadable'])} of {found['images']} images cannot be read")
    for reason in found["refused"]:
        logger.info(f"train would refuse this data set: {reason}")
    return 2 if found["refused"] else 0


def checked(config: ShowConfig, report: Report) -> dict[str, Any]:
    """What `check` finds. `refused` has a line for each reason why `train` would refuse the data set.

    If the data set cannot be read at all, it is the only list.
    """
    crop = config.image_size or input_size(config.backbone)
    source = {"data": config.data, "root": config.root and str(config.root)}
    try:
        images = _read(config)
    except TrainError as error:
        return {**source, "refused": [str(error)]}
    with report.bar("reading", len(images.files)) as bar:
        found = scan(images, range(len(images.files)), lambda: bar.advance(1))
    sizes = [one.size for one in found if one.problem is None]
    splits = {}
    for split, rows in images.splits.items():
        counts = Counter(images.labels[rows].tolist())
        splits[split] = {
            "images": len(rows),
            "classes": len(counts),
            "smallest_class": min(counts.values()),
            "largest_class": max(counts.values()),
        }
    same = copies(images)

    def names(groups: list[list[int]]) -> list[list[str]]:
        return [[str(images.files[row]) for row in rows] for rows in groups]

    return {
        **source,
        "summary": images.summary(),
        "images": len(images.files),
        "classes": images.classes,
        "splits": splits,
        "annotations": images.annotations.kinds() if images.annotations else (),
        "notes": images.notes,
        "smallest": min(sizes, key=min, default=None),
        "largest": max(sizes, key=max, default=None),
        "crop": crop,
        "unreadable": [
            {"file": str(images.files[one.row]), "problem": one.problem} for one in unreadable(found)
        ],
        "smaller_than_crop": [str(images.files[one.row]) for one in too_small(found, crop)],
        "copies_across_splits": names(same.across_splits),
        "copies_across_classes": names(same.across_classes),
        "refused": refusals(images, found, crop, skip_bad=config.skip_bad_images, enlarge=config.enlarge),
    }


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
        axes.set_title(fitted(images.classes[int(images.labels[row])], 2.1, 9, lines=2), fontsize=9)
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
    images = read_images(
        config.data,
        config.root,
        config.cache_dir or default_cache_dir(),
        split_by=config.split_by,
        val_fraction=config.val_fraction,
    )
    images.log_notes(images.name)
    return images
