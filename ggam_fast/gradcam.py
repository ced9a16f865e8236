"""Grad-CAM's channel weights beta in closed form, and the maps they draw.

    beta_c = 1/L sum_l d y / d A_cl = mean_l dA      with dA the sum of outer products of `attention`:

    beta = ( v * sum(T)/L + S * sum(dU) + dg ) / L       cam_at="features"
    beta = v / L                                         cam_at="attended", no pass over A

v = d y / d pooled comes from the classifier alone.  No backward pass runs and nothing of A's size is
written.  Source: Selvaraju et al., Grad-CAM (arXiv 1610.02391), eq. 1.
"""

import torch
from torch import Tensor

from .attention import Attended, ChannelMLP, Options, cam_terms, pull_back
from .checks import full_precision
from .contractions import DifferentiableStages, get_stages
from .stages import Stages, cam_weights


def grad_cam_weights(
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    attended: Attended,
    grad_pooled: Tensor,
    cam_at: str,
    backend: str,
    differentiable: bool = False,
) -> Tensor:
    """beta (N, C) for features (N, C, L), given v = `grad_pooled` = dy/dpooled (dy/dD if dense).

    With `differentiable`, autograd can go through beta, to any order; otherwise beta is detached.
    """
    if differentiable:
        with full_precision(features):
            stages: Stages = DifferentiableStages(backend)
            return _beta(stages, features, mlp, options, attended, grad_pooled, cam_at)
    with torch.no_grad(), full_precision(features):
        stages = get_stages(backend)
        return _beta(stages, features, mlp, options, attended, grad_pooled, cam_at)


def _beta(
    stages: Stages,
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    attended: Attended,
    grad_pooled: Tensor,
    cam_at: str,
) -> Tensor:
    positions = features.shape[2]
    if cam_at == "attended":
        if options.dense:
            return stages.spatial_sum(grad_pooled, None, 1.0 / positions)
        return grad_pooled / positions
    f = pull_back(stages, features, mlp, options, attended, grad_pooled)
    return cam_weights(cam_terms(f, attended.spatial), f.channel, positions)
