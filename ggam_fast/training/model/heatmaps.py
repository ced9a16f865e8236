"""Heat maps of a trained head: its spatial attention, and the Grad-CAM of any class."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from ggam_fast import GGAMHead
from ggam_fast.functional import channel_sum


class HeatMaps(NamedTuple):
    """Maps (N, h, w), float32, not negative.

    `attention` is None for a head without spatial attention. `classes` (N,) are the classes of `grad_cam`.
    """

    logits: Tensor
    attention: Tensor | None
    grad_cam: Tensor
    classes: Tensor


@torch.no_grad()
def heat_maps(head: GGAMHead, features: Tensor, classes: Tensor | None = None) -> HeatMaps:
    """The heat maps of `features` A (N, C, h, w).

    Grad-CAM is relu(sum_c beta_c A_c) for the classes `classes` (N,), by default the predicted ones. With
    `cam_at="attended"` the head takes beta at the attended map D. Then A is replaced by A T, which equals D
    up to a constant factor.
    """
    if classes is None:
        classes = head(features).argmax(1)
    # The weights are the same, but Grad-CAM here is that of `classes`. Training may use another class.
    asked = copy.copy(head)
    asked.cam_class = "label"
    out = asked(features, classes)
    total = channel_sum(features, out.cam_weights)
    if head.cam_at == "attended":
        total = total * out.spatial_attention
    spatial = head.attention in ("channel_spatial", "spatial")
    return HeatMaps(
        out.logits.float(),
        out.spatial_attention.float().clamp_min(0) if spatial else None,
        total.float().relu(),
        classes,
    )
