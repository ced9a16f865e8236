"""An image, and a heat map over it, on matplotlib axes."""

from __future__ import annotations

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from torch import Tensor
from torch.nn import functional as F

COLOUR_MAP = "viridis"
_LEAST, _MOST = 0.1, 0.6
NOTHING = "no positive evidence"
"""What a figure says of a map of zeros: nothing in the image speaks for the class."""

# These colours of Okabe and Ito differ for any kind of colour vision.
BLUE, VERMILION, GREEN, ORANGE, YELLOW = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#F0E442"


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure, `width` x `height` inches, with constrained layout."""
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def show_image(axes: Axes, picture: Tensor) -> None:
    """Show a picture (H, W, 3) in [0, 1]."""
    axes.imshow(picture.numpy(), interpolation="bilinear")
    _bare(axes)


def show_heat(axes: Axes, picture: Tensor, heat: Tensor) -> None:
    """Show a map (h, w), which has no negative values, over the picture.

    The picture is grey, so all colour comes from the map. The map is the more opaque the higher it is, so the
    picture stays visible where it is low. A map of zeros is not drawn, and the figure says so.
    """
    axes.imshow(picture.mean(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
    if heat.any():
        fine, share = _fine(picture, heat)
        axes.imshow(fine.numpy(), cmap=COLOUR_MAP, alpha=_opacity(share).numpy(), interpolation="bilinear")
    else:
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "boxstyle": "round"}
        axes.text(0.5, 0.5, NOTHING, transform=axes.transAxes, ha="center", va="center", fontsize=9, bbox=box)
    _bare(axes)


def overlay(picture: Tensor, heat: Tensor) -> Tensor:
    """The pixels (H, W, 3) in [0, 1] that `show_heat` shows, without a figure around them."""
    grey = picture.mean(-1, keepdim=True).expand_as(picture)
    if not heat.any():
        return grey
    share = _fine(picture, heat)[1]
    colours = torch.from_numpy(matplotlib.colormaps[COLOUR_MAP](share.numpy()))[..., :3].to(grey.dtype)
    return torch.lerp(grey, colours, _opacity(share)[..., None])


def _fine(picture: Tensor, heat: Tensor) -> tuple[Tensor, Tensor]:
    """The map at the size of the picture, and its values as shares from 0, its lowest, to 1, its highest."""
    fine = F.interpolate(heat[None, None], size=picture.shape[:2], mode="bilinear")[0, 0]
    low, high = fine.min(), fine.max()
    return fine, (fine - low) / (high - low) if high > low else torch.full_like(fine, 0.5)


def _opacity(share: Tensor) -> Tensor:
    """Opacity of a map at values from 0, its lowest, to 1, its highest."""
    return _LEAST + (_MOST - _LEAST) * share


def colour_key(legend: SubFigure, place: tuple[float, float, float, float]) -> None:
    """Draw the key of the colours at `place` (left, bottom, width, height), over the grey of a picture."""
    axes = legend.add_axes(place)
    share = torch.linspace(0, 1, 256)[None]
    axes.imshow(torch.full_like(share, 0.5).numpy(), cmap="gray", vmin=0, vmax=1, aspect="auto")
    axes.imshow(share.numpy(), cmap=COLOUR_MAP, alpha=_opacity(share).numpy(), aspect="auto")
    axes.set_xticks([0, 255], ["lowest", "highest"], fontsize=9)
    axes.set_yticks([])
    axes.set_xlabel("within each map", fontsize=9, labelpad=-9)
    axes.tick_params(length=0)


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
