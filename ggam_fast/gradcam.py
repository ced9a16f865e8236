"""Grad-CAM's channel weights beta in closed form, and the maps they draw.

    beta_c = 1/L sum_l d y / d A_cl = mean_l dA      with dA the sum of outer products of `attention`:

    beta = ( v * sum(T)/L + S * sum(dU) + dg ) / L       cam_at="features"
    beta = v / L                                         cam_at="attended", no pass over A

v = d y / d pooled comes from the classifier alone.  No backward pass runs and nothing of A's size is
written.  Source: Selvaraju et al., Grad-CAM (arXiv 1610.02391), eq. 1.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .attention import Attended, ChannelMLP, Options, cam_terms, pull_back
from .autograd import Function
from .checks import full_precision
from .contractions import DifferentiableStages, get_stages
from .guidance import kl_guidance_with_grad
from .stages import CamTerms, Stages, cam_weights, softmax_grad


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


class Guidance(Function):
    """(beta, S, guidance loss of each image) from the channel logits e; beta counts as constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor,
        first: Tensor,
        spatial: Tensor | None,
        grad_map: Tensor | None,
        grad_mean: Tensor | None,
        positions: int,
        terms: tuple[str, float, str],
        backend: str,
    ) -> tuple[Tensor, ...]:
        beta_terms = CamTerms(first, spatial, grad_map, grad_mean)
        stage = get_stages(backend).guidance
        beta, *rest = stage(logits, beta_terms, None, positions, *terms, 1.0, mean=False)
        return first.view_as(first) if beta is first else beta, *rest  # no input may be an output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        beta, s, _, de = output
        ctx.terms = inputs[6]
        ctx.save_for_backward(inputs[0], beta.clone(), s, de)  # beta is the caller's, to change in place
        ctx.mark_non_differentiable(beta, de)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, _beta: None, grad_s: Tensor | None, grad_loss: Tensor | None, _de: None
    ) -> tuple[Tensor | None, ...]:
        logits, beta, s, de = ctx.saved_tensors
        with full_precision(logits):
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                log_s = torch.log_softmax(logits, -1)
                s = log_s.exp()
                if grad_loss is not None:
                    de = kl_guidance_with_grad(log_s, s, beta, *ctx.terms)[1]
            found = None if grad_loss is None else grad_loss.unsqueeze(-1) * de
            if grad_s is not None:
                of_s = softmax_grad(grad_s, s)
                found = of_s if found is None else found + of_s
        return found, *[None] * 7


def cam_and_guidance(
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
    """beta and S (N, C) and the guidance loss of each image (N,); beta is detached."""
    stages, positions, logits = get_stages(backend), features.shape[2], attended.channel_logits
    needs_graph = torch.is_grad_enabled()
    with torch.no_grad(), full_precision(features):
        terms, _ = _terms(stages, features, mlp, options, attended, grad_pooled, cam_at)
        if not needs_graph:
            return stages.guidance(
                logits, terms, None, positions, cam_norm, temperature, divergence, 1.0, mean=False
            )[:3]
    with full_precision(features):
        return Guidance.apply(logits, *terms, positions, (cam_norm, temperature, divergence), backend)[:3]


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
