"""Resize and crop annotations as their images are resized and cropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors  # type: ignore[import-untyped]
from torchvision.transforms.v2 import functional as TF  # type: ignore[import-untyped]

from ggam_fast.training.data.image_set import ImageSet

Transform = Callable[..., Tensor]


class Placed(NamedTuple):
    """Annotations of some images in pixels of the network's input (see `localization`).

    An annotation that the data set lacks is None. `areas`: the masks, or the pixels of the boxes if there are
    no masks.
    """

    areas: Tensor | None
    boxes: Tensor | None
    parts: Tensor | None

    def kinds(self) -> tuple[str, ...]:
        return tuple(name for name in ("areas", "boxes", "parts") if getattr(self, name) is not None)


def placed(images: ImageSet, rows: Sequence[int], transform: Transform, size: int) -> Placed:
    """The annotations of `rows` after `transform`, an evaluation transform to `size` x `size` pixels.

    The crop also cuts the annotations: boxes end at its border, and parts outside it are not visible.
    """
    found = images.annotations
    if found is None:
        return Placed(None, None, None)
    areas, boxes, parts = [], [], []
    for row in rows:
        image = images.read(row)
        if found.masks is not None:
            areas.append(_moved(tv_tensors.Mask(found.masks(row)), image, transform).bool())
        if found.boxes is not None:
            box = tv_tensors.BoundingBoxes(
                found.boxes[row][None], format="XYXY", canvas_size=(image.height, image.width)
            )
            boxes.append(_moved(box, image, transform)[0].float())
        if found.parts is not None:
            parts.append(_moved_parts(found.parts[row], image, transform, size))
    stacked_boxes = torch.stack(boxes) if boxes else None
    stacked_areas = torch.stack(areas) if areas else None
    if stacked_areas is None and stacked_boxes is not None:
        stacked_areas = boxes_to_masks(stacked_boxes, (size, size))
    return Placed(stacked_areas, stacked_boxes, torch.stack(parts) if parts else None)


def boxes_to_masks(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks of the pixels whose centres lie in each box."""
    y, x = (torch.arange(length) + 0.5 for length in size)
    x0, y0, x1, y1 = boxes.unbind(1)
    rows = (y >= y0[:, None]) & (y < y1[:, None])
    columns = (x >= x0[:, None]) & (x < x1[:, None])
    return rows[:, :, None] & columns[:, None, :]


def object_share(truths: Sequence[Placed]) -> float | None:
    """The share of the pictures that the objects cover, in [0, 1], or None without areas.

    A uniform map has this share as its energy.
    """
    areas = [truth.areas for truth in truths if truth.areas is not None]
    return torch.cat(areas).double().mean().item() if areas else None


def _moved(annotation: Tensor, image: Image.Image, transform: Transform) -> Tensor:
    """An annotation after the steps of its image. torchvision transforms both."""
    _, moved = transform(tv_tensors.Image(TF.pil_to_tensor(image)), annotation)
    return moved.as_subclass(torch.Tensor)


def _moved_parts(parts: Tensor, image: Image.Image, transform: Transform, size: int) -> Tensor:
    points = tv_tensors.KeyPoints(parts[:, :2], canvas_size=(image.height, image.width))
    xy = _moved(points, image, transform).float()
    inside = ((xy >= 0) & (xy < size)).all(1)
    return torch.cat([xy, (parts[:, 2:] * inside[:, None])], 1)
