"""Labelled image files with fixed splits: elpv, and any folder of class folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder  # type: ignore[import-untyped]
from torchvision.transforms import v2  # type: ignore[import-untyped]

from ggam_fast.training.config import DataConfig
from ggam_fast.training.errors import TrainError


@dataclass(frozen=True)
class ImageSet:
    """Image files, their labels and the rows of each split.

    `files`: N paths. `labels`: (N,) int64 in [0, len(classes)). `splits`: row numbers (int64) of
    "train", "test" and, where there is one, "val". `flips`: the mirrorings that leave the label
    as it is, as sets of axes. `notes`: what a user must know, a line each.
    """

    name: str
    files: tuple[Path, ...]
    labels: Tensor
    classes: tuple[str, ...]
    splits: dict[str, Tensor]
    flips: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...]

    def summary(self) -> str:
        splits = ", ".join(f"{len(rows)} {name}" for name, rows in self.splits.items())
        return f"{len(self.files)} images ({splits}), {len(self.classes)} classes"

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise TrainError(f"{self.name} has one class ({self.classes[0]}); a classifier needs two or more")
        missing = set(range(len(self.classes))) - set(self.labels[self.splits["train"]].tolist())
        if missing:
            names = ", ".join(self.classes[index] for index in sorted(missing))
            raise TrainError(f"{self.name} has no training image of class {names}")
        if len(self.splits["train"]) < 2:
            raise TrainError(f"{self.name} has fewer than two training images")


# Modules of 60 cells are the commonest in elpv: cell types change at rows 60, 360, 540 and 900.
ELPV_BLOCK = 120
# Of the 22 blocks: the choice, of those with a fifth to a quarter of the rows in each split,
# whose class shares are closest to those of the whole set.
ELPV_VAL_BLOCKS = (0, 9, 13, 16, 19)
ELPV_TEST_BLOCKS = (2, 4, 10, 15, 18)
_ELPV_TYPES = ("mono", "poly")


def elpv() -> ImageSet:
    """Electroluminescence photographs of 2,624 solar cells: 4 defect grades x 2 cell types.

    The grade is how likely an expert thought a defect: 0, 33, 67 or 100 %. The set has no boxes
    and no masks.

    It is split by blocks of consecutive rows, never at random: neighbouring rows come from the
    same solar module and look alike. For 88 % of the images the nearest neighbour in feature
    space lies within 82 rows, so a random split would test on what was trained on. With these
    blocks 10 % of the test images have their nearest neighbour in the training split, with a
    random split of three quarters 74 %.
    """
    try:
        import elpv_dataset
    except ImportError as error:
        raise TrainError("--data elpv needs its package: pip install elpv-dataset") from error
    folder = Path(elpv_dataset.__file__).parent / "data"
    rows = [line.split() for line in (folder / "labels.csv").read_text().splitlines()]
    grades = torch.tensor([round(3 * float(probability)) for _, probability, _ in rows])
    types = torch.tensor([_ELPV_TYPES.index(cell_type) for _, _, cell_type in rows])
    block = torch.arange(len(rows)) // ELPV_BLOCK
    val = torch.isin(block, torch.tensor(ELPV_VAL_BLOCKS))
    test = torch.isin(block, torch.tensor(ELPV_TEST_BLOCKS))
    return ImageSet(
        name="elpv",
        files=tuple(folder / path for path, _, _ in rows),
        labels=4 * types + grades,
        classes=tuple(f"{kind} {grade} %" for kind in _ELPV_TYPES for grade in (0, 33, 67, 100)),
        splits={
            name: mask.nonzero().flatten()
            for name, mask in (("train", ~(val | test)), ("val", val), ("test", test))
        },
        flips=((), (-1,), (-2,), (-2, -1)),
        notes=(
            "elpv-dataset: Buerhop-Lutz, Deitsch et al., licence CC BY-NC-SA 4.0 "
            "(attribution, no commercial use, share alike)",
            f"split by blocks of {ELPV_BLOCK} consecutive rows: neighbouring rows show the same solar module",
        ),
    )


_HOLDOUTS = ("test", "val", "valid")
# The same images are held out whatever --seed is.
_SPLIT_SEED = 0


def image_folder(root: Path | None) -> ImageSet:
    """A folder of class folders, or one that holds train/ and at least one of test/, val/, valid/.

    Without such folders a fifth of every class, at least one image, is held out as the test
    split. With only a val/ or valid/ folder, that is the test split.

    Raises:
        TrainError: no such folder, no or empty class folders, one class, classes that differ.
    """
    if root is None:
        raise TrainError("--data folder needs --root DIR, a folder of class folders")
    root = Path(root)
    if not root.is_dir():
        raise TrainError(f"--root {root} is not a folder")
    if not (root / "train").is_dir():
        return _stratified(root)
    held = {name: root / name for name in _HOLDOUTS if (root / name).is_dir()}
    if not held:
        raise TrainError(f"--root {root} has train/ but none of test/, val/ and valid/")
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
            raise TrainError(f"{part.root} has class {strangers[0]}, which train/ has not")
        splits[name] = torch.arange(len(files), len(files) + len(part.samples))
        files += [Path(path) for path, _ in part.samples]
        labels += [classes.index(part.classes[label]) for _, label in part.samples]
    return _folder_set(root, files, labels, classes, splits, f"splits: {', '.join(sorted(splits))}")


def _stratified(root: Path) -> ImageSet:
    images = _scan(root)
    labels = torch.tensor(images.targets)
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    train, test = [], []
    for index, name in enumerate(images.classes):
        rows = (labels == index).nonzero().flatten()
        if len(rows) < 2:
            raise TrainError(f"{root / name} holds one image; two are needed to train and to test")
        rows = rows[torch.randperm(len(rows), generator=generator)]
        held = max(1, len(rows) // 5)
        test.append(rows[:held])
        train.append(rows[held:])
    splits = {"train": torch.cat(train).sort().values, "test": torch.cat(test).sort().values}
    files = [Path(path) for path, _ in images.samples]
    note = (
        "no train/ and test/ folders: a fifth of every class is held out at random, the same "
        "images in every run; if your images come in groups that look alike, split by group"
    )
    return _folder_set(root, files, images.targets, images.classes, splits, note)


def _folder_set(
    root: Path,
    files: list[Path],
    labels: list[int],
    classes: list[str],
    splits: dict[str, Tensor],
    note: str,
) -> ImageSet:
    return ImageSet(
        name=root.resolve().name,
        files=tuple(files),
        labels=torch.tensor(labels),
        classes=tuple(classes),
        splits=splits,
        flips=((), (-1,)),
        notes=(note,),
    )


def _scan(root: Path) -> ImageFolder:
    try:
        return ImageFolder(root)
    except OSError as error:  # torchvision names the folder or the empty class
        raise TrainError(f"{root}: {str(error).splitlines()[0]}") from error


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Decoded, transformed images of some rows of an `ImageSet`, once for each of `flips`."""

    def __init__(
        self,
        images: ImageSet,
        split: str,
        transform: Callable[[Image.Image], Tensor],
        flips: Sequence[tuple[int, ...]] = ((),),
    ) -> None:
        rows = images.splits[split].tolist()
        self.items = [(images.files[row], flip) for flip in flips for row in rows]
        self.labels = images.labels[images.splits[split]].repeat(len(flips))
        self.transform = transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, flip = self.items[index]
        image = self.transform(read_image(path))
        return image.flip(flip) if flip else image, int(self.labels[index])


def read_image(path: Path) -> Image.Image:
    """The image at `path` in RGB.

    Raises:
        TrainError: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise TrainError(f"cannot read image {path}: not an image file") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise TrainError(f"cannot read image {path}: {error}") from error


def eval_transform(
    size: int, mean: Sequence[float], std: Sequence[float], resize: int | None = None
) -> Callable[[Image.Image], Tensor]:
    """Shorter side to `resize` (by default `size`), centre crop, normalise: (3, size, size) float32."""
    return v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(resize or size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(size),
            *_normalise(mean, std),
        ]
    )


def train_transform(
    images: ImageSet, size: int, mean: Sequence[float], std: Sequence[float], resize: int | None = None
) -> Callable[[Image.Image], Tensor]:
    """Random crop, the mirrorings of `images`, normalise. The crop is half to all of the image, or with
    `resize` a square of `size` from the image with its shorter side brought to `resize`."""
    sampling = {"interpolation": v2.InterpolationMode.BICUBIC, "antialias": True}
    crop = (
        [v2.Resize(resize, **sampling), v2.RandomCrop(size)]
        if resize
        else [v2.RandomResizedCrop(size, scale=(0.5, 1.0), **sampling)]
    )
    mirror = [v2.RandomHorizontalFlip()] if (-1,) in images.flips else []
    mirror += [v2.RandomVerticalFlip()] if (-2,) in images.flips else []
    return v2.Compose(
        [
            v2.PILToTensor(),
            *crop,
            *mirror,
            *_normalise(mean, std),
        ]
    )


def _normalise(mean: Sequence[float], std: Sequence[float]) -> list[v2.Transform]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]


def workers(config: DataConfig, device: torch.device) -> int:
    """Decoding processes. On the CPU decoding is a small share of the work on the same cores."""
    if config.workers is not None:
        return config.workers
    return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)
