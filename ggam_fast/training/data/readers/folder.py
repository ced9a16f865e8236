"""Any folder of class folders."""

from __future__ import annotations

from pathlib import Path

import torch

from ggam_fast.training.data.image_set import ImageSet
from ggam_fast.training.data.readers.tree import LeftOut, images_of_classes, split_of, subfolders
from ggam_fast.training.data.splitting import drawn_test
from ggam_fast.training.errors import TrainError


def read(root: Path, cache: Path) -> ImageSet:
    """A folder of class folders, or one that holds train/ and at least one of test/ and val/.

    `tree.split_of` knows other usual names of splits. Without train/, a fifth of every class becomes the test
    split, with at least one image of each. With train/ but without test/, val/ is the test split.

    Raises:
        TrainError: class folders are missing or empty, there is only one, or the splits' classes differ.
    """
    left_out = LeftOut()
    if not has_splits(root):
        return _drawn(root, left_out)
    found = _split_folders(root)
    if len(found) == 1:
        raise TrainError(
            f"--root {root} has {found['train'].name}/, so it must have one of test/, val/ and valid/ too; "
            "it has none"
        )
    for folder in subfolders(root, left_out):
        if folder not in found.values():
            left_out.add(LeftOut.FOLDERS, folder)
    if "test" not in found:
        found["test"] = found.pop("val")
    parts = {name: images_of_classes(path, left_out) for name, path in found.items()}
    classes = list(parts["train"])
    files: list[Path] = []
    labels: list[int] = []
    splits = {}
    for name, part in parts.items():
        strangers = sorted(set(part) - set(classes))
        if strangers:
            raise TrainError(f"{found[name]} has class {strangers[0]}, which {found['train'].name}/ lacks")
        start = len(files)
        for class_name, paths in part.items():
            files += paths
            labels += [classes.index(class_name)] * len(paths)
        splits[name] = torch.arange(start, len(files))
    where = ", ".join(f"{name} ({path.name}/)" for name, path in sorted(found.items()))
    return ImageSet(
        name=root.resolve().name,
        files=tuple(files),
        labels=torch.tensor(labels),
        classes=tuple(classes),
        splits=splits,
        flips=((), (-1,)),
        notes=(f"splits: {where}", *left_out.notes()),
    )


def has_splits(root: Path) -> bool:
    """Whether `root` holds a folder of training images, which itself holds folders."""
    train = _split_folders(root).get("train")
    return train is not None and bool(subfolders(train))


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders of splits in `root`, by the split, train first."""
    found: dict[str, Path] = {}
    for folder in subfolders(root):
        split = split_of(folder.name)
        if split is None:
            continue
        if split in found:
            raise TrainError(
                f"--root {root} must hold one folder for the {split} split; it holds {found[split].name}/ "
                f"and {folder.name}/"
            )
        found[split] = folder
    return {split: found[split] for split in ("train", "test", "val") if split in found}


def _drawn(root: Path, left_out: LeftOut) -> ImageSet:
    """The set of class folders without splits. A fifth of every class is drawn for the test split."""
    found = images_of_classes(root, left_out)
    if all(split_of(name) for name in found):
        raise TrainError(
            f"--root {root} holds {', '.join(found)}, which look like splits and not like classes; "
            "splits must be train/ and beside it test/ or val/, and hold a folder for each class"
        )
    classes = tuple(found)
    labels = torch.tensor([index for index, paths in enumerate(found.values()) for _ in paths])

    note = (
        "without train/ and test/ folders, a fifth of every class is held out at random for testing. Every "
        "run holds out the same images unless files are added or removed. If groups of your images look "
        "alike, split them by group with --split-by"
    )
    files = tuple(path for paths in found.values() for path in paths)
    return ImageSet(
        name=root.resolve().name,
        files=files,
        labels=labels,
        classes=classes,
        splits=drawn_test(files, labels),
        flips=((), (-1,)),
        notes=(note, *left_out.notes()),
        draw=drawn_test,
    )
