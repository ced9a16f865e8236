"""Cross entropy and guidance with the gradient of A in hand: beta and the backward share their reads of A.

    loss = CE(logits, target) + guidance_weight * L_GGAM(S, beta)

Once the classifier has run, both gradients of the pooled features are known in closed form:

    v  = d y / d pooled        for beta        (y the score that Grad-CAM explains)
    dz = d CE / d pooled       for dA          (detached, L_GGAM reaches A through S alone)

They go through A together (`attention.pull_back_to_channels`), and what is left of dA are its small factors.
The loss holds them, so that its backward only writes dA, scaled by what arrives: A is not read again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .attention import (
    ChannelMLP,
    Factors,
    Options,
    attend,
    features_grad,
    like_parameters,
    mlp_grads,
    pull_back_to_channels,
    pull_back_to_mean,
)
from .base import GGAMOutput
from .checks import compute_dtype, full_precision
from .classifier import Scores, score_gradient
from .contractions import get_stages
from .gradcam import mean_gradient
from .losses import cross_entropy, cross_entropy_grad, kl_guidance, kl_guidance_grad, reduce_batch


class FusedLoss(NamedTuple):
    """What `functional.fused_ggam_loss` returns."""

    loss: Tensor
    """() the only output with a gradient"""
    out: GGAMOutput
    """logits, attention, beta and guidance loss, detached"""


class LossTerms(NamedTuple):
    """The head's options that the loss depends on (checked)."""

    guidance_weight: float
    label_smoothing: float
    cam_at: str
    cam_class: str
    cam_norm: str
    cam_temperature: float
    divergence: str
    guidance_reduction: str


class HeldGradient(Function):
    """The loss unchanged; its backward scales the held factors, and writes dA from them."""

    @staticmethod
    def forward(
        loss: Tensor,
        features: Tensor,
        fc1_weight: Tensor | None,
        fc1_bias: Tensor | None,
        fc2_weight: Tensor | None,
        fc2_bias: Tensor | None,
        first: Tensor,
        channel: Tensor,
        grad_map: Tensor | None,
        grad_mean: Tensor | None,
        spatial: Tensor,
        peak_index: Tensor,
        dfc1_weight: Tensor | None,
        dfc1_bias: Tensor | None,
        dfc2_weight: Tensor | None,
        dfc2_bias: Tensor | None,
        options: Options,
        backend: str,
    ) -> Tensor:
        return loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:16])
        ctx.options, ctx.backend = Options(*inputs[16]), inputs[17]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "fused_ggam_loss can be differentiated once; create_graph=True and torch.func.grad ask for "
                "more: use GGAMLoss()(head(features, target), target)"
            )
        features, *mlp = ctx.saved_tensors[:5]
        first, channel, grad_map, grad_mean, spatial, peak_index, *parameters = ctx.saved_tensors[5:]
        # Strides first read inside the context make dynamo (torch 2.15) leave the caller's autocast off.
        _ = features.stride()
        with full_precision(features):
            da = None
            if ctx.needs_input_grad[1]:
                scaled_mean = None if grad_mean is None else grad_mean * grad
                factors = Factors(first, first * grad, channel * grad, grad_map, scaled_mean, None, None)
                da = features_grad(
                    get_stages(ctx.backend), features, ctx.options, spatial, peak_index, factors
                )
            scaled = [None if p is None else p * grad for p in parameters]
        return grad, da, *like_parameters(scaled, mlp), *[None] * 12


def fused_loss(
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    backend: str,
    score: Callable[[Tensor], Scores],
    target: Tensor,
    terms: LossTerms,
) -> FusedLoss:
    """See `functional.fused_ggam_loss`; features are (N, C, L), `score` runs the classifier."""
    stages = get_stages(backend)
    positions = features.shape[2]
    with torch.no_grad(), full_precision(features):
        attended = attend(stages, features.detach(), mlp, options)
    scores = score(attended.pooled)
    logits = scores.logits.to(compute_dtype(scores.logits))
    entropy = cross_entropy(logits, target, terms.label_smoothing)

    with torch.no_grad():
        dy = score_gradient(scores.logits, target, terms.cam_class)
        dce = cross_entropy_grad(logits.detach(), target, terms.label_smoothing)
        v, dz = scores.pull_back(torch.stack([dy.to(dce.dtype), dce]))
    with torch.no_grad(), full_precision(features):
        log_s = torch.log_softmax(attended.channel_logits, -1)
        explained = [v] if terms.cam_at == "features" else []
        *pulled_v, pulled_z = pull_back_to_channels(
            stages, features.detach(), options, attended, [*explained, dz]
        )
        if pulled_v:
            beta = mean_gradient(pull_back_to_mean(mlp, options, attended, pulled_v[0]), positions)
        else:
            beta = v / positions
        divergence = (log_s, beta, terms.cam_norm, terms.cam_temperature, terms.divergence)
        guidance = reduce_batch(kl_guidance(*divergence), terms.guidance_reduction)
        per_image = 1 if terms.guidance_reduction == "sum" else max(features.shape[0], 1)
        de = kl_guidance_grad(*divergence) * (terms.guidance_weight / per_image)
        f = pull_back_to_mean(mlp, options, attended, pulled_z, de)
        parameters = mlp_grads(mlp, attended, f)
    # The guidance has no graph here: the classifier's own gradient is that of the cross entropy.
    loss = HeldGradient.apply(
        entropy + terms.guidance_weight * guidance, features, *mlp,
        f.first, f.channel, f.grad_map, f.grad_mean, attended.spatial, attended.peak_index,
        *parameters, tuple(options), backend,
    )  # fmt: skip
    return FusedLoss(loss, GGAMOutput(scores.logits.detach(), log_s.exp(), attended.spatial, beta, guidance))
