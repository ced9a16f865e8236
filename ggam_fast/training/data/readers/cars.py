"""Stanford Cars in the layout that torchvision reads, with boxes."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision.datasets import StanfordCars  # type: ignore[import-untyped]

from ggam_fast.training.data.annotations import Annotations
from ggam_fast.training.data.image_set import ImageSet
from ggam_fast.training.data.readers import folder as image_folder
from ggam_fast.training.data.readers.layout import base_folder
from ggam_fast.training.errors import TrainError

_ANNOTATIONS = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
_FILES = ("devkit/cars_meta.mat", "cars_train", "cars_test", *_ANNOTATIONS.values())


def read(root: Path, cache: Path) -> ImageSet:
    """The 16,185 cars of 196 models, in the official split or in train/ and test/ folders."""
    if image_folder.has_splits(root):
        return image_folder.read(root, cache)
    base = base_folder(root, "stanford_cars", _FILES)
    if base.name != "stanford_cars":
        raise TrainError(f"--root must hold Stanford Cars in a folder called stanford_cars; got {root}")
    try:
        import scipy.io  # type: ignore[import-untyped]
    except ImportError as error:
        raise TrainError("--data cars needs SciPy to read .mat files: pip install scipy") from error
    files: list[Path] = []
    labels: list[int] = []
    boxes: list[list[float]] = []
    splits = {}
    try:
        for split, name in _ANNOTATIONS.items():
            cars = StanfordCars(base.parent, split)
            splits[split] = torch.arange(len(files), len(files) + len(cars))
            files += [Path(path) for path, _ in cars._samples]
            labels += [int(label) for _, label in cars._samples]
            table = scipy.io.loadmat(base / name, squeeze_me=True)["annotations"]
            # Corners are counted from 1 and belong to the box.
            boxes += [[r["bbox_x1"] - 1, r["bbox_y1"] - 1, r["bbox_x2"], r["bbox_y2"]] for r in table]
    except Exception as error:  # SciPy raises errors of many kinds for a damaged file
        raise TrainError(f"--root {root} does not have the layout of Stanford Cars: {error}") from error
    return ImageSet(
        name="cars",
        files=tuple(files),
        labels=torch.tensor(labels),
        classes=tuple(cars.classes),
        splits=splits,
        flips=((), (-1,)),
        notes=("Stanford Cars (Krause et al., 2013), official split",),
        annotations=Annotations(torch.tensor(boxes, dtype=torch.float32)),
    )
