"""Any folder of class folders."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import ImageFolder  # type: ignore[import-untyped]
from torchvision.datasets.folder import IMG_EXTENSIONS  # type: ignore[import-untyped]

from ggam_fast.training.data.image_set import ImageSet
from ggam_fast.training.errors import TrainError, first_line

_HOLDOUTS = ("test", "val", "valid")
# The held-out images do not depend on --seed.
_SPLIT_SEED = 0


def read(root: Path, cache: Path) -> ImageSet:
    """A folder of class folders, or one that holds train/ and at least one of test/, val/, valid/.

    Without train/, a fifth of every class becomes the test split, with at least one image of each. With
    train/ but without test/, the folder val/ or valid/ is the test split.

    Raises:
        TrainError: class folders are missing or empty, there is only one, or the splits' classes differ.
    """
    if not (root / "train").is_dir():
        return _stratified(root)
    held = {name: root / name for name in _HOLDOUTS if (root / name).is_dir()}
    if not held:
        raise TrainError(
            f"--root {root} has train/, so it must have one of test/, val/ and valid/ too; it has none"
        )
    if "valid" in held:
        held.setdefault("val", held.pop("valid"))
    if "test" not in held:
        held["test"] = held.pop("val")
    parts = {"train": _scan(root / "train")} | {name: _scan(path) for name, path in held.items()}
    classes = parts["train"].classes
    files: list[Path] = []
    labels: list[int] = []
    splits = {}
    for name, part in parts.items():
        strangers = sorted(set(part.classes) - set(classes))
        if strangers:
            raise TrainError(f"{part.root} has class {strangers[0]}, which train/ lacks")
        splits[name] = torch.arange(len(files), len(files) + len(part.samples))
        files += [Path(path) for path, _ in part.samples]
        labels += [classes.index(part.classes[label]) for _, label in part.samples]
    notes = [f"splits: {', '.join(sorted(splits))}", *_left_out([root / "train", *held.values()])]
    return _folder_set(root, files, labels, classes, splits, notes)


def _stratified(root: Path) -> ImageSet:
    images = _scan(root)
    if all(name.lower() in ("train", *_HOLDOUTS) for name in images.classes):
        raise TrainError(
            f"--root {root} holds {', '.join(images.classes)}, which look like splits and not like classes; "
            "splits must be train/ and beside it test/, val/ or valid/"
        )
    labels = torch.tensor(images.targets)
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    train, test = [], []
    for index, name in enumerate(images.classes):
        rows = (labels == index).nonzero().flatten()
        if len(rows) < 2:
            raise TrainError(
                f"{root / name} must hold two or more images, to train and to test; it holds one"
            )
        rows = rows[torch.randperm(len(rows), generator=generator)]
        held = max(1, len(rows) // 5)
        test.append(rows[:held])
        train.append(rows[held:])
    splits = {"train": torch.cat(train).sort().values, "test": torch.cat(test).sort().values}
    files = [Path(path) for path, _ in images.samples]
    note = (
        "without train/ and test/ folders, a fifth of every class is held out at random for testing. Every "
        "run holds out the same images unless files are added or removed. If groups of your images look "
        "alike, split them by group"
    )
    notes = [note, *_left_out([root])]
    return _folder_set(root, files, images.targets, images.classes, splits, notes)


def _folder_set(
    root: Path,
    files: list[Path],
    labels: list[int],
    classes: list[str],
    splits: dict[str, Tensor],
    notes: list[str],
) -> ImageSet:
    return ImageSet(
        name=root.resolve().name,
        files=tuple(files),
        labels=torch.tensor(labels),
        classes=tuple(classes),
        splits=splits,
        flips=((), (-1,)),
        notes=tuple(notes),
    )


class _Folder(ImageFolder):
    """Class folders. Names that begin with a dot are left out."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        found, _ = super().find_classes(directory)
        classes = [name for name in found if not name.startswith(".")]
        for name in classes:
            if name != name.encode(errors="replace").decode():
                raise TrainError(f"{directory} holds the class {name!r}; names must be UTF-8")
        return classes, {name: index for index, name in enumerate(classes)}


def _left_out(roots: list[Path]) -> list[str]:
    """A note that counts the files in class folders without an image's file name, if there are any."""
    named = [(root, path) for root in roots for path in root.glob("*/**/*")]
    others = sorted(
        path
        for root, path in named
        if path.suffix.lower() not in IMG_EXTENSIONS
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and path.is_file()
    )
    if not others:
        return []
    return [f"files left out because their names are not those of images: {len(others)}, such as {others[0]}"]


def _scan(root: Path) -> ImageFolder:
    try:
        return _Folder(root)
    except OSError as error:  # torchvision names the folder or the empty class
        raise TrainError(f"{root}: {first_line(error)}") from error
