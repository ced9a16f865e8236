"""Data sets for which torchvision's reader suffices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import Flowers102, OxfordIIITPet  # type: ignore[import-untyped]

from ggam_fast.training.data.annotations import Annotations
from ggam_fast.training.data.image_set import ImageSet
from ggam_fast.training.data.readers.layout import base_folder
from ggam_fast.training.errors import TrainError

# In the trimaps 1 is the animal, 2 the background and 3 the border between them.
_BACKGROUND = 2


def pets(root: Path, cache: Path) -> ImageSet:
    """Oxford-IIIT Pet: 7,349 cats and dogs of 37 breeds, in the official split, with masks from trimaps."""
    base = base_folder(
        root, "oxford-iiit-pet", ("images", "annotations/trainval.txt", "annotations/test.txt")
    )
    files: list[Path] = []
    labels: list[int] = []
    splits = {}
    for split, official in (("train", "trainval"), ("test", "test")):
        part = _open(OxfordIIITPet, base, "Oxford-IIIT Pet", official)
        splits[split] = torch.arange(len(files), len(files) + len(part))
        files += [Path(path) for path in part._images]
        labels += part._labels

    def mask(row: int) -> Tensor:
        with Image.open(base / "annotations" / "trimaps" / f"{files[row].stem}.png") as trimap:
            return torch.from_numpy(np.array(trimap)) != _BACKGROUND

    has_masks = (base / "annotations" / "trimaps").is_dir()
    return ImageSet(
        name="pets",
        files=tuple(files),
        labels=torch.tensor(labels),
        classes=tuple(part.classes),
        splits=splits,
        flips=((), (-1,)),
        notes=("Oxford-IIIT Pet (Parkhi et al., 2012), official split, CC BY-SA 4.0",),
        annotations=Annotations(masks=mask) if has_masks else None,
    )


def flowers(root: Path, cache: Path) -> ImageSet:
    """Oxford 102 Flowers: 8,189 images, in the three official splits."""
    base = base_folder(root, "flowers-102", ("jpg", "imagelabels.mat", "setid.mat"))
    files: list[Path] = []
    labels: list[int] = []
    splits = {}
    for split in ("train", "val", "test"):
        part = _open(Flowers102, base, "Oxford 102 Flowers", split)
        splits[split] = torch.arange(len(files), len(files) + len(part))
        files += [Path(path) for path in part._image_files]
        labels += [int(label) for label in part._labels]
    names = getattr(part, "classes", [f"flower {n}" for n in range(1, max(labels) + 2)])
    return ImageSet(
        name="flowers",
        files=tuple(files),
        labels=torch.tensor(labels),
        classes=tuple(names[: max(labels) + 1]),
        splits=splits,
        flips=((), (-1,)),
        notes=("Oxford 102 Flowers (Nilsback and Zisserman, 2008), official splits",),
    )


def _open(dataset, base: Path, name: str, split: str):
    folder = {OxfordIIITPet: "oxford-iiit-pet", Flowers102: "flowers-102"}[dataset]
    if base.name != folder:
        raise TrainError(f"--root must hold {name} in a folder called {folder}; got {base}")
    try:
        return dataset(base.parent, split)
    except (ValueError, KeyError, OSError, RuntimeError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise TrainError(f"--root {base.parent}: torchvision cannot read {name} there: {reason}") from error
