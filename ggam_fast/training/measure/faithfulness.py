"""Insertion and deletion: do the hottest pixels of a heat map matter to the classifier?

Petsiuk et al., RISE (arXiv 1806.07421). Pixels are taken in the order of the map, the hottest first. Deletion
blanks them in the image. A good map makes the class's probability fall early. Insertion uncovers them in a
blurred image. A good map makes the probability rise early. Both are compared with pixels in random order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF  # type: ignore[import-untyped]

# The blur that RISE uses on 224 x 224 images.
_KERNEL, _SIGMA = 11, 5.0


def ranks(heat: Tensor, generator: torch.Generator) -> Tensor:
    """Rank of every pixel of maps (N, H, W), 0 for the hottest. Equal pixels are in random order."""
    flat = heat.flatten(1)
    shuffled = torch.randperm(flat.shape[1], generator=generator)
    order = shuffled[flat[:, shuffled].argsort(dim=1, descending=True, stable=True)]
    return (
        torch.empty_like(order).scatter_(1, order, torch.arange(flat.shape[1]).expand_as(order)).view_as(heat)
    )


def deletion_curves(
    probability: Callable[[Tensor], Tensor], images: Tensor, rank: Tensor, steps: int
) -> Tensor:
    """Probabilities (N, steps + 1) while the image loses its pixels in the order of `rank` (N, H, W).

    `probability` maps normalised images (N, 3, H, W) to the probability of each image's class, (N,). Lost
    pixels are 0, which is the mean of the data.
    """
    return _curves(probability, images, torch.zeros_like(images), rank, steps)


def insertion_curves(
    probability: Callable[[Tensor], Tensor], images: Tensor, rank: Tensor, steps: int
) -> Tensor:
    """Probabilities (N, steps + 1) while a blurred image gains its sharp pixels in the order of `rank`."""
    return _curves(probability, TF.gaussian_blur(images, _KERNEL, _SIGMA), images, rank, steps)


def area(curves: Tensor) -> Tensor:
    """Area under each curve (N, steps + 1), as (N,). The axis is the share of pixels, from 0 to 1."""
    return torch.trapezoid(curves, dim=1) / (curves.shape[1] - 1)


def _curves(
    probability: Callable[[Tensor], Tensor], before: Tensor, after: Tensor, rank: Tensor, steps: int
) -> Tensor:
    pixels = rank[0].numel()
    points = []
    for step in range(steps + 1):
        taken = rank[:, None] < pixels * step / steps
        points.append(probability(torch.where(taken, after, before)))
    return torch.stack(points, 1)
