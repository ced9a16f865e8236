"""Whether a heat map lies on the object: published measures, per image, and what chance would reach.

Heat maps are (N, H, W), not negative; masks (N, H, W) bool; boxes (N, 4) x0, y0, x1, y1 with exclusive ends;
parts (N, P, 3) x, y, visible: all in pixels of the same H x W picture (`geometry` brings annotations there).
A number means little without that of a map which knows nothing: `centred` is one, and the energy of a uniform
map is the share of the picture that the object covers.
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
"""The overlaps that MaxBoxAccV2 averages over."""


def enlarged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N, h, w) brought to H x W pixels, bilinearly."""
    return F.interpolate(maps[:, None].float(), size=size, mode="bilinear", align_corners=False)[:, 0]


def centred(count: int, size: tuple[int, int]) -> Tensor:
    """A Gaussian around the centre, of a quarter of the side, for each of `count` pictures."""
    y, x = (torch.linspace(-2, 2, length).square() for length in size)
    return torch.exp(-(y[:, None] + x[None, :]) / 2).expand(count, *size)


def peaks(heat: Tensor) -> Tensor:
    """(N, 2) x and y of each map's maximum; the first one in reading order."""
    index = heat.flatten(1).argmax(1)
    return torch.stack([index % heat.shape[2], index // heat.shape[2]], 1)


def pointing_game(heat: Tensor, masks: Tensor, tolerance: float = 0.0) -> Tensor:
    """Whether the maximum lies on the object, or at most `tolerance` pixels from it: (N,) bool.

    Zhang et al., Top-down Neural Attention by Excitation Backprop (arXiv 1608.00507), who allow 15 pixels.
    """
    x, y = peaks(heat).unbind(1)
    rows, columns = (torch.arange(length) for length in heat.shape[1:])
    distance = (rows - y[:, None]).square()[:, :, None] + (columns - x[:, None]).square()[:, None, :]
    return ((distance <= tolerance**2) & masks).flatten(1).any(1)


def energy(heat: Tensor, masks: Tensor) -> Tensor:
    """Share of the map's sum that lies on the object: (N,) in [0, 1]; 0 for a map of zeros.

    The energy-based pointing game of Wang et al., Score-CAM (arXiv 1910.01279).
    """
    inside = (heat * masks).flatten(1).sum(1)
    return inside / heat.flatten(1).sum(1).clamp_min(torch.finfo(heat.dtype).tiny)


def part_hits(heat: Tensor, parts: Tensor, radius: Tensor | float) -> Tensor:
    """Whether the maximum lies within `radius` pixels, (N,) or one for all, of a visible part: (N,) bool.

    The pointing game on parts. With a tenth of the longer side of the box it is the distance of PCK (Yang and
    Ramanan, 2013). Images without a visible part count as missed.
    """
    distance = (parts[:, :, :2] - peaks(heat)[:, None].to(parts.dtype)).norm(dim=2)
    limit = torch.as_tensor(radius, dtype=parts.dtype).expand(len(heat))
    return ((distance <= limit[:, None]) & (parts[:, :, 2] > 0)).any(1)


def box_overlaps(heat: Tensor, boxes: Tensor, thresholds: int = 100) -> Tensor:
    """Best overlap (intersection over union) with the box, (N, thresholds) in [0, 1].

    Of each map, brought to [0, 1], the pixels above each of `thresholds` values 0, 1/thresholds, ... are cut
    into connected areas (diagonals connect), and the best of the boxes around them counts.
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
    """MaxBoxAccV2 in [0, 1] from `box_overlaps`: for each delta in `DELTAS` the share of images whose overlap
    reaches delta at the one threshold that suits the data set best; the mean over the deltas.

    Choe et al., Evaluation for Weakly Supervised Object Localization (arXiv 2007.04178).
    """
    return float(np.mean([(overlaps >= delta).double().mean(0).max().item() for delta in DELTAS]))


def measured(heat: Tensor, truth: Placed, thresholds: int = 100) -> dict[str, Tensor]:
    """Every measure that the annotations of these N images allow, a row for each image, of maps (N, H, W).

    "pointing" and "pointing_15px" (the published tolerance, for pictures of about 224 pixels), "energy",
    "box_overlaps", and "parts" within a tenth of the longer side of the box, or of the picture.
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
    """Means over all images of what `measured` found, batch by batch; "max_box_acc_v2" for the overlaps."""
    rows = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    means = {name: values.double().mean().item() for name, values in rows.items() if name != "box_overlaps"}
    if "box_overlaps" in rows:
        means["max_box_acc_v2"] = max_box_acc_v2(rows["box_overlaps"])
    return means


class Tally:
    """Measures of several kinds of maps over a data set, collected batch by batch.

    `size`: H x W of the pictures that the annotations are in. `thresholds`: of `box_overlaps`.
    """

    def __init__(self, size: tuple[int, int], thresholds: int) -> None:
        self._size = size
        self._thresholds = thresholds
        self._found: dict[str, list[dict[str, Tensor]]] = {}

    def add(self, maps: Mapping[str, Tensor], truth: Placed) -> None:
        """Maps (N, h, w) by name, and the annotations of the same N images; without any, nothing is added."""
        if not truth.kinds():
            return
        for name, heat in maps.items():
            found = measured(enlarged(heat, self._size), truth, self._thresholds)
            self._found.setdefault(name, []).append(found)

    def means(self) -> dict[str, dict[str, float]]:
        """`summary` of every kind of map."""
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
    """Header and lines of a table of `summary` results by map, in percent."""
    names = [name for name in MEASURES if any(name in values for values in found.values())]
    lines = [
        [name, *(f"{100 * values[one]:.1f}" if one in values else "-" for one in names)]
        for name, values in found.items()
    ]
    return ["map", *(MEASURES[name] for name in names)], lines
