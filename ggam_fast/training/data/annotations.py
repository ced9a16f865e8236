"""Annotations that say where the object is in each image. Localisation is measured against them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Annotations:
    """The annotations of N images, in pixels of the image that `ImageSet.read` returns.

    `boxes`: (N, 4) float32, x0, y0, x1, y1; x1 and y1 are exclusive. `parts`: (N, P, 3) float32, x, y and a
    third number, which is 1 if the part can be seen and 0 if not. `part_names`: P names. `masks`: a function
    from a row to the object's pixels, (H, W) bool. A data set may lack any of them.
    """

    boxes: Tensor | None = None
    parts: Tensor | None = None
    part_names: tuple[str, ...] = ()
    masks: Callable[[int], Tensor] | None = None

    def kinds(self) -> tuple[str, ...]:
        """Names of the annotations that the data set has."""
        return tuple(name for name in ("boxes", "parts", "masks") if getattr(self, name) is not None)

    def of(self, rows: Sequence[int]) -> Annotations:
        """The annotations of `rows`, which get new numbers from 0."""
        index = torch.tensor(rows, dtype=torch.int64)
        masks = self.masks
        return replace(
            self,
            boxes=None if self.boxes is None else self.boxes[index],
            parts=None if self.parts is None else self.parts[index],
            masks=None if masks is None else lambda row: masks(rows[row]),
        )


def box_of(mask: Tensor) -> tuple[int, int, int, int]:
    """The smallest box (x0, y0, x1, y1) around the true pixels of a mask (H, W), or zeros without any."""
    if not mask.any():
        return 0, 0, 0, 0
    columns, rows = mask.any(0).nonzero().flatten(), mask.any(1).nonzero().flatten()
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
