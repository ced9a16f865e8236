"""Caltech-UCSD Birds-200-2011 in its official layout, with boxes and parts."""

from __future__ import annotations

from pathlib import Path

import torch

from ggam_fast.training.data.annotations import Annotations
from ggam_fast.training.data.image_set import ImageSet
from ggam_fast.training.data.readers import folder as image_folder
from ggam_fast.training.data.readers.layout import base_folder, lines, numbered, rows_of
from ggam_fast.training.errors import TrainError

_FILES = ("images.txt", "image_class_labels.txt", "classes.txt", "train_test_split.txt", "bounding_boxes.txt")
_PARTS = ("parts/parts.txt", "parts/part_locs.txt")


def read(root: Path, cache: Path) -> ImageSet:
    """The 11,788 birds of 200 species, in the official split or in train/ and test/ folders."""
    if image_folder.has_splits(root):
        return image_folder.read(root, cache)
    base = base_folder(root, "CUB_200_2011", ("images", *_FILES))
    paths = numbered(base / "images.txt")
    ids = sorted(paths)
    classes = numbered(base / "classes.txt")
    label = numbered(base / "image_class_labels.txt")
    train = numbered(base / "train_test_split.txt")
    boxes = {int(image): numbers for image, *numbers in _table(base / "bounding_boxes.txt", 5)}
    for name, table in zip(_FILES[1:], (label, None, train, boxes), strict=True):
        if table is not None and set(table) != set(ids):
            raise TrainError(
                f"{base / name} must have a line for each image in images.txt; it lacks some or has others"
            )
    order = sorted(classes)
    position = {str(number): n for n, number in enumerate(order)}
    strangers = set(label.values()) - set(position)
    if strangers:
        raise TrainError(f"{base / _FILES[1]} has class {min(strangers)}, which is not in classes.txt")
    xywh = torch.tensor([boxes[i] for i in ids])
    split_of_row = ["train" if train[i] == "1" else "test" for i in ids]
    names, parts = _parts(base, ids)
    return ImageSet(
        name="cub",
        files=tuple(base / "images" / paths[i] for i in ids),
        labels=torch.tensor([position[label[i]] for i in ids]),
        classes=tuple(classes[number] for number in order),
        splits={name: rows_of(split_of_row, name) for name in ("train", "test")},
        flips=((), (-1,)),
        notes=("CUB-200-2011 (Wah et al., 2011), official split",),
        annotations=Annotations(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1), parts, names),
    )


def _table(path: Path, columns: int) -> list[list[float]]:
    rows = []
    for line in lines(path):
        try:
            row = [float(value) for value in line.split()]
        except ValueError:
            row = []
        if len(row) != columns:
            raise TrainError(f"{path}: expected {columns} numbers; got {line!r}")
        rows.append(row)
    return rows


def _parts(base: Path, ids: list[int]) -> tuple[tuple[str, ...], torch.Tensor | None]:
    if not all((base / path).is_file() for path in _PARTS):
        return (), None
    names = numbered(base / _PARTS[0])
    row, column = {i: n for n, i in enumerate(ids)}, {i: n for n, i in enumerate(sorted(names))}
    parts = torch.zeros(len(ids), len(names), 3)
    for image, part, *seen in _table(base / _PARTS[1], 5):
        if image not in row or part not in column:
            raise TrainError(f"{base / _PARTS[1]} names an unknown image or part: {image:g} {part:g}")
        parts[row[int(image)], column[int(part)]] = torch.tensor(seen)
    return tuple(names[i] for i in sorted(names)), parts
