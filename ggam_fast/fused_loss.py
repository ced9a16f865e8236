"""Cross entropy and guidance with the gradient of A in hand: beta and the backward share their reads of A.

    loss = CE(logits, target) + guidance_weight * L_GGAM(S, beta)

Once the classifier has run, both gradients of the pooled features are known in closed form:

    v  = d y / d pooled        for beta        (y the score that Grad-CAM explains)
    dz = d CE / d pooled       for dA          (detached, L_GGAM reaches A through S alone)

They go through A together (`attention.pull_back_to_channels`), and what is left of dA are its small factors.
The factors of the parameters' gradients come on the way (a classifier of unknown layers has autograd's).
The loss holds them all, so that its backward only multiplies them out, scaled by what arrives: A is not read
again.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention import (
    ChannelMLP,
    Factors,
    Options,
    attend,
    cam_terms,
    features_grad,
    pull_back_to_channels,
    pull_back_to_mean,
)
from .autograd import Function
from .base import GGAMOutput
from .checks import as_type, compute_dtype, full_precision
from .classifier import LayerGradient, Scores, probabilities, score_gradient
from .contractions import get_stages
from .losses import cross_entropy, cross_entropy_grad, reduce_batch
from .stages import CamTerms, Stages, scaled, softmax_grad


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


def _alone(x: Tensor) -> Tensor:
    """The same; of a part of something larger a copy, which does not keep that in memory."""
    if torch.compiler.is_compiling() or (x._base is not None and x._base.numel() > x.numel()):
        return x.clone()
    return x


def _smaller(stages: Stages, layers: Sequence[LayerGradient]) -> list[LayerGradient]:
    """The same, where a layer has no more elements than its factors as the gradients themselves; not where
    the batch's size is a symbol, which a comparison would bind."""

    def shrinks(layer: LayerGradient) -> bool:
        weight, _, left, right, product = layer
        symbolic = torch.compiler.is_compiling() or not isinstance(left.shape[0], int)
        if symbolic or not product or weight is None or not weight.requires_grad:
            return False
        return left.shape[1] * right.shape[1] <= left.numel() + right.numel()

    chosen = [shrinks(layer) for layer in layers]
    found = iter(
        stages.layer_grads([(layer.left, layer.right) for layer, c in zip(layers, chosen, strict=True) if c])
    )
    return [
        LayerGradient(layer.weight, layer.bias, *next(found), product=False) if c else layer
        for layer, c in zip(layers, chosen, strict=True)
    ]


class HeldGradient(Function):
    """CE + guidance_weight * guidance; its backward scales the held factors, and writes dA from them."""

    @staticmethod
    def forward(
        entropy: Tensor,
        guidance: Tensor,
        features: Tensor,
        first: Tensor,
        channel: Tensor,
        grad_map: Tensor | None,
        grad_mean: Tensor | None,
        spatial: Tensor,
        peak_index: Tensor,
        guidance_weight: float,
        options: Options,
        backend: str,
        products: tuple[bool, ...],
        *layers: Tensor | None,  # weight, bias, left, right of each `LayerGradient`
    ) -> Tensor:
        return torch.add(entropy, guidance, alpha=guidance_weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        flat = inputs[13:]
        ctx.save_for_backward(*inputs[2:9], *flat[2::4], *flat[3::4])
        ctx.options, ctx.backend, ctx.products = Options(*inputs[10]), *inputs[11:13]
        ctx.types = [None if p is None else p.dtype for p in (*flat[0::4], *flat[1::4])]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "fused_ggam_loss can be differentiated once; create_graph=True and torch.func.grad ask for "
                "more: use GGAMLoss()(head(features, target), target)"
            )
        features, first, channel, grad_map, grad_mean, spatial, peak_index, *rows = ctx.saved_tensors
        stages, count = get_stages(ctx.backend), len(ctx.products)
        lefts, rights = rows[:count], rows[count:]
        # Strides first read inside the context make dynamo (torch 2.15) leave the caller's autocast off.
        _ = features.stride()
        da = None
        with full_precision(features):
            if ctx.needs_input_grad[2]:
                f = Factors(None, first, channel, grad_map, grad_mean, None, None)
                da = features_grad(stages, features, ctx.options, spatial, peak_index, f, grad)
            layers = list(zip(lefts, rights, strict=True))
            factors = [pair for pair, product in zip(layers, ctx.products, strict=True) if product]
            rest = [
                x for pair, product in zip(layers, ctx.products, strict=True) if not product for x in pair
            ]
            multiplied, whole = iter(stages.layer_grads(factors, grad)), iter(scaled(rest, grad))
            grads: list[Tensor | None] = []
            for i, product in enumerate(ctx.products):
                pair = next(multiplied) if product else (next(whole), next(whole))
                for gradient, dtype in zip(pair, (ctx.types[i], ctx.types[count + i]), strict=True):
                    grads.append(None if dtype is None else as_type(gradient, dtype))
                grads += [None, None]
        return grad, None, da, *[None] * 10, *grads


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
    logits = as_type(scores.logits, compute_dtype(scores.logits))
    entropy = cross_entropy(logits, target, terms.label_smoothing)

    with torch.no_grad():
        logits = logits.detach()
        q = probabilities(logits, target)
        dy = q if terms.cam_class == "label" else score_gradient(logits, target, terms.cam_class)
        dce = cross_entropy_grad(logits, q, terms.label_smoothing, hard=not target.is_floating_point())
        pulled, layers = scores.pull_back([dy, dce])
    with torch.no_grad(), full_precision(features):
        at_features = terms.cam_at == "features"
        *pulled_v, pulled_z = pull_back_to_channels(
            stages, features.detach(), options, attended, pulled if at_features else pulled[1:]
        )
        if at_features:
            (pulled_y,) = pulled_v
            ds, s = pulled_y.grad_channel, pulled_y.channel
            de = None if ds is None else softmax_grad(ds, s)
            beta_terms = cam_terms(pull_back_to_mean(stages, mlp, attended, pulled_y, de), attended.spatial)
        else:
            beta_terms = CamTerms(pulled[0] / positions)
        beta, s, per_image, de = stages.guidance(
            attended.channel_logits, beta_terms, pulled_z.grad_channel, positions, terms.cam_norm,
            terms.cam_temperature, terms.divergence, terms.guidance_weight,
            mean=terms.guidance_reduction == "mean",
        )  # fmt: skip
        guidance = reduce_batch(per_image, terms.guidance_reduction)
        f = pull_back_to_mean(stages, mlp, attended, pulled_z, de if options.uses_channel else None)
        if f.grad_hidden is not None and f.grad_logits is not None:
            layers = [
                *layers,
                LayerGradient(mlp.fc1_weight, mlp.fc1_bias, f.grad_hidden, attended.mean, True),
                LayerGradient(mlp.fc2_weight, mlp.fc2_bias, f.grad_logits, attended.hidden, True),
            ]
        layers = _smaller(stages, layers)
    # The guidance has no graph here: the classifier's own gradient is that of the cross entropy.
    loss = HeldGradient.apply(
        entropy, guidance, features, _alone(f.first), f.channel, f.grad_map, f.grad_mean, attended.spatial,
        attended.peak_index, terms.guidance_weight, tuple(options), backend,
        tuple(layer.product for layer in layers), *(x for layer in layers for x in layer[:4]),
    )  # fmt: skip
    return FusedLoss(loss, GGAMOutput(scores.logits.detach(), s, attended.spatial, beta, guidance))
