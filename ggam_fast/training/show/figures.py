"""An image, and a heat map over it, on matplotlib axes."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from torch import Tensor, linspace
from torch.nn import functional as F

COLOUR_MAP = "viridis"
# These colours of Okabe and Ito differ for any kind of colour vision.
BLUE, VERMILION, GREEN, ORANGE, YELLOW = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#F0E442"


def literal(text: str) -> str:
    """`text` with escaped dollar signs. matplotlib would typeset text between them as mathematics."""
    return text.encode(errors="replace").decode().replace("$", r"\$")


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
    """Show a map (h, w) over the picture. The picture is grey, so all colour comes from the map."""
    axes.imshow(picture.mean(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
    fine = F.interpolate(heat[None, None], size=picture.shape[:2], mode="bilinear")[0, 0]
    axes.imshow(fine.numpy(), cmap=COLOUR_MAP, alpha=0.5, interpolation="bilinear")
    _bare(axes)


def colour_key(legend: SubFigure, place: tuple[float, float, float, float]) -> None:
    """Draw the key of the colours at `place` (left, bottom, width, height)."""
    axes = legend.add_axes(place)
    axes.imshow(linspace(0, 1, 256)[None].numpy(), cmap=COLOUR_MAP, aspect="auto")
    axes.set_xticks([0, 255], ["lowest", "highest"], fontsize=9)
    axes.set_yticks([])
    axes.set_xlabel("within each map", fontsize=9, labelpad=-9)
    axes.tick_params(length=0)


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
