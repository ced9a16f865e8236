"""FGVC-Aircraft in its official layout, with boxes. The credit line at the bottom is cut off."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision.datasets import FGVCAircraft  # type: ignore[import-untyped]

from ggam_fast.training.data.annotations import Annotations
from ggam_fast.training.data.image_set import ImageSet
from ggam_fast.training.data.readers import folder as image_folder
from ggam_fast.training.data.readers.layout import base_folder, lines
from ggam_fast.training.errors import TrainError

BANNER = 20
"""Pixels at the bottom of every image that hold the photographer's name."""

_FILES = (
    *("data/images", "data/variants.txt", "data/images_box.txt"),
    *(f"data/images_variant_{split}.txt" for split in ("train", "val", "test")),
)


def read(root: Path, cache: Path) -> ImageSet:
    """The 10,000 aircraft of 100 variants, in the three official splits or in train/ and test/ folders.

    The banner is cut off in either case.
    """
    if image_folder.has_splits(root):
        return image_folder.read(root, cache).cropped(BANNER)
    base = base_folder(root, "fgvc-aircraft-2013b", _FILES)
    if base.name != "fgvc-aircraft-2013b":
        raise TrainError(f"--root must hold FGVC-Aircraft in a folder called fgvc-aircraft-2013b; got {root}")
    files: list[Path] = []
    labels: list[int] = []
    splits = {}
    try:
        for split in ("train", "val", "test"):
            part = FGVCAircraft(base.parent, split)
            splits[split] = torch.arange(len(files), len(files) + len(part))
            files += [Path(path) for path in part._image_files]
            labels += part._labels
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise TrainError(f"--root {root} does not have the layout of FGVC-Aircraft: {error}") from error
    box = {}
    path = base / "data" / "images_box.txt"
    for line in lines(path):
        try:
            image, x0, y0, x1, y1 = (int(number) for number in line.split())
        except ValueError as error:
            raise TrainError(f"{path}: expected an image and 4 numbers; got {line!r}") from error
        # Corners are counted from 1 and belong to the box.
        box[f"{image:07d}"] = [x0 - 1, y0 - 1, x1, y1]
    missing = [file.stem for file in files if file.stem not in box]
    if missing:
        raise TrainError(f"{path} has no box for image {missing[0]}")
    return ImageSet(
        name="aircraft",
        files=tuple(files),
        labels=torch.tensor(labels),
        classes=tuple(part.classes),
        splits=splits,
        flips=((), (-1,)),
        notes=(
            "FGVC-Aircraft (Maji et al., arXiv 1306.5151), variants, official splits",
            f"the lowest {BANNER} pixels of every image, which hold the credit line, are cut off",
        ),
        annotations=Annotations(torch.tensor([box[file.stem] for file in files], dtype=torch.float32)),
        banner=BANNER,
    )
