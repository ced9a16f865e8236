"""A folder of images with a table that says which images there are, their classes, splits and groups."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ggam_fast.training.data.image_set import ImageSet
from ggam_fast.training.data.readers.layout import lines
from ggam_fast.training.data.readers.tree import is_hidden, is_image, split_of
from ggam_fast.training.data.splitting import Groups, drawn_test
from ggam_fast.training.errors import TrainError

_COLUMNS = ("path", "label", "split", "group")


def read(root: Path, table: Path) -> tuple[ImageSet, Groups | None]:
    """The images that a CSV file names, and the group of each if the file has groups.

    Columns: `path`, below `root` or absolute; `label`, by default the first folder of the path below the
    root; `split`, a name that `tree.split_of` knows, by default drawn; `group`, which keeps its images in one
    split. Other columns are not read.

    Raises:
        TrainError: the file cannot be read, a row lacks a value, or a group is in two splits.
    """
    rows = _rows(table)
    given = [column for column in _COLUMNS if column in rows[0]]
    files, labels, splits, groups = [], [], [], {}
    number_of: dict[Path, int] = {}
    for number, row in enumerate(rows, 2):
        where = f"--split-by {table}, row {number}"
        for column in given:
            if not row[column]:
                raise TrainError(f"{where} has no {column}")
        path = Path(os.path.normpath(root / row["path"]))
        if number_of.setdefault(path, number) != number:
            raise TrainError(f"{where} names {row['path']} again, after row {number_of[path]}")
        files.append(path)
        labels.append(row["label"] if "label" in given else _folder_of(path, root, where))
        if "split" in given:
            split = split_of(row["split"])
            if split is None:
                raise TrainError(f"{where} has the split {row['split']}; it must be train, val or test")
            splits.append(split)
        if "group" in given:
            groups[path] = row["group"]
    classes = tuple(sorted(set(labels)))
    numbers = torch.tensor([classes.index(label) for label in labels])
    group_of = groups if "group" in given else None
    draw = None
    if splits:
        parts = _parts(table, splits)
        _check_groups(table, files, splits, groups)
        how = f"splits: as {table.name} says"
    else:

        def draw(files: tuple[Path, ...], labels: Tensor) -> dict[str, Tensor]:
            return drawn_test(files, labels, group_of)

        parts = draw(tuple(files), numbers)
        how = "a fifth of every class is held out at random for testing" + (
            ", and no group is in two splits" if group_of is not None else ""
        )
    others = _others(root, number_of)
    images = ImageSet(
        name=root.resolve().name,
        files=tuple(files),
        labels=numbers,
        classes=classes,
        splits=parts,
        flips=((), (-1,)),
        notes=(how, *([f"images that {table.name} does not name: {others}"] if others else [])),
        draw=draw,
    )
    return images, group_of


def _rows(table: Path) -> list[dict[str, str]]:
    reader = csv.reader(lines(table))
    try:
        header, *values = list(reader)
    except (csv.Error, ValueError) as error:
        raise TrainError(f"--split-by {table} must be a CSV file with a line of column names") from error
    names = [name.strip().casefold() for name in header]
    if "path" not in names:
        raise TrainError(
            f"--split-by {table} must have a column path, and may have label, split and group; it has "
            f"{', '.join(names)}"
        )
    if not values:
        raise TrainError(f"--split-by {table} names no image")
    for number, row in enumerate(values, 2):
        if len(row) != len(names):
            raise TrainError(f"--split-by {table}, row {number} has {len(row)} columns and not {len(names)}")
    return [dict(zip(names, (value.strip() for value in row), strict=True)) for row in values]


def _folder_of(path: Path, root: Path, where: str) -> str:
    parts = path.relative_to(root).parts if path.is_relative_to(root) else ()
    if len(parts) < 2:
        raise TrainError(f"{where}: {path} is in no class folder of --root, so the file needs a column label")
    return parts[0]


def _parts(table: Path, splits: list[str]) -> dict[str, Tensor]:
    if "test" not in splits:  # as in folders
        splits = ["test" if split == "val" else split for split in splits]
    for needed in ("train", "test"):
        if needed not in splits:
            raise TrainError(
                f"--split-by {table} must name images for train and for test; none is for {needed}"
            )
    return {
        name: torch.tensor([row for row, split in enumerate(splits) if split == name])
        for name in ("train", "test", "val")
        if name in splits
    }


def _check_groups(table: Path, files: list[Path], splits: list[str], groups: Groups) -> None:
    seen: dict[str, str] = {}
    for path, split in zip(files, splits, strict=True):
        group = groups.get(path)
        if group is not None and seen.setdefault(group, split) != split:
            raise TrainError(
                f"--split-by {table} has images of group {group} for {seen[group]} and for {split}; a group "
                "must be in one split"
            )


def _others(root: Path, named: Mapping[Path, int]) -> int:
    """Number of images below the root that are not named."""
    count = 0
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not is_hidden(name)]
        count += sum(is_image(name) and Path(folder, name) not in named for name in files)
    return count
