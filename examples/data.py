"""What the examples share: their images and their arguments.

`--data DIR` reads a folder of class folders. Without it the images are drawn: discs, squares and diamonds
on noise, so that every example runs anywhere in seconds.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which pretrained backbones expect


class DrawnShapes(Dataset[tuple[Tensor, int]]):
    """Normalised images (3, side, side) of a disc, a square or a diamond, the same in every run."""

    classes = ("disc", "square", "diamond")

    def __init__(self, count: int, side: int) -> None:
        self.count, self.side = count, side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        random, label = torch.Generator().manual_seed(index), index % len(self.classes)
        radius = self.side * (0.15 + 0.1 * torch.rand((), generator=random))
        centre = radius + (self.side - 2 * radius) * torch.rand(2, generator=random)
        y, x = torch.meshgrid(torch.arange(self.side), torch.arange(self.side), indexing="ij")
        distance = torch.stack([(y - centre[0]).abs(), (x - centre[1]).abs()])
        inside = torch.linalg.vector_norm(distance, ord=(2, torch.inf, 1)[label], dim=0) < radius
        ground = torch.randn(3, self.side, self.side, generator=random)
        colour = 1.5 + torch.rand(3, 1, 1, generator=random)
        return torch.where(inside, colour, ground), label


def images(root: Path | None, count: int, side: int) -> tuple[Dataset[tuple[Tensor, int]], list[str]]:
    """A data set of (image, label), and the names of its classes."""
    if root is None:
        return DrawnShapes(count, side), list(DrawnShapes.classes)
    from torchvision import datasets, transforms  # type: ignore[import-untyped]

    transform = transforms.Compose([
        transforms.Resize(side), transforms.CenterCrop(side), transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])  # fmt: skip
    folder = datasets.ImageFolder(str(root), transform)
    return folder, folder.classes


def batches(arguments: argparse.Namespace) -> tuple[DataLoader[Any], list[str]]:
    """Shuffled batches of what the arguments ask for, and the names of the classes."""
    found, classes = images(arguments.data, arguments.images, arguments.side)
    # Batch norm cannot train on one image, so a short last batch is left out.
    return DataLoader(found, arguments.batch_size, shuffle=True, drop_last=True), classes


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every example has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--data", type=Path, help="folder of class folders (default: drawn shapes)")
    made.add_argument("--images", type=int, default=96, help="how many shapes are drawn (default 96)")
    made.add_argument("--side", type=int, default=64, help="side of the square images (default 64)")
    made.add_argument("--batch-size", type=int, default=16, help="images in a batch (default 16)")
    made.add_argument("--epochs", type=int, default=4, help="passes over the images (default 4)")
    return made
