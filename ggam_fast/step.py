"""One guided step in closed form.  The drop-in form pulls back one gradient at a time, the fused loss two.

    loss = CE(logits, target) + guidance_weight * L_GGAM(S, beta)

Once the classifier has run, both gradients of the pooled features are known in closed form:

    v  = d y / d pooled        for beta        (y is the score that Grad-CAM explains)
    dz = d CE / d pooled       for dA          (with beta detached, L_GGAM reaches A through S alone)

The fused loss pulls both through A together (`closed_form.pull_back_to_channels`) and keeps the small factors
of dA and of the parameters' gradients.  (Autograd computes the gradients of a custom classifier.)  Its
backward multiplies the factors out, times the incoming gradient, and does not read A again.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .autograd import Attention, Guidance, HeldGradient, forward_mode
from .backends.registry import full_precision, get_backend, get_differentiable
from .backends.torch import Backend, Guided, cam_weights
from .base import GGAMOutput
from .classifier.rules import LayerGradient, Pullback, Scores, scores
from .closed_form import (
    Attended,
    ChannelMLP,
    Factors,
    Options,
    attend,
    cam_terms,
    cam_terms_of,
    features_grad,
    held_grads,
    mlp_factors,
    pull_back,
    pull_back_to_channels,
    pull_back_to_mean,
)
from .entropy import cross_entropy, reduce_batch
from .layer import Layer
from .precision import as_type, compute_dtype


def ggam_attention(
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    backend: str,
    differentiable: bool = False,
) -> Attended:
    """`attend` with gradients if they are enabled.

    It runs as one node, or with `differentiable` through the contractions.
    """
    with full_precision(features):
        if differentiable or forward_mode():
            return attend(get_differentiable(backend), features, mlp, options)
        if not torch.is_grad_enabled():
            return attend(get_backend(backend), features, mlp, options)
        return Attended(*Attention.apply(features, *mlp, *options, backend))


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

    With `differentiable`, beta has derivatives of every order; otherwise it is detached.
    """
    graph = nullcontext() if differentiable else torch.no_grad()
    forward = differentiable or forward_mode()
    stages = get_differentiable(backend) if forward else get_backend(backend)
    with graph, full_precision(features):
        terms, s = cam_terms_of(stages, features, mlp, options, attended, grad_pooled, cam_at)
        beta = cam_weights(terms, s, features.shape[2])
        return beta if differentiable else beta.detach()  # of forward mode too


class LossTerms(NamedTuple):
    """The options of the guidance and the loss, already checked."""

    cam_at: str
    cam_class: str
    cam_norm: str
    divergence: str
    guidance_reduction: str
    ignore_index: int | None
    cam_temperature: float
    guidance_weight: float = 1.0
    label_smoothing: float = 0.0


def cam_and_guidance(
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    attended: Attended,
    grad_pooled: Tensor,
    share: Tensor | None,
    backend: str,
    terms: LossTerms,
) -> tuple[Tensor, Tensor, Tensor]:
    """beta (N, C), detached, S (N, C), and the guidance loss, reduced over the images that count."""
    stages, positions, logits = get_backend(backend), features.shape[2], attended.channel_logits
    norm = (terms.cam_norm, terms.cam_temperature, terms.divergence)
    mean = terms.guidance_reduction == "mean"
    needs_graph = torch.is_grad_enabled()
    with torch.no_grad(), full_precision(features):
        beta_terms, _ = cam_terms_of(stages, features, mlp, options, attended, grad_pooled, terms.cam_at)
        if not needs_graph:
            found = stages.guided_loss(logits, beta_terms, None, positions, *norm, 1.0, mean, share, None)
            return found.cam_weights, found.channel, found.guidance
    with full_precision(features):
        beta, s, per_image = Guidance.apply(logits, *beta_terms, positions, norm, backend)[:3]
        return beta, s, reduce_batch(per_image, terms.guidance_reduction, share)


class Seen(NamedTuple):
    """The results of the drop-in form's forward that its backward needs."""

    attended: Attended
    pull_back: Pullback
    grad_logits: Tensor | None  # (N, C): de of the guidance loss
    given: list[tuple[Tensor, ...]]  # inputs of the classifier's layers, see `classifier.rules.scores`


def drop_in_forward(
    backend: str,
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    layers: Sequence[Layer],
    target: Tensor | None,
    terms: LossTerms | None,
    mean: Tensor | None = None,
) -> tuple[GGAMOutput, Seen]:
    """The head's output for known layers, without a graph.  Without a target only the logits are valid.

    `mean` (N, C) is the mean of A over positions; None computes it.
    """
    stages = get_backend(backend)
    given: list[tuple[Tensor, ...]] = []
    attended = attend(stages, features, mlp, options, mean)
    result = scores(layers, attended.pooled, True, backend, given)
    if terms is None or target is None:
        out = GGAMOutput(result.logits, *[attended.spatial] * 4)  # placeholders
        return out, Seen(attended, result.pull_back, None, given)
    seed, share = stages.class_scores(result.logits, target, terms.cam_class, terms.ignore_index)
    (v,), _ = result.pull_back([seed])
    beta_terms, _ = cam_terms_of(stages, features, mlp, options, attended, v, terms.cam_at)
    found = stages.guided_loss(
        attended.channel_logits, beta_terms, None, features.shape[2], terms.cam_norm, terms.cam_temperature,
        terms.divergence, 1.0, terms.guidance_reduction == "mean", share, None,
    )  # fmt: skip
    out = GGAMOutput(result.logits, found.channel, attended.spatial, found.cam_weights, found.guidance)
    return out, Seen(attended, result.pull_back, found.grad_logits, given)


def drop_in_backward(
    backend: str,
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    seen: Seen,
    grad_logits: Tensor,
    grad_guidance: Tensor | None = None,
    *,
    needs_features: bool,
    needs_parameters: bool,
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None]], list[tuple[Tensor, Tensor]] | None]:
    """dA, the weights and biases, and their gradients, given those of the logits and the guidance loss."""
    held = drop_in_factors(backend, features, mlp, options, seen, grad_logits, grad_guidance)
    da = held_features_grad(backend, features, options, held) if needs_features else None
    pairs = held_layer_grads(backend, held) if needs_parameters else None
    return da, [(layer.weight, layer.bias) for layer in held.layers], pairs


def drop_in_factors(
    backend: str,
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    seen: Seen,
    grad_logits: Tensor,
    grad_guidance: Tensor | None = None,
    grad_channel: Tensor | None = None,
    grad_spatial: Tensor | None = None,
) -> "Held":
    """The factors for `drop_in_backward`, given gradients of the logits, the guidance loss, S and T."""
    stages, attended = get_backend(backend), seen.attended
    (dz,), layers = seen.pull_back([grad_logits])
    de, scale = seen.grad_logits, grad_guidance
    if grad_channel is not None:
        assert attended.channel is not None
        de, scale = stages.softmax_grad(grad_channel, attended.channel, de, scale), None
    f = pull_back(stages, features, mlp, options, attended, dz, de, grad_spatial, scale)
    layers = [*layers, *_mlp_layers(mlp, attended, f)]
    return Held(f, attended.spatial_weights, attended.peak_index, layers)


def _mlp_layers(mlp: ChannelMLP, attended: Attended, f: Factors) -> list[LayerGradient]:
    parameters = [(mlp.fc1_weight, mlp.fc1_bias), (mlp.fc2_weight, mlp.fc2_bias)]
    factors = mlp_factors(attended, f)
    return [LayerGradient(*p, *pair, True) for p, pair in zip(parameters, factors, strict=False)]


class FusedLoss(NamedTuple):
    """The result of `functional.fused_ggam_loss`."""

    loss: Tensor
    """() the only output with a gradient"""
    out: GGAMOutput
    """logits, attention, beta and guidance loss, detached"""


def _alone(x: Tensor) -> Tensor:
    """x, copied if it is a view of a larger tensor, which the view would keep in memory."""
    if torch.compiler.is_compiling() or (x._base is not None and x._base.numel() > x.numel()):
        return x.clone()
    return x


def _smaller(backend: Backend, layers: Sequence[LayerGradient]) -> list[LayerGradient]:
    """The layers, with the gradients themselves in place of factors that are no smaller.

    A symbolic batch size keeps the factors, because a comparison would fix the size.
    """

    def shrinks(layer: LayerGradient) -> bool:
        weight, _, left, right, product = layer
        symbolic = torch.compiler.is_compiling() or not isinstance(left.shape[0], int)
        if symbolic or not product or weight is None or not weight.requires_grad:
            return False
        return left.shape[1] * right.shape[1] <= left.numel() + right.numel()

    chosen = [shrinks(layer) for layer in layers]
    found = iter(
        backend.layer_grads([(layer.left, layer.right) for layer, c in zip(layers, chosen, strict=True) if c])
    )
    return [
        LayerGradient(layer.weight, layer.bias, *next(found), product=False) if c else layer
        for layer, c in zip(layers, chosen, strict=True)
    ]


class Held(NamedTuple):
    """The factors of dA, and the layers' gradients or their factors."""

    factors: Factors
    weights: Tensor  # (N, L): kappa T
    peak_index: Tensor
    layers: list[LayerGradient]


def fused_forward(
    backend: str,
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    score: Callable[[Tensor], Scores],
    target: Tensor,
    terms: LossTerms,
    mean: Tensor | None = None,
    known: bool = True,
) -> tuple[GGAMOutput, Guided, Held]:
    """The forward of the fused loss, with both gradients pulled back.  `score` runs the classifier.

    `mean` (N, C) is the mean of A over positions; None computes it.  Nothing has a graph except a classifier
    that is not `known`; it also runs under the caller's autocast.
    """
    stages, alone = get_backend(backend), full_precision(features)
    features, positions = features.detach(), features.shape[2]
    scored = None
    with torch.no_grad(), alone:
        attended = attend(stages, features, mlp, options, mean)
        if known:
            scored = score(attended.pooled)
    if scored is None:
        scored = score(attended.pooled)
    with torch.no_grad(), alone:
        logits = scored.logits
        if not known:
            logits = as_type(logits.detach(), compute_dtype(logits))
        entropy = stages.cross_entropy(
            logits, target, terms.label_smoothing, terms.cam_class, terms.ignore_index
        )
    with torch.no_grad(), alone if known else nullcontext():
        pulled, layers = scored.pull_back([entropy.score, entropy.grad])
    with torch.no_grad(), alone:
        at_features = terms.cam_at == "features"
        *pulled_v, pulled_z = pull_back_to_channels(
            stages, features, options, attended, pulled if at_features else pulled[1:]
        )
        if at_features:
            (pulled_y,) = pulled_v
            ds = pulled_y.grad_channel
            de = None if ds is None else stages.softmax_grad(ds, pulled_y.softmax)
            beta_terms = cam_terms(pull_back_to_mean(stages, mlp, attended, pulled_y, de), attended)
        else:
            beta_terms, _ = cam_terms_of(stages, features, mlp, options, attended, pulled[0], terms.cam_at)
        guided = stages.guided_loss(
            attended.channel_logits, beta_terms, pulled_z.grad_channel, positions, terms.cam_norm,
            terms.cam_temperature, terms.divergence, terms.guidance_weight,
            terms.guidance_reduction == "mean", entropy.share, entropy.losses,
        )  # fmt: skip
        de = guided.grad_logits if options.uses_channel else None
        f = pull_back_to_mean(stages, mlp, attended, pulled_z, de)
        layers += _mlp_layers(mlp, attended, f)
    out = GGAMOutput(scored.logits, guided.channel, attended.spatial, guided.cam_weights, guided.guidance)
    return out, guided, Held(f, attended.spatial_weights, attended.peak_index, layers)


def held_features_grad(
    backend: str, features: Tensor, options: Options, held: Held, scale: Tensor | None = None
) -> Tensor:
    """dA times the scalar `scale`."""
    stages = get_backend(backend)
    return features_grad(stages, features, options, held.weights, held.peak_index, held.factors, scale)


def held_layer_grads(backend: str, held: Held, scale: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    """The gradients of each held layer's weight and bias times the scalar `scale`."""
    pairs = [(layer.left, layer.right) for layer in held.layers]
    return held_grads(get_backend(backend), pairs, [layer.product for layer in held.layers], scale)


def held_loss(
    features: Tensor,
    options: Options,
    backend: str,
    entropy: Tensor,
    guidance: Tensor | None,
    held: Held,
    terms: LossTerms,
) -> Tensor:
    """entropy + guidance_weight * guidance, or `entropy` alone, as one node that holds its gradients."""
    f, weights, peak_index, layers = held
    stages = get_backend(backend)
    with torch.no_grad(), full_precision(features):
        layers = _smaller(stages, layers)
    return HeldGradient.apply(
        entropy, guidance, features, _alone(f.first), f.channel, f.grad_map, f.grad_mean, weights, peak_index,
        terms.guidance_weight, tuple(options), backend, tuple(layer.product for layer in layers),
        *(x for layer in layers for x in layer[:4]),
    )  # fmt: skip


def fused_loss(
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    backend: str,
    score: Callable[[Tensor], Scores],
    known: bool,
    target: Tensor,
    terms: LossTerms,
) -> FusedLoss:
    """`functional.fused_ggam_loss` of features (N, C, L).

    The cross entropy of a classifier that is not `known` keeps its graph for autograd.
    """
    out, guided, held = fused_forward(backend, features, mlp, options, score, target, terms, known=known)
    entropy, guidance = guided.loss, None
    if not known:
        logits = as_type(out.logits, compute_dtype(out.logits))
        entropy = cross_entropy(logits, target, terms.label_smoothing, terms.ignore_index)
        guidance = guided.guidance
    loss = held_loss(features, options, backend, entropy, guidance, held, terms)
    return FusedLoss(loss, GGAMOutput(out.logits.detach(), *out[1:]))
