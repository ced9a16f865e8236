"""Grad-CAM's channel weights beta in closed form, and the maps they draw.

    beta_c = 1/L sum_l d y / d A_cl = mean_l dA      with dA the sum of outer products of `attention`:

    beta = ( v * sum(T)/L + S * sum(dU) + dg ) / L       cam_at="features"
    beta = v / L                                         cam_at="attended", no pass over A

v = d y / d pooled comes from the classifier alone.  No backward pass runs and nothing of A's size is
written.  Source: Selvaraju et al., Grad-CAM (arXiv 1610.02391), eq. 1.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from .attention import Attended, ChannelMLP, Options, cam_terms, pull_back
from .checks import full_precision
from .contractions import DifferentiableStages, get_stages
from .stages import CamTerms, Stages, cam_weights


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
    graph = nullcontext() if differentiable else torch.no_grad()
    stages = DifferentiableStages(backend) if differentiable else get_stages(backend)
    with graph, full_precision(features):
        terms, s = _terms(stages, features, mlp, options, attended, grad_pooled, cam_at)
        return cam_weights(terms, s, features.shape[2])


def guided(
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    attended: Attended,
    grad_pooled: Tensor,
    cam_at: str,
    backend: str,
    cam_norm: str,
    temperature: float,
    divergence: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """beta and S (N, C) and the guidance loss of each image (N,), all without a graph."""
    stages = get_stages(backend)
    with torch.no_grad(), full_precision(features):
        terms, _ = _terms(stages, features, mlp, options, attended, grad_pooled, cam_at)
        rest = (features.shape[2], cam_norm, temperature, divergence, 1.0, False)
        return stages.guidance(attended.channel_logits, terms, None, *rest)[:3]


def _terms(
    stages: Stages,
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    attended: Attended,
    grad_pooled: Tensor,
    cam_at: str,
) -> tuple[CamTerms, Tensor | None]:
    """The terms of beta, and the S that weights one of them, if any."""
    positions = features.shape[2]
    if cam_at == "features":
        f = pull_back(stages, features, mlp, options, attended, grad_pooled)
        return cam_terms(f, attended.spatial), f.channel
    dense = options.dense
    beta = stages.spatial_sum(grad_pooled, None, 1.0 / positions) if dense else grad_pooled / positions
    return CamTerms(beta), None
