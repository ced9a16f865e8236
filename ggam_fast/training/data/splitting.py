"""Draw splits: a share of every class, and no group of images in two splits."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ggam_fast.training.data.image_set import ImageSet
from ggam_fast.training.errors import TrainError

Groups = Mapping[Path, str]

TEST_SHARE = 0.2
# The held-out images do not depend on --seed.
_TEST_SEED, _VAL_SEED = 0, 1


def drawn_test(files: tuple[Path, ...], labels: Tensor, groups: Groups | None = None) -> dict[str, Tensor]:
    """A fifth of every class for testing, and the rest for training.

    A class whose images are all in one group is trained and not tested.

    Raises:
        TrainError: a class has fewer than two images.
    """
    rows = torch.arange(len(labels))
    held = _held(rows, labels, _groups_of(files, groups), TEST_SHARE, _TEST_SEED)
    for label in labels.unique().tolist():
        of_class = (labels == label).nonzero().flatten()
        if len(of_class) < 2:
            folder = os.path.commonpath([files[int(row)].parent for row in of_class])
            raise TrainError(
                f"{folder} must hold two or more images, to train and to test; it holds one that can be read"
            )
    return {"train": rows[~held], "test": rows[held]}


def with_validation(images: ImageSet, share: float, groups: Groups | None = None) -> ImageSet:
    """The set with a validation split: this share of the training images of every class.

    Raises:
        TrainError: the set has a validation split, or the share is less than one image of every class.
    """
    if "val" in images.splits:
        raise TrainError(
            f"--val-fraction {share:g} is for data without a validation split; {images.name} has one of "
            f"{len(images.splits['val'])} images"
        )
    draw_others = images.draw or fixed(images)

    def draw(files: tuple[Path, ...], labels: Tensor) -> dict[str, Tensor]:
        others = draw_others(files, labels)
        train = others["train"]
        of_rows = _groups_of([files[row] for row in train.tolist()], groups)
        held = _held(train, labels[train], of_rows, share, _VAL_SEED)
        if not held.any():
            raise TrainError(
                f"--val-fraction {share:g} leaves no image for validation, because {images.name} has too few "
                "training images of every class, or too few groups"
            )
        return {"train": train[~held], "val": train[held], "test": others["test"]}

    note = (
        f"the validation split is {100 * share:g} % of the training images of each class, drawn at random. "
        "Every run draws the same images unless files are added or removed"
    )
    splits = draw(images.files, images.labels)
    return replace(images, splits=splits, draw=draw, notes=(*images.notes, note))


def fixed(images: ImageSet) -> Callable[[tuple[Path, ...], Tensor], dict[str, Tensor]]:
    """A function that gives each file of the set its split, also in a set without some of them."""
    split_of = {images.files[row]: name for name, rows in images.splits.items() for row in rows.tolist()}

    def draw(files: tuple[Path, ...], labels: Tensor) -> dict[str, Tensor]:
        names = [split_of.get(path) for path in files]
        return {
            name: torch.tensor([row for row, one in enumerate(names) if one == name], dtype=torch.int64)
            for name in images.splits
        }

    return draw


def _groups_of(files: tuple[Path, ...] | list[Path], groups: Groups | None) -> list[str] | None:
    return None if groups is None else [groups[path] for path in files]


def _held(rows: Tensor, labels: Tensor, groups: list[str] | None, share: float, seed: int) -> Tensor:
    """Which of `rows` are held out, (n,) bool. A class with one image or one group keeps it for training."""
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(rows), dtype=torch.bool)
    if groups is not None:
        held[_held_groups(labels, groups, share, generator)] = True
        return held
    for label in labels.unique().tolist():
        of_class = (labels == label).nonzero().flatten()
        of_class = of_class[torch.randperm(len(of_class), generator=generator)]
        if len(of_class) > 1:
            # 1e-9: a fifth of 10 images is 2, whatever the last bit of 0.2 is.
            held[of_class[: min(len(of_class) - 1, max(1, int(share * len(of_class) + 1e-9)))]] = True
    return held


def _held_groups(labels: Tensor, groups: list[str], share: float, generator: torch.Generator) -> list[int]:
    """Places of whole groups that hold about this share of every class.

    Groups are taken in a random order, large ones first. A group is held out if that brings the counts of the
    classes nearer to their share, and every class keeps a group for training.
    """
    places: defaultdict[str, list[int]] = defaultdict(list)
    for place, group in enumerate(groups):
        places[group].append(place)
    names = sorted(places)
    order = [names[index] for index in torch.randperm(len(names), generator=generator).tolist()]
    order.sort(key=lambda name: -len(places[name]))
    classes = int(labels.max()) + 1
    counts = {name: torch.bincount(labels[places[name]], minlength=classes) for name in names}
    left = torch.bincount(labels, minlength=classes)
    wanted = share * left
    got = torch.zeros(classes)
    held: list[int] = []
    for name in order:
        count = counts[name]
        nearer = ((got + count - wanted) ** 2).sum() < ((got - wanted) ** 2).sum()
        if nearer and bool(((left - count > 0) | (count == 0)).all()):
            got, left = got + count, left - count
            held += places[name]
    return held
