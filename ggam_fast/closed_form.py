"""The mathematics of GGAM, written with a backend's stages: no autograd, no checks, no launches.

Forward, in the paper's order (A is (N, C, L)):

    g = mean_l A          e = FC2(relu(FC1(g)))        S = softmax_c(e)                      F_cg, F_cr
    U = channel_sum(A, S)                              T = softmax_l(U)                      F_cm, F_fa
    D = kappa A * T, pooled: mean, maximum, or D itself                                      F_sm

Backward, given v = d/d pooled:

    dT = kappa channel_sum(A, v) / L       dU = T (dT - <dT, T>)        dS = spatial_sum(A, dU)
    de = S (dS - <dS, S>)                  dg = (de W2 * [h > 0]) W1
    dA = kappa (v (x) T) / L + S (x) dU + (dg / L) (x) 1

Grad-CAM's channel weights are the mean of dA for the class score y, with v = d y / d pooled:

    beta = mean_l dA = ( kappa v * sum(T)/L + S * sum(dU) + dg ) / L      cam_at="features"
    beta = mean_l d y / d D = v / L                                      cam_at="attended", no pass over A

dA is a sum of outer products, so it is written without reading A.  A is the only tensor of its size that is
saved.  The guidance loss reaches A through e, so its part is in the same dA, which is written once.

kappa makes the weights that multiply A average to one.  T sums to one over L positions, so with kappa = 1
("printed") the mean of D is 1/L of a plain head's features.

Source of Grad-CAM: Selvaraju et al. (arXiv 1610.02391), eq. 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .backends.torch import Backend, CamTerms, PositionGuidance, PositionPull, PositionTerms
from .layer import LayerGradient
from .precision import as_type, compute_dtype


class Options(NamedTuple):
    """The options that choose the equations; `checks` has their values."""

    attention: str = "channel_spatial"
    spatial_norm: str = "softmax"
    pool_type: str = "avg"
    attention_scale: str = "unit_mean"
    position_guidance: str = "none"

    @property
    def guides_positions(self) -> bool:
        return self.position_guidance != "none"

    @property
    def uses_channel(self) -> bool:
        return self.attention in ("channel_spatial", "channel")

    @property
    def uses_spatial(self) -> bool:
        return self.attention in ("channel_spatial", "spatial")

    @property
    def dense(self) -> bool:
        return self.pool_type in ("flatten", "")

    def kappa(self, channels: int, positions: int) -> int:
        """The factor of A's weights: 1 for "printed", else one over the mean of the weights."""
        if self.attention_scale == "printed":
            return 1
        if self.uses_spatial:
            return 1 if self.spatial_norm == "sigmoid" else positions
        return channels if self.attention == "channel" else 1


class ChannelMLP(NamedTuple):
    """The layers of F_cr: fc1 (C/r, C), (C/r,) and fc2 (C, C/r), (C,).  None without channel attention."""

    fc1_weight: Tensor | None
    fc1_bias: Tensor | None
    fc2_weight: Tensor | None
    fc2_bias: Tensor | None


class Attended(NamedTuple):
    """The results of the forward.  Only a dense `pooled` is large; unused entries are empty."""

    pooled: Tensor  # (N, C), or D (N, C, L) for a dense classifier
    channel_logits: Tensor  # (N, C): e; zeros without channel attention, so that S = 1/C
    spatial: Tensor  # (N, L): T; ones without spatial attention
    log_spatial: Tensor  # (N, L): log T; empty unless positions are guided
    mean: Tensor  # (N, C): g
    hidden: Tensor  # (N, C/r): relu(FC1(g))
    total: Tensor  # (N,): sum(U)
    peak: Tensor  # (N, C): A at the argmax
    peak_index: Tensor  # (N, C): the argmax
    weights: Tensor  # (N, L): kappa T; empty for kappa = 1
    channel: Tensor | None = None  # (N, C): S, or None if it was not kept

    @property
    def spatial_weights(self) -> Tensor:
        """kappa T, the weights of A."""
        return self.weights if self.weights.dim() == 2 else self.spatial


class Factors(NamedTuple):
    """The small factors of dA and of the channel MLP's gradients."""

    first_mean: Tensor | None  # (N, C): mean_l of dA's first term; None: first kappa mean_l T / L
    first: Tensor  # (N, C): x, or the dense G
    channel: Tensor  # (N, C): S, or the weights of the dense G without spatial attention
    grad_map: Tensor | None  # (N, L): dU
    grad_mean: Tensor | None  # (N, C): dg
    grad_logits: Tensor | None  # (N, C): de
    grad_hidden: Tensor | None  # (N, C/r): dh, before the ReLU


def attend(
    backend: Backend, features: Tensor, mlp: ChannelMLP, options: Options, mean: Tensor | None = None
) -> Attended:
    """The forward.  `mean` (N, C) is the mean of A over positions; None computes it."""
    batch, channels, positions = features.shape
    kappa, uses_spatial = options.kappa(channels, positions), options.uses_spatial
    if options.uses_channel:
        mean = backend.spatial_sum(features, None, 1.0 / positions) if mean is None else mean
        hidden, logits = backend.channel_mlp(mean, *mlp)  # type: ignore[arg-type]
    else:
        logits = features.new_zeros((batch, channels), dtype=compute_dtype(features))
        mean, hidden = logits.new_empty(0), logits.new_empty(0)
    s = backend.softmax(logits)

    if uses_spatial:
        out, index, t, weights, total, log_t = backend.attended(
            features, s, options.spatial_norm, options.pool_type, kappa, options.guides_positions
        )
        multiplied = weights if kappa != 1 else t
    else:
        t, weights, total = logits.new_ones((batch, positions)), logits.new_empty(0), logits.new_empty(0)
        log_t = logits.new_empty(0)
        if options.uses_channel and options.pool_type == "avg":
            out, index = mean, features.new_empty(0, dtype=torch.int64)
        else:
            by_channel = _times(s, kappa) if options.uses_channel else torch.ones_like(s)
            out, index = backend.pool(features, None, by_channel, options.pool_type)

    if options.pool_type == "max":
        peak = out
        pooled = peak * multiplied.gather(1, index) if uses_spatial else peak.clone()
    else:
        pooled, peak = out, logits.new_empty(0)
    if options.attention == "channel" and not options.dense:  # D = kappa S * A: pool first, then scale
        pooled = backend.multiply(s, pooled, kappa)
    return Attended(pooled, logits, t, log_t, mean, hidden, total, peak, index, weights, s)


def _times(x: Tensor, kappa: int) -> Tensor:
    return x if kappa == 1 else x * kappa


class Pulled(NamedTuple):
    """A gradient of the pooled features, pulled back as far as A is read."""

    first_mean: Tensor | None  # (N, C): mean_l of dA's first term; None: first kappa mean_l T / L
    first: Tensor  # (N, C): x, or the dense G
    softmax: Tensor  # (N, C): S
    channel: Tensor  # (N, C): S, or the weights of the dense G without spatial attention
    grad_map: Tensor | None  # (N, L): dU
    grad_channel: Tensor | None  # (N, C): dS
    positions: PositionGuidance | None = None  # by dT, if it was asked for


def pull_back(
    backend: Backend,
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    attended: Attended,
    grad_pooled: Tensor,
    grad_logits: Tensor | None = None,
    grad_spatial: Tensor | None = None,
    logits_scale: Tensor | None = None,
    pull: PositionPull | None = None,
) -> Factors:
    """The backward down to dA's factors.  Grad-CAM calls it with grad_pooled = d y^k / d pooled.

    `grad_logits` times the scalar `logits_scale` is added to d e: the guidance loss's part, for example.
    `pull` is added to dU.
    """
    (pulled,) = pull_back_to_channels(backend, features, options, attended, [grad_pooled], grad_spatial, pull)
    return factors_of(backend, mlp, attended, pulled, grad_logits, logits_scale)


def factors_of(
    backend: Backend,
    mlp: ChannelMLP,
    attended: Attended,
    pulled: Pulled,
    grad_logits: Tensor | None = None,
    logits_scale: Tensor | None = None,
) -> Factors:
    """The rest of `pull_back`."""
    de = None
    if pulled.grad_channel is not None:
        de = backend.softmax_grad(pulled.grad_channel, pulled.softmax, grad_logits, logits_scale)
    return pull_back_to_mean(backend, mlp, attended, pulled, de)


def pull_back_to_channels(
    backend: Backend,
    features: Tensor,
    options: Options,
    attended: Attended,
    grads_pooled: Sequence[Tensor],
    grad_spatial: Tensor | None = None,
    pull: PositionPull | None = None,
    terms: PositionTerms | None = None,
    weight: float = 1.0,
) -> list[Pulled]:
    """dU and dS for one or two gradients of the pooled features (N, ...).  Only this part reads A.

    With average pooling two gradients share their reads of A.  `grad_spatial` needs a single gradient.
    `pull` is added to the last dU.  With `terms` the first gradient's dT guides T: `Pulled.positions`.  That
    guidance times the weight is added to the dU of a second gradient.
    """
    t, s = attended.spatial, attended.channel
    s = backend.softmax(attended.channel_logits) if s is None else s
    norm, total = options.spatial_norm, attended.total
    _, channels, positions = features.shape
    if options.pool_type == "avg" and options.attention == "channel_spatial":
        scale = options.kappa(channels, positions) / positions
        guided = None
        if terms is None:
            pairs = backend.attention_backward(
                features, grads_pooled, scale, grad_spatial, t, total, norm, pull
            )
        else:
            pairs, guided = backend.guided_attention_backward(
                features, grads_pooled, scale, t, total, norm, terms, weight
            )
        found = []
        for first, (du, ds) in zip(grads_pooled, pairs, strict=True):
            found.append(Pulled(None, first, s, s, du, ds, guided))
        return found
    given = features, options, attended, s
    if len(grads_pooled) == 1:
        return [_pull_back_one(backend, *given, grads_pooled[0], grad_spatial, pull, terms)]
    of_class = _pull_back_one(backend, *given, grads_pooled[0], None, None, terms)
    if terms is not None and of_class.positions is not None:
        pull = PositionPull(of_class.positions.target, terms.share, weight)
    return [of_class, _pull_back_one(backend, *given, grads_pooled[1], None, pull, None)]


def _pull_back_one(
    backend: Backend,
    features: Tensor,
    options: Options,
    attended: Attended,
    s: Tensor,
    grad_pooled: Tensor,
    grad_spatial: Tensor | None,
    pull: PositionPull | None,
    terms: PositionTerms | None,
) -> Pulled:
    """All cases but average pooling with both attentions."""
    _, channels, positions = features.shape
    kappa = options.kappa(channels, positions)
    t, total, norm = attended.spatial, attended.total, options.spatial_norm
    scaled = options.attention == "channel"
    channel = s
    ds: Tensor | None = None
    du: Tensor | None = None
    guided: PositionGuidance | None = None
    first_mean: Tensor | None = None
    first = grad_pooled
    if options.pool_type == "avg":
        if scaled:
            ds = backend.multiply(grad_pooled, attended.mean, kappa)
            first = backend.multiply(first, s, kappa)
        if terms is not None:
            du, guided = backend.guided_spatial_attention_grad(
                features, first, kappa / positions, t, total, norm, terms
            )
        elif options.uses_spatial:
            du = backend.spatial_attention_grad(
                features, first, kappa / positions, grad_spatial, t, total, norm, pull
            )
    elif options.pool_type == "max":
        if scaled:
            ds = backend.multiply(grad_pooled, attended.peak, kappa)
            first = backend.multiply(first, s, kappa)
        if options.uses_spatial:
            dt = backend.position_scatter(first * attended.peak, attended.peak_index, positions)
            du = backend.spatial_norm_grad(dt, kappa, grad_spatial, t, total, norm, pull)
            guided = None if terms is None else backend.position_guidance(dt, terms)
        weights = attended.spatial_weights if options.uses_spatial else t
        first_mean = first * weights.gather(1, attended.peak_index) / positions
    else:
        first_mean, dots, dt = backend.grad_cam_means(
            features, grad_pooled, attended.spatial_weights if options.uses_spatial else None
        )
        if scaled:
            channel = _times(s, kappa)
            ds, first_mean = _times(dots, kappa), first_mean * channel
        elif not options.uses_spatial:
            channel = torch.ones_like(s)
        if options.uses_spatial:
            du = backend.spatial_norm_grad(dt, kappa, grad_spatial, t, total, norm, pull)
            guided = None if terms is None else backend.position_guidance(dt, terms)
    if options.uses_channel and du is not None:
        ds = backend.spatial_sum(features, du)
    return Pulled(first_mean, first, s, channel, du, ds, guided)


def pull_back_to_mean(
    backend: Backend, mlp: ChannelMLP, attended: Attended, pulled: Pulled, de: Tensor | None
) -> Factors:
    """Pull `de`, the gradient of the channel logits, back through the channel MLP to dg.  None gives None."""
    first_mean, first, _, channel, du, *_ = pulled
    if de is None:
        return Factors(first_mean, first, channel, du, None, None, None)
    assert mlp.fc1_weight is not None
    assert mlp.fc2_weight is not None
    dh, dg = backend.channel_mlp_grad(de, attended.hidden, mlp.fc1_weight, mlp.fc2_weight)
    return Factors(first_mean, first, channel, du, dg, de, dh)


def cam_terms(f: Factors, attended: Attended) -> CamTerms:
    """The terms of beta = mean_l dA, not yet added, from the factors `f` of dA = d y^k / d A."""
    if f.first_mean is None:
        return CamTerms(f.first, attended.spatial_weights, f.grad_map, f.grad_mean)
    return CamTerms(f.first_mean, None, f.grad_map, f.grad_mean)


def cam_terms_of(
    backend: Backend,
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    attended: Attended,
    grad_pooled: Tensor,
    cam_at: str,
    terms: PositionTerms | None = None,
) -> tuple[CamTerms, Tensor | None, PositionGuidance | None]:
    """The terms of beta for v = `grad_pooled` = dy/dpooled (dy/dD if dense), and S if a term needs it.

    With `terms` also the guidance of T.
    """
    positions = features.shape[2]
    if cam_at == "features":
        (pulled,) = pull_back_to_channels(backend, features, options, attended, [grad_pooled], terms=terms)
        f = factors_of(backend, mlp, attended, pulled)
        return cam_terms(f, attended), f.channel, pulled.positions
    guided = None
    if terms is not None:
        guided = backend.position_guidance(
            class_map(backend, features, options, attended, grad_pooled), terms
        )
    if options.dense:
        return CamTerms(backend.spatial_sum(grad_pooled, None, 1.0 / positions)), None, guided
    # beta = v / L, the mean of dy/dD over positions.
    ones = features.new_ones((features.shape[0], positions), dtype=grad_pooled.dtype)
    return CamTerms(grad_pooled, ones), None, guided


def class_map(
    backend: Backend, features: Tensor, options: Options, attended: Attended, grad_pooled: Tensor
) -> Tensor:
    """dT / kappa (N, L), times L for average pooling, or in parts (N, P, L), for v = `grad_pooled`.

    Average pooling reads A once, dense pooling A and v once.
    """
    if options.pool_type == "avg":
        return backend.channel_sum(features, grad_pooled)
    if options.pool_type == "max":
        return backend.position_scatter(grad_pooled * attended.peak, attended.peak_index, features.shape[2])
    return backend.grad_cam_means(features, grad_pooled, attended.spatial_weights)[2]


def features_grad(
    backend: Backend,
    features: Tensor,
    options: Options,
    weights: Tensor,
    peak_index: Tensor,
    f: Factors,
    scale: Tensor | None = None,
) -> Tensor:
    """dA times the scalar `scale`, from its factors and the weights kappa T of A."""
    return backend.features_grad(
        features, options.pool_type, f.first, peak_index, weights if options.uses_spatial else None,
        f.grad_map, f.channel, f.grad_mean, scale,
    )  # fmt: skip


def mlp_factors(attended: Attended, f: Factors) -> list[tuple[Tensor, Tensor]]:
    """(dy, x) of fc1 and of fc2: dy^T x is the weight's gradient.  Empty without channel attention."""
    if f.grad_hidden is None or f.grad_logits is None:
        return []
    return [(f.grad_hidden, attended.mean), (f.grad_logits, attended.hidden)]


class Held(NamedTuple):
    """The factors of dA, and the layers' gradients or their factors."""

    factors: Factors
    weights: Tensor  # (N, L): kappa T
    peak_index: Tensor
    layers: list[LayerGradient]  # of the classifier, last layer first, then of fc1 and fc2


def hold(mlp: ChannelMLP, attended: Attended, f: Factors, layers: Sequence[LayerGradient]) -> Held:
    """The factors together with those of the channel MLP; `layers` has the classifier's."""
    parameters = [(mlp.fc1_weight, mlp.fc1_bias), (mlp.fc2_weight, mlp.fc2_bias)]
    of_mlp = [
        LayerGradient(*p, *pair, True) for p, pair in zip(parameters, mlp_factors(attended, f), strict=False)
    ]
    return Held(f, attended.spatial_weights, attended.peak_index, [*layers, *of_mlp])


def held_features_grad(
    backend: Backend, features: Tensor, options: Options, held: Held, scale: Tensor | None = None
) -> Tensor:
    """dA times the scalar `scale`."""
    return features_grad(backend, features, options, held.weights, held.peak_index, held.factors, scale)


def held_layer_grads(
    backend: Backend, held: Held, scale: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """The gradients of each held layer's weight and bias times the scalar `scale`."""
    pairs = [(layer.left, layer.right) for layer in held.layers]
    return held_grads(backend, pairs, [layer.product for layer in held.layers], scale)


def mlp_grads(backend: Backend, attended: Attended, f: Factors) -> list[Tensor | None]:
    """d fc1 and d fc2 in the type of the small tensors; None without channel attention."""
    factors = mlp_factors(attended, f)
    return [x for pair in backend.layer_grads(factors) for x in pair] if factors else [None] * 4


def held_grads(
    backend: Backend,
    layers: Sequence[tuple[Tensor, Tensor]],
    products: Sequence[bool],
    scale: Tensor | None,
) -> list[tuple[Tensor, Tensor]]:
    """The gradients of each layer's weight and bias, times the scale.

    A pair in `layers` is (dy, x) if its entry in `products` is True, else the two gradients themselves.
    """
    factors = [pair for pair, product in zip(layers, products, strict=True) if product]
    vectors = [x for pair, product in zip(layers, products, strict=True) if not product for x in pair]
    pairs, whole = backend.parameter_grads(factors, vectors, scale)
    multiplied, rest, found = iter(pairs), iter(whole), []
    for product in products:
        found.append(next(multiplied) if product else (next(rest), next(rest)))
    return found


def like_parameters(grads: Sequence[Tensor | None], mlp: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Each gradient, converted to the type of its parameter."""
    pairs = zip(grads, mlp, strict=True)
    return [None if d is None or p is None else as_type(d, p.dtype) for d, p in pairs]
