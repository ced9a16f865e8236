"""Caltech-UCSD Birds-200-2011 in its official layout, with boxes and parts."""

from __future__ import annotations

from pathlib import Path

import torch

from ggam_fast.training.annotations import Annotations
from ggam_fast.training.data import ImageSet
from ggam_fast.training.errors import TrainError
from ggam_fast.training.readers import folder as image_folder
from ggam_fast.training.readers.layout import base_folder, lines, numbered, rows_of

_FILES = ("images.txt", "image_class_labels.txt", "classes.txt", "train_test_split.txt", "bounding_boxes.txt")
_PARTS = ("parts/parts.txt", "parts/part_locs.txt")


def read(root: Path, cache: Path) -> ImageSet:
    """The 11,788 birds of 200 species with the official split; or train/ and test/ folders of them."""
    if (root / "train").is_dir():
        return image_folder.read(root, cache)
    base = base_folder(root, "CUB_200_2011", ("images", *_FILES))
    paths = numbered(base / "images.txt")
    ids = sorted(paths)
    classes = numbered(base / "classes.txt")
    label = numbered(base / "image_class_labels.txt")
    train = numbered(base / "train_test_split.txt")
    boxes = {int(row[0]): [float(value) for value in row[1:5]] for row in map(str.split, _lines(base, 4))}
    for name, table in zip(_FILES[1:], (label, None, train, boxes), strict=True):
        if table is not None and set(table) != set(ids):
            raise TrainError(f"{base / name} is not about the images that images.txt lists")
    strangers = {int(number) for number in label.values()} - set(classes)
    if strangers:
        raise TrainError(f"{base / _FILES[1]}: class {min(strangers)} is not in classes.txt")
    order = sorted(classes)
    xywh = torch.tensor([boxes[i] for i in ids])
    split_of_row = ["train" if train[i] == "1" else "test" for i in ids]
    names, parts = _parts(base, ids)
    return ImageSet(
        name="cub",
        files=tuple(base / "images" / paths[i] for i in ids),
        labels=torch.tensor([order.index(int(label[i])) for i in ids]),
        classes=tuple(classes[number] for number in order),
        splits={name: rows_of(split_of_row, name) for name in ("train", "test")},
        flips=((), (-1,)),
        notes=("CUB-200-2011 (Wah et al., 2011), official split",),
        annotations=Annotations(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1), parts, names),
    )


def _lines(base: Path, values: int) -> list[str]:
    path = base / "bounding_boxes.txt"
    found = lines(path)
    for line in found:
        if len(line.split()) != values + 1:
            raise TrainError(f"{path}: expected an image and {values} numbers; got {line!r}")
    return found


def _parts(base: Path, ids: list[int]) -> tuple[tuple[str, ...], torch.Tensor | None]:
    if not all((base / path).is_file() for path in _PARTS):
        return (), None
    names = numbered(base / _PARTS[0])
    row, column = {i: n for n, i in enumerate(ids)}, {i: n for n, i in enumerate(sorted(names))}
    parts = torch.zeros(len(ids), len(names), 3)
    for line in lines(base / _PARTS[1]):
        image, part, x, y, visible = line.split()
        if int(image) not in row or int(part) not in column:
            raise TrainError(f"{base / _PARTS[1]}: no such image or part: {line!r}")
        parts[row[int(image)], column[int(part)]] = torch.tensor([float(x), float(y), float(visible)])
    return tuple(names[i] for i in sorted(names)), parts
