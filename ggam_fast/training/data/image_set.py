"""Labelled image files with fixed splits, and their transforms to tensors."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2  # type: ignore[import-untyped]

from ggam_fast.training.config.options import DataConfig
from ggam_fast.training.data.annotations import Annotations
from ggam_fast.training.errors import TrainError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSet:
    """Image files, their labels and the rows of each split.

    `files`: N paths. `labels`: (N,) int64 in [0, len(classes)). `splits`: row numbers (int64) of "train",
    "test" and, if there is one, "val". A set for tests alone has only "test". `flips`: mirrorings that do not
    change the label, as sets of axes. `notes`: lines that a user must know. `banner`: height in pixels of the
    strip that is cut off at the bottom of every image. `annotations` refer to the image without that strip.
    `draw`: draws the splits from files and labels, if the data set does not fix them.
    """

    name: str
    files: tuple[Path, ...]
    labels: Tensor
    classes: tuple[str, ...]
    splits: dict[str, Tensor]
    flips: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...]
    annotations: Annotations | None = None
    banner: int = 0
    draw: Callable[[tuple[Path, ...], Tensor], dict[str, Tensor]] | None = None

    def read(self, row: int) -> Image.Image:
        """The image of a row, in RGB.

        Raises:
            TrainError: the image cannot be read.
        """
        return read_image(self.files[row], self.banner)

    def cropped(self, banner: int) -> ImageSet:
        """The same images without their lowest `banner` pixels."""
        note = f"the lowest {banner} pixels of every image are cut off"
        return replace(self, banner=banner, notes=(*self.notes, note))

    def with_splits(self, splits: dict[str, Tensor], note: str) -> ImageSet:
        """The same images in other splits, with a note that says so."""
        return replace(self, splits=splits, notes=(*self.notes, note), draw=None)

    def without(self, rows: Sequence[int]) -> ImageSet:
        """The set without some rows. If the data set does not fix its splits, they are drawn anew.

        Raises:
            TrainError: too few images are left for training.
        """
        gone = set(rows)
        kept = [row for row in range(len(self.files)) if row not in gone]
        new = {row: index for index, row in enumerate(kept)}
        labels = self.labels[torch.tensor(kept, dtype=torch.int64)]
        files = tuple(self.files[row] for row in kept)
        return replace(
            self,
            files=files,
            labels=labels,
            splits=self.draw(files, labels)
            if self.draw is not None
            else {
                name: torch.tensor([new[row] for row in part.tolist() if row in new], dtype=torch.int64)
                for name, part in self.splits.items()
            },
            annotations=None if self.annotations is None else self.annotations.of(kept),
        )

    def digest(self, sizes: bool = False) -> str:
        """A hash that changes if an image is added, removed or moved to another split or class.

        It covers the classes and, for each split, the labels and the paths below the common folder. With
        `sizes` it also covers the size of each file.
        """
        files = [path.absolute() for path in self.files]
        root = os.path.commonpath([path.parent for path in files])
        parts = {
            name: [
                (
                    os.path.relpath(self.files[row], root),
                    _size(self.files[row]) if sizes else 0,
                    int(self.labels[row]),
                )
                for row in rows.tolist()
            ]
            for name, rows in self.splits.items()
        }
        text = json.dumps([self.classes, sorted(parts.items())])
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def log_notes(self, heading: str) -> None:
        """Log `heading`, and below it the notes on these images."""
        logger.info(heading)
        for line in self.notes:
            logger.info(f"  {line}")

    def summary(self) -> str:
        splits = ", ".join(f"{len(rows)} {name}" for name, rows in self.splits.items())
        return f"{len(self.files)} images ({splits}), {len(self.classes)} classes"

    def __post_init__(self) -> None:
        empty = [name for name, rows in self.splits.items() if not len(rows)]
        if empty:
            raise TrainError(f"{self.name} needs images in every split; its {empty[0]} split has none")
        if len(self.classes) < 2:
            raise TrainError(f"{self.name} needs two or more classes; it has only {self.classes[0]}")
        if "train" not in self.splits:  # a set for tests alone
            return
        missing = set(range(len(self.classes))) - set(self.labels[self.splits["train"]].tolist())
        if missing:
            names = ", ".join(self.classes[index] for index in sorted(missing))
            raise TrainError(f"{self.name} needs training images of every class; it has none of {names}")
        if len(self.splits["train"]) < 2:
            raise TrainError(f"{self.name} needs two or more training images; it has fewer")


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Decoded and transformed images of some rows of an `ImageSet`, once for each of `flips`."""

    def __init__(
        self,
        images: ImageSet,
        split: str,
        transform: Callable[[Image.Image], Tensor],
        flips: Sequence[tuple[int, ...]] = ((),),
    ) -> None:
        rows = images.splits[split].tolist()
        self.items = [(images.files[row], flip) for flip in flips for row in rows]
        self.banner = images.banner
        self.labels = images.labels[images.splits[split]].repeat(len(flips))
        self.transform = transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, flip = self.items[index]
        image = self.transform(read_image(path, self.banner))
        return image.flip(flip) if flip else image, int(self.labels[index])


def read_image(path: Path, banner: int = 0) -> Image.Image:
    """The image at `path` in RGB, without its lowest `banner` pixels.

    Raises:
        TrainError: the image cannot be read.
    """
    try:
        with Image.open(path) as image:
            return without_banner(_eight_bits(image).convert("RGB"), banner)
    except FileNotFoundError as error:
        raise TrainError(f"cannot read image {path}: no such file") from error
    except UnidentifiedImageError as error:
        raise TrainError(f"cannot read image {path}: not an image file") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise TrainError(f"cannot read image {path}: {error}") from error


def without_banner(image: Image.Image, banner: int) -> Image.Image:
    """The image without its lowest `banner` pixels."""
    return image.crop((0, 0, image.width, image.height - banner)) if banner else image


def check_depth(image: Image.Image) -> None:
    """Raise a ValueError for 32-bit pixels. Their range is unknown, and Pillow would clip them at 255."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise ValueError(f"it has 32 bits a pixel (mode {image.mode}); save it with 8 or 16 bits")


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image, with 16-bit pixels scaled to 8 bits."""
    check_depth(image)
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def eval_transform(
    size: int, mean: Sequence[float], std: Sequence[float], resize: int | None = None
) -> Callable[[Image.Image], Tensor]:
    """A transform to (3, size, size) float32: resize, crop the centre, normalise.

    The image's shorter side becomes `resize`, by default `size`.
    """
    return v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(resize or size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(size),
            *_normalise(mean, std),
        ]
    )


def train_transform(
    images: ImageSet,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    resize: int | None = None,
    *,
    rand_augment: int = 0,
    color_jitter: float = 0.0,
    random_erasing: float = 0.0,
) -> Callable[[Image.Image], Tensor]:
    """A transform to (3, size, size) float32: crop and mirror at random, normalise.

    The crop covers half to all of the image. With `resize`, the image's shorter side first becomes that long,
    and the crop is a square of `size`. `images.flips` are the mirrorings. `rand_augment` is the magnitude of
    RandAugment (arXiv 1909.13719) with two operations, from 1 to 30; what they uncover has the mean colour.
    `color_jitter` changes brightness, contrast and saturation by up to this share. `random_erasing` is the
    probability of a rectangle of the mean colour (arXiv 1708.04896). 0 turns each of them off.
    """
    sampling = {"interpolation": v2.InterpolationMode.BICUBIC, "antialias": True}
    crop = (
        [v2.Resize(resize, **sampling), v2.RandomCrop(size)]
        if resize
        else [v2.RandomResizedCrop(size, scale=(0.5, 1.0), **sampling)]
    )
    mirror = [v2.RandomHorizontalFlip()] if (-1,) in images.flips else []
    mirror += [v2.RandomVerticalFlip()] if (-2,) in images.flips else []
    colours = []
    if rand_augment:
        fill = [round(255 * value) for value in mean]
        colours.append(v2.RandAugment(num_ops=2, magnitude=rand_augment, fill=fill))
    if color_jitter:
        colours.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    erase = [v2.RandomErasing(random_erasing)] if random_erasing else []
    return v2.Compose(
        [
            v2.PILToTensor(),
            *crop,
            *mirror,
            *colours,
            *_normalise(mean, std),
            *erase,
        ]
    )


def _normalise(mean: Sequence[float], std: Sequence[float]) -> list[v2.Transform]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]


def workers(config: DataConfig, device: torch.device) -> int:
    """Number of decoding processes. It is 0 on the CPU, where decoding is a small share of the work."""
    if config.workers is not None:
        return config.workers
    return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)
