"""Published measures of whether a heat map lies on the object, and the values that chance reaches.

All coordinates are pixels of the same H x W picture. `geometry` converts annotations to them.

* Heat maps: (N, H, W), not negative.
* Masks: (N, H, W) bool.
* Boxes: (N, 4) x0, y0, x1, y1; x1 and y1 are exclusive.
* Parts: (N, P, 3) x, y, visible.

Compare each number with that of a map that does not depend on the image. `centred` is such a map. A uniform
map is another: its energy is the share of the picture that the object covers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy import ndimage  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional as F

from ggam_fast.training.measure.geometry import Placed

DELTAS = (0.3, 0.5, 0.7)
"""The least overlaps over which MaxBoxAccV2 averages."""


def enlarged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N, h, w) resized to H x W pixels, with bilinear interpolation."""
    return F.interpolate(maps[:, None].float(), size=size, mode="bilinear", align_corners=False)[:, 0]


def centred(count: int, size: tuple[int, int]) -> Tensor:
    """`count` equal Gaussians around the centre. Their standard deviation is a quarter of the side."""
    y, x = (torch.linspace(-2, 2, length).square() for length in size)
    return torch.exp(-(y[:, None] + x[None, :]) / 2).expand(count, *size)


def peaks(heat: Tensor) -> Tensor:
    """(N, 2) x and y of each map's maximum. Of equal pixels it is the first in reading order."""
    index = heat.flatten(1).argmax(1)
    return torch.stack([index % heat.shape[2], index // heat.shape[2]], 1)


def pointing_game(heat: Tensor, masks: Tensor, tolerance: float = 0.0) -> Tensor:
    """Whether the maximum lies on the object or at most `tolerance` pixels from it, (N,) bool.

    Zhang et al., Top-down Neural Attention by Excitation Backprop (arXiv 1608.00507). They allow 15 pixels.
    """
    x, y = peaks(heat).unbind(1)
    rows, columns = (torch.arange(length) for length in heat.shape[1:])
    distance = (rows - y[:, None]).square()[:, :, None] + (columns - x[:, None]).square()[:, None, :]
    return ((distance <= tolerance**2) & masks).flatten(1).any(1)


def energy(heat: Tensor, masks: Tensor) -> Tensor:
    """Share of the map's sum that lies on the object, (N,) in [0, 1]. A map of zeros has 0.

    This is the energy-based pointing game of Wang et al., Score-CAM (arXiv 1910.01279).
    """
    inside = (heat * masks).flatten(1).sum(1)
    return inside / heat.flatten(1).sum(1).clamp_min(torch.finfo(heat.dtype).tiny)


def part_hits(heat: Tensor, parts: Tensor, radius: Tensor | float) -> Tensor:
    """Whether the maximum lies at most `radius` pixels from a visible part, (N,) bool.

    `radius` is (N,) or one number for all images. This is the pointing game on parts. PCK (Yang and Ramanan,
    2013) takes a tenth of the longer side of the box as the radius. Images without a visible part count as
    missed.
    """
    distance = (parts[:, :, :2] - peaks(heat)[:, None].to(parts.dtype)).norm(dim=2)
    limit = torch.as_tensor(radius, dtype=parts.dtype).expand(len(heat))
    return ((distance <= limit[:, None]) & (parts[:, :, 2] > 0)).any(1)


def box_overlaps(heat: Tensor, boxes: Tensor, thresholds: int = 100) -> Tensor:
    """Best overlap (intersection over union) with the box at each threshold, (N, thresholds) in [0, 1].

    Each map is scaled to [0, 1]. The thresholds are k / thresholds for k from 0 to thresholds - 1. The pixels
    above a threshold form connected areas, in which diagonal neighbours count as connected. Each area has a
    bounding box. The result is the largest overlap of one of these boxes with the annotated box.
    """
    overlaps = np.zeros((len(heat), thresholds))
    low, high = (getattr(heat.flatten(1), name)(1).values[:, None, None] for name in ("min", "max"))
    scaled = ((heat - low) / (high - low).clamp_min(torch.finfo(heat.dtype).tiny)).numpy()
    for n, (picture, box) in enumerate(zip(scaled, boxes.numpy(), strict=True)):
        for k in range(thresholds):
            labels, _ = ndimage.label(picture > k / thresholds, structure=np.ones((3, 3)))
            found = [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(labels)]
            overlaps[n, k] = max((_overlap(one, box) for one in found), default=0.0)
    return torch.from_numpy(overlaps)


def max_box_acc_v2(overlaps: Tensor) -> float:
    """MaxBoxAccV2 in [0, 1] from `box_overlaps`.

    For each delta in `DELTAS`, take the share of images whose overlap is at least delta, at the threshold
    that makes this share largest. All images have the same threshold. The result is the mean over the deltas.

    Choe et al., Evaluation for Weakly Supervised Object Localization (arXiv 2007.04178).
    """
    return float(np.mean([(overlaps >= delta).double().mean(0).max().item() for delta in DELTAS]))


def measured(heat: Tensor, truth: Placed, thresholds: int = 100) -> dict[str, Tensor]:
    """Every measure of maps (N, H, W) that the annotations of these N images allow, one row for each image.

    Areas give "pointing", "pointing_15px" and "energy". 15 pixels are the published tolerance for pictures of
    about 224 pixels. Boxes give "box_overlaps". Parts give "parts", with a radius of a tenth of the longer
    side of the box, or of the picture if there are no boxes.
    """
    rows: dict[str, Tensor] = {}
    areas, boxes, parts = truth
    if areas is not None:
        rows["pointing"] = pointing_game(heat, areas)
        rows["pointing_15px"] = pointing_game(heat, areas, 15)
        rows["energy"] = energy(heat, areas)
    if boxes is not None:
        rows["box_overlaps"] = box_overlaps(heat, boxes, thresholds)
    if parts is not None:
        longer = (boxes[:, 2:] - boxes[:, :2]).amax(1) if boxes is not None else max(heat.shape[1:])
        rows["parts"] = part_hits(heat, parts, longer / 10)
    return rows


def summary(batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Means over all images, from the results of `measured` for each batch.

    The overlaps become "max_box_acc_v2".
    """
    rows = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    means = {name: values.double().mean().item() for name, values in rows.items() if name != "box_overlaps"}
    if "box_overlaps" in rows:
        means["max_box_acc_v2"] = max_box_acc_v2(rows["box_overlaps"])
    return means


class Tally:
    """Collects the measures of several kinds of maps over a data set, batch by batch.

    `size`: H x W of the annotated pictures. `thresholds`: number of thresholds of `box_overlaps`.
    """

    def __init__(self, size: tuple[int, int], thresholds: int) -> None:
        self._size = size
        self._thresholds = thresholds
        self._found: dict[str, list[dict[str, Tensor]]] = {}

    def add(self, maps: Mapping[str, Tensor], truth: Placed) -> None:
        """Add maps (N, h, w) by name, with the annotations of their N images, if there are any."""
        if not truth.kinds():
            return
        for name, heat in maps.items():
            found = measured(enlarged(heat, self._size), truth, self._thresholds)
            self._found.setdefault(name, []).append(found)

    def means(self) -> dict[str, dict[str, float]]:
        """The `summary` of every kind of map."""
        return {name: summary(batches) for name, batches in self._found.items()}


def _overlap(ours: tuple[int, ...], theirs: np.ndarray) -> float:
    width = min(ours[2], theirs[2]) - max(ours[0], theirs[0])
    height = min(ours[3], theirs[3]) - max(ours[1], theirs[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    areas = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (ours, theirs))
    return float(both / (areas - both))


MEASURES = {
    "pointing": "pointing game",
    "pointing_15px": "within 15 px",
    "energy": "energy inside",
    "max_box_acc_v2": "MaxBoxAccV2",
    "parts": "part hits",
}


def localisation_rows(found: dict[str, dict[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a table in percent, with one line for each map of `found`."""
    names = [name for name in MEASURES if any(name in values for values in found.values())]
    lines = [
        [name, *(f"{100 * values[one]:.1f}" if one in values else "-" for one in names)]
        for name, values in found.items()
    ]
    return ["map", *(MEASURES[name] for name in names)], lines
