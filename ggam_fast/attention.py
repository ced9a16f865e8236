"""GGAM's attention as one autograd node over A.

Forward, in the paper's order (A is (N, C, L)):

    g = mean_l A          e = FC2(relu(FC1(g)))        S = softmax_c(e)                      F_cg, F_cr
    U = channel_sum(A, S)                              T = softmax_l(U)                      F_cm, F_fa
    D = A * T, pooled: mean, maximum, or D itself                                            F_sm

Backward, given v = d/d pooled:

    dT = channel_sum(A, v) / L       dU = T (dT - <dT, T>)        dS = spatial_sum(A, dU)
    de = S (dS - <dS, S>)            dg = (de W2 * [h > 0]) W1
    dA = (v (x) T) / L + S (x) dU + (dg / L) (x) 1

dA is a sum of outer products: it is written, A is not read for it, and nothing of A's size is saved
but A.  One node means one write: the guidance loss reaches A through e, in the same dA.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd import Function
from .checks import as_type, compute_dtype, full_precision
from .contractions import DifferentiableStages, get_stages
from .stages import CamTerms, Stages, softmax_grad


class Options(NamedTuple):
    """What of the method is switched on (checked strings, see `checks`)."""

    attention: str = "channel_spatial"
    spatial_norm: str = "softmax"
    pool_type: str = "avg"

    @property
    def uses_channel(self) -> bool:
        return self.attention in ("channel_spatial", "channel")

    @property
    def uses_spatial(self) -> bool:
        return self.attention in ("channel_spatial", "spatial")

    @property
    def dense(self) -> bool:
        return self.pool_type in ("flatten", "")


class ChannelMLP(NamedTuple):
    """F_cr's two layers: fc1 (C/r, C), (C/r,) and fc2 (C, C/r), (C,); None without channel attention."""

    fc1_weight: Tensor | None
    fc1_bias: Tensor | None
    fc2_weight: Tensor | None
    fc2_bias: Tensor | None


class Attended(NamedTuple):
    """Everything the forward knows, small but for a dense `pooled`; unused entries are empty."""

    pooled: Tensor  # (N, C), or D (N, C, L) for a dense classifier
    channel_logits: Tensor  # (N, C): e; zeros without channel attention, so that S = 1/C
    spatial: Tensor  # (N, L): T; ones without spatial attention
    mean: Tensor  # (N, C): g
    hidden: Tensor  # (N, C/r): relu(FC1(g))
    total: Tensor  # (N,): sum(U)
    peak: Tensor  # (N, C): A at the argmax
    peak_index: Tensor  # (N, C): the argmax
    channel: Tensor | None = None  # (N, C): S, where it is at hand


class Factors(NamedTuple):
    """The small factors of dA, and what the MLP's own gradients need."""

    first_mean: Tensor | None  # (N, C): mean_l of dA's first term; None: first mean_l T / L
    first: Tensor  # (N, C): x, or the dense G
    channel: Tensor  # (N, C): S (1 where nothing weights the dense G)
    grad_map: Tensor | None  # (N, L): dU
    grad_mean: Tensor | None  # (N, C): dg
    grad_logits: Tensor | None  # (N, C): de
    grad_hidden: Tensor | None  # (N, C/r): dh, before the ReLU


def attend(stages: Stages, features: Tensor, mlp: ChannelMLP, options: Options) -> Attended:
    """The forward, in the stages' terms."""
    batch, channels, positions = features.shape
    dtype = compute_dtype(features)

    def empty() -> Tensor:  # autograd wants every output to be a tensor of its own
        return features.new_empty(0, dtype=dtype)

    if options.uses_channel:
        mean = stages.spatial_sum(features, None, 1.0 / positions)
        hidden, logits = stages.channel_mlp(mean, *(p for p in mlp if p is not None))
    else:
        mean, hidden = empty(), empty()
        logits = features.new_zeros((batch, channels), dtype=dtype)
    s = torch.softmax(logits, -1)

    if options.uses_spatial:
        out, index, t, total = stages.attended(features, s, options.spatial_norm, options.pool_type)
        weights: Tensor | None = t
    else:
        t, weights, total = features.new_ones((batch, positions), dtype=dtype), None, empty()
        if options.uses_channel and options.pool_type == "avg":
            out, index = mean, features.new_empty(0, dtype=torch.int64)
        else:
            scale = s if options.uses_channel else torch.ones_like(s)
            out, index = stages.pool(features, None, scale, options.pool_type)

    if options.pool_type == "max":
        peak = out
        pooled = peak.clone() if weights is None else peak * weights.gather(1, index)
    else:
        pooled, peak = out, empty()
    if options.attention == "channel" and not options.dense:  # D = S * A: the scale comes after the pooling
        pooled = s * pooled
    return Attended(pooled, logits, t, mean, hidden, total, peak, index, s)


class Pullback(NamedTuple):
    """A gradient of the pooled features, as far as A itself is needed."""

    first_mean: Tensor | None  # (N, C): mean_l of dA's first term; None: first mean_l T / L
    first: Tensor  # (N, C): x, or the dense G
    channel: Tensor  # (N, C): S (1 where nothing weights the dense G)
    grad_map: Tensor | None  # (N, L): dU
    grad_channel: Tensor | None  # (N, C): dS


def pull_back(
    stages: Stages,
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    attended: Attended,
    grad_pooled: Tensor,
    grad_logits: Tensor | None = None,
    grad_spatial: Tensor | None = None,
) -> Factors:
    """The backward down to dA's factors.  Grad-CAM is the same with grad_pooled = d y^k / d pooled."""
    (pulled,) = pull_back_to_channels(stages, features, options, attended, [grad_pooled], grad_spatial)
    de = None
    if pulled.grad_channel is not None:
        de = softmax_grad(pulled.grad_channel, pulled.channel)
        de = de if grad_logits is None else de + grad_logits
    return pull_back_to_mean(stages, mlp, attended, pulled, de)


def pull_back_to_channels(
    stages: Stages,
    features: Tensor,
    options: Options,
    attended: Attended,
    grads_pooled: Sequence[Tensor],
    grad_spatial: Tensor | None = None,
) -> list[Pullback]:
    """dU and dS of one or two gradients of the pooled features (N, ...), the only part that reads A.

    With average pooling a pair shares its reads of A; only a single gradient may have a grad_spatial.
    """
    t, s = attended.spatial, attended.channel
    s = torch.softmax(attended.channel_logits, -1) if s is None else s
    norm, total = options.spatial_norm, attended.total
    if options.pool_type == "avg" and options.attention == "channel_spatial":
        found = stages.attention_backward(
            features, grads_pooled, 1.0 / features.shape[2], grad_spatial, t, total, norm
        )
        return [Pullback(None, first, s, *pair) for first, pair in zip(grads_pooled, found, strict=True)]
    return [_pull_back_one(stages, features, options, attended, s, g, grad_spatial) for g in grads_pooled]


def _pull_back_one(
    stages: Stages,
    features: Tensor,
    options: Options,
    attended: Attended,
    s: Tensor,
    grad_pooled: Tensor,
    grad_spatial: Tensor | None,
) -> Pullback:
    """The other poolings, and one attention alone or none."""
    positions, t = features.shape[2], attended.spatial
    scaled, norm = options.attention == "channel", options.spatial_norm
    ds: Tensor | None = None
    du: Tensor | None = None
    first_mean: Tensor | None = None
    first = grad_pooled
    if options.pool_type == "avg":
        if scaled:
            ds, first = grad_pooled * attended.mean, first * s
        if options.uses_spatial:
            du = stages.spatial_attention_grad(
                features, first, 1.0 / positions, grad_spatial, t, attended.total, norm
            )
    elif options.pool_type == "max":
        if scaled:
            ds, first = grad_pooled * attended.peak, first * s
        if options.uses_spatial:
            dt = stages.position_scatter(first * attended.peak, attended.peak_index, positions)
            du = stages.spatial_norm_grad(dt, grad_spatial, t, attended.total, norm)
        first_mean = first * t.gather(1, attended.peak_index) / positions
    else:
        first_mean, dots, dt = stages.grad_cam_means(
            features, grad_pooled, t if options.uses_spatial else None
        )
        if scaled:
            ds, first_mean = dots, first_mean * s
        elif not options.uses_spatial:
            s = torch.ones_like(s)
        if options.uses_spatial:
            du = stages.spatial_norm_grad(dt, grad_spatial, t, attended.total, norm)
    if options.uses_channel and du is not None:
        ds = stages.spatial_sum(features, du)
    return Pullback(first_mean, first, s, du, ds)


def pull_back_to_mean(
    stages: Stages, mlp: ChannelMLP, attended: Attended, pulled: Pullback, de: Tensor | None
) -> Factors:
    """From de, the gradient of the channel logits, through the channel MLP to dg; None without one."""
    first_mean, first, s, du, _ = pulled
    if de is None:
        return Factors(first_mean, first, s, du, None, None, None)
    assert mlp.fc1_weight is not None
    assert mlp.fc2_weight is not None
    (dh,) = stages.product([de], as_type(mlp.fc2_weight, de.dtype), mask=attended.hidden)
    (dg,) = stages.product([dh], as_type(mlp.fc1_weight, de.dtype))
    return Factors(first_mean, first, s, du, dg, de, dh)


def cam_terms(f: Factors, spatial: Tensor) -> CamTerms:
    """beta = mean_l dA, as terms that have yet to be added up, where f are those of d y^k / d A."""
    if f.first_mean is None:
        return CamTerms(f.first, spatial, f.grad_map, f.grad_mean)
    return CamTerms(f.first_mean, None, f.grad_map, f.grad_mean)


def features_grad(
    stages: Stages,
    features: Tensor,
    options: Options,
    spatial: Tensor,
    peak_index: Tensor,
    f: Factors,
    scale: Tensor | None = None,
) -> Tensor:
    """dA, written from its factors; times the scalar `scale`."""
    return stages.features_grad(
        features, options.pool_type, f.first, peak_index, spatial if options.uses_spatial else None,
        f.grad_map, f.channel, f.grad_mean, scale,
    )  # fmt: skip


def mlp_grads(stages: Stages, attended: Attended, f: Factors) -> list[Tensor | None]:
    """d fc1 and d fc2 in the type of the small tensors; None without channel attention."""
    if f.grad_hidden is None or f.grad_logits is None:
        return [None] * 4
    factors = [(f.grad_hidden, attended.mean), (f.grad_logits, attended.hidden)]
    return [x for pair in stages.layer_grads(factors) for x in pair]


def like_parameters(grads: Sequence[Tensor | None], mlp: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Each gradient in its parameter's type."""
    pairs = zip(grads, mlp, strict=True)
    return [None if d is None or p is None else as_type(d, p.dtype) for d, p in pairs]


class Attention(Function):
    """`attend` as one autograd node.  Outputs are those of `Attended`; the first three carry gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        features: Tensor,
        fc1_weight: Tensor | None,
        fc1_bias: Tensor | None,
        fc2_weight: Tensor | None,
        fc2_bias: Tensor | None,
        attention: str,
        spatial_norm: str,
        pool_type: str,
        backend: str,
    ) -> tuple[Tensor, ...]:
        options = Options(attention, spatial_norm, pool_type)
        mlp = ChannelMLP(fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        return tuple(attend(get_stages(backend), features, mlp, options)[:-1])  # S is e's, with its gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options, ctx.backend = Options(*inputs[5:8]), inputs[8]
        ctx.save_for_backward(*inputs[:5], *output[1:])
        out = Attended(*output)
        constant = list(output[3:])
        if not ctx.options.uses_channel:
            constant.append(out.channel_logits)
        if not ctx.options.uses_spatial:
            constant.append(out.spatial)
        ctx.mark_non_differentiable(*constant)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        features, w1, b1, w2, b2, *small = ctx.saved_tensors
        mlp, options = ChannelMLP(w1, b1, w2, b2), ctx.options
        attended = Attended(grads[0], *small)  # `pooled` itself is not needed
        # Strides first read inside the context make dynamo (torch 2.15) leave the caller's autocast off.
        _ = features.stride()
        with full_precision(features):
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                return _differentiable_backward(features, mlp, options, ctx.backend, grads[:3])
            return _backward(ctx, features, mlp, options, attended, *grads[:3])


def _backward(
    ctx: Any,
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    attended: Attended,
    grad_pooled: Tensor,
    grad_logits: Tensor,
    grad_spatial: Tensor,
) -> tuple[Tensor | None, ...]:
    stages = get_stages(ctx.backend)
    f = pull_back(
        stages, features, mlp, options, attended, grad_pooled,
        grad_logits if options.uses_channel else None,
        grad_spatial if options.uses_spatial else None,
    )  # fmt: skip
    da = None
    if ctx.needs_input_grad[0]:
        da = features_grad(stages, features, options, attended.spatial, attended.peak_index, f)
    return da, *like_parameters(mlp_grads(stages, attended, f), mlp), None, None, None, None


def _differentiable_backward(
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    backend: str,
    grads: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    """The backward under create_graph=True: through the contractions, which have every order."""

    def forward(*inputs: Tensor | None) -> tuple[Tensor, ...]:
        assert inputs[0] is not None
        stages = DifferentiableStages(backend)
        return tuple(attend(stages, inputs[0], ChannelMLP(*inputs[1:]), options)[:3])

    given = [x for x in (features, *mlp) if x is not None]
    if torch._C._are_functorch_transforms_active():
        absent = [None] * (5 - len(given))  # the channel MLP comes whole or not at all
        found = torch.func.vjp(lambda *inputs: forward(*inputs, *absent), *given)[1](tuple(grads))
        return *found, *[None] * (9 - len(found))
    # Outside of torch.func: vjp refuses to work under saved-tensor hooks, which checkpointing has.
    inputs = [None if x is None else x.view_as(x) for x in (features, *mlp)]
    outputs = [(y, dy) for y, dy in zip(forward(*inputs), grads, strict=True) if y.requires_grad]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    ys, dys = zip(*outputs, strict=True)
    pulled = iter(torch.autograd.grad(ys, wanted, dys, create_graph=True, allow_unused=True))
    grad = [next(pulled) if x is not None and x.requires_grad else None for x in inputs]
    return *grad, None, None, None, None


def ggam_attention(
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    backend: str,
    differentiable: bool = False,
) -> Attended:
    """`attend` with gradients where they are enabled: the fused node, or with `differentiable` the
    contractions."""
    with full_precision(features):
        if differentiable:
            return attend(DifferentiableStages(backend), features, mlp, options)
        if not torch.is_grad_enabled():
            return attend(get_stages(backend), features, mlp, options)
        return Attended(*Attention.apply(features, *mlp, *options, backend))
