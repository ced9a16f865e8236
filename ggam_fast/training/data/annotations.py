"""Where the object is in each image: what localisation is measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Annotations:
    """Of N images, in pixels of the image as `ImageSet.read` gives it; a data set has any of them.

    `boxes`: (N, 4) float32, x0, y0, x1, y1, the last two exclusive. `parts`: (N, P, 3) float32, x, y and
    1 where the part can be seen, else 0; `part_names`: P. `masks`: row -> (H, W) bool, the object's pixels.
    """

    boxes: Tensor | None = None
    parts: Tensor | None = None
    part_names: tuple[str, ...] = ()
    masks: Callable[[int], Tensor] | None = None

    def kinds(self) -> tuple[str, ...]:
        """The names of the annotations that the data set has."""
        return tuple(name for name in ("boxes", "parts", "masks") if getattr(self, name) is not None)

    def of(self, rows: Sequence[int]) -> Annotations:
        """The annotations of some rows, numbered from 0."""
        index = torch.tensor(rows, dtype=torch.int64)
        masks = self.masks
        return replace(
            self,
            boxes=None if self.boxes is None else self.boxes[index],
            parts=None if self.parts is None else self.parts[index],
            masks=None if masks is None else lambda row: masks(rows[row]),
        )


def box_of(mask: Tensor) -> tuple[int, int, int, int]:
    """The smallest box (x0, y0, x1, y1) around the true pixels of a mask (H, W); zeros if there are none."""
    if not mask.any():
        return 0, 0, 0, 0
    columns, rows = mask.any(0).nonzero().flatten(), mask.any(1).nonzero().flatten()
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
