"""Where a model looks: its attention and its Grad-CAM, as tensors and as pictures.

The head knows Grad-CAM in closed form, so nothing is hooked and no backward pass runs.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .base import GGAMHeadBase
from .functional import cam, unwrapped

MAPS = ("cam", "spatial_attention")


class Explanation(NamedTuple):
    """What `explain` returns, without gradients. h and w are those of the feature map, H and W of the images.

    A map of tokens that do not fill a grid of the images' shape stays (N, L), and has no overlay.
    """

    logits: Tensor
    """(N, K) class scores"""
    target: Tensor
    """(N,) the classes that are explained, or (N, K) if probabilities were given"""
    channel_attention: Tensor
    """(N, C) S"""
    spatial_attention: Tensor
    """(N, h, w) T"""
    cam_weights: Tensor
    """(N, C) beta, Grad-CAM's weights: the mean over positions of the class score's gradient"""
    cam: Tensor
    """(N, h, w) Grad-CAM's map: relu(sum_c beta_c A_c)"""
    pictures: Tensor
    """(N, 3, H, W) the images in [0, 1]"""

    def heat(self, map: Literal["cam", "spatial_attention"] = "cam") -> Tensor:
        """A map in the size of the images, (N, H, W), each from 0 to 1; bilinear between its values."""
        values: Tensor = getattr(self, checks.one_of("map", map, MAPS))
        if values.dim() != 3:
            raise ValueError(
                f"{map} must fill a grid to be laid over an image; got {tuple(values.shape)} tokens"
            )
        size = self.pictures.shape[2:]
        values = F.interpolate(values.unsqueeze(1), size, mode="bilinear", align_corners=False).squeeze(1)
        values = values - values.amin((1, 2), keepdim=True)
        return values / values.amax((1, 2), keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)

    def overlay(self, map: Literal["cam", "spatial_attention"] = "cam", alpha: float = 0.5) -> Tensor:
        """The pictures with a map over them, (N, 3, H, W) in [0, 1]: blue is low, red is high.

        `alpha` in [0, 1] is the share of the map's colour.
        """
        if not 0.0 <= checks.number("alpha", alpha) <= 1.0:
            raise ValueError(f"alpha must be in [0, 1]; got {alpha!r}")
        heat = self.heat(map).unsqueeze(1)
        centres = torch.tensor([3.0, 2.0, 1.0], device=heat.device, dtype=heat.dtype).view(3, 1, 1)
        colours = (1.5 - (4 * heat - centres).abs()).clamp(0, 1)  # the colour map jet
        return (1 - alpha) * self.pictures + alpha * colours


def explain(model: nn.Module, images: Tensor, target: Tensor | None = None) -> Explanation:
    """Attention and Grad-CAM of a model's feature map, for images (N, C, H, W) as the model takes them.

        beta = mean over positions of dy/dA        map = relu(sum_c beta_c A_c)

    y is the score of `target`, int64 (N,) or float probabilities (N, K); None is the class with the highest
    score. Grad-CAM is that of the features, whatever the head's `cam_at` and `cam_class`. The model runs in
    evaluation mode and comes back in its own. No hook is set and no backward pass runs, except through a
    custom classifier.

    Args:
        model: of `create_model` or `replace_head`, also inside torch.compile, DataParallel or DDP; or any
            module with `forward_features`, and `get_classifier` that gives a head.
        images: (N, C, H, W), normalised as in training. The pictures undo the mean and deviation of
            timm's `pretrained_cfg`; images of other models are scaled to [0, 1] one by one.
        target: the classes to explain.

    Raises:
        TypeError, ValueError: the model has no GGAM head, or images or target do not fit.

    Source: Selvaraju et al. (arXiv 1610.02391), eq. 1 and 2.

    Examples:
        >>> found = ggam_fast.explain(model, images)
        >>> found.overlay("cam").shape
        torch.Size([2, 3, 64, 64])
    """
    network, head = _network_and_head(model)
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be float (N, C, H, W); got {got}")
    view = copy.copy(head)  # the same layers, with other options
    view.cam_at, view.ignore_index = "features", None
    view.cam_class = "predicted" if target is None else "label"
    with _evaluation(network), torch.no_grad():
        features = network.forward_features(images)
        labels = target
        if labels is None:
            labels = torch.zeros(images.shape[0], dtype=torch.int64, device=features.device)
        out = view(features, labels)
        positions = view._without_prefix(features)
        heat = cam(positions, out.cam_weights, input_fmt=head.input_fmt, backend=head.backend)
    shape = images.shape[2], images.shape[3]
    return Explanation(
        out.logits,
        out.logits.argmax(1) if target is None else target,
        out.channel_attention,
        _grid(out.spatial_attention, shape),
        out.cam_weights,
        _grid(heat, shape),
        _pictures(network, images.detach()),
    )


def _network_and_head(model: Any) -> tuple[Any, Any]:
    """The model inside wrappers that change no result, and its GGAM head."""
    given = model
    while isinstance(model, nn.Module) and not hasattr(model, "get_classifier"):
        inner = next((model._modules[n] for n in ("module", "_orig_mod") if n in model._modules), None)
        if inner is None:
            break
        model = inner
    model = model._modules.get("_orig_mod", model) if isinstance(model, nn.Module) else model
    head = unwrapped(model.get_classifier()) if hasattr(model, "get_classifier") else None
    if not isinstance(head, GGAMHeadBase) or not hasattr(model, "forward_features"):
        raise TypeError(
            "model must be one of create_model or replace_head, or have forward_features, and "
            f"get_classifier that gives a GGAMHead; got {type(given).__name__}"
        )
    return model, head


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()  # type: ignore[misc]
    finally:
        for module, mode in modes:
            module.training = mode


def _grid(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Values of tokens (N, L) as (N, h, w), where L patches are a grid over images of this shape."""
    if values.dim() != 2 or not values.shape[1]:
        return values
    height = round((values.shape[1] * shape[0] / shape[1]) ** 0.5)
    width = values.shape[1] // max(height, 1)
    return values.unflatten(1, (height, width)) if height * width == values.shape[1] else values


def _pictures(model: Any, images: Tensor) -> Tensor:
    images = images.float()
    configured = getattr(model, "pretrained_cfg", None) or {}
    mean, std = (torch.tensor(configured.get(name, ()), device=images.device) for name in ("mean", "std"))
    if len(mean) == len(std) == images.shape[1]:
        images = (images * std[:, None, None] + mean[:, None, None]).clamp(0, 1)
    else:
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        images = (images - low) / (high - low).clamp_min(torch.finfo(images.dtype).tiny)
    return images if images.shape[1] == 3 else images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
