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

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .checks import compute_dtype, full_precision
from .contractions import DifferentiableStages, get_stages
from .stages import Stages


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


class Factors(NamedTuple):
    """The small factors of dA, and what the MLP's own gradients need."""

    first_mean: Tensor  # (N, C): mean_l of dA's first term
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

    mean, hidden, total, peak, index = (empty() for _ in range(5))
    logits = features.new_zeros((batch, channels), dtype=dtype)
    if options.uses_channel or (options.pool_type == "avg" and not options.uses_spatial):
        mean = stages.spatial_sum(features, None, 1.0 / positions)
    if options.uses_channel:
        w1, b1, w2, b2 = (p.to(dtype) for p in mlp if p is not None)
        hidden = torch.relu(torch.addmm(b1, mean, w1.t()))
        logits = torch.addmm(b2, hidden, w2.t())
    s = torch.softmax(logits, -1)

    if options.uses_spatial:
        t, total = stages.spatial_attention(features, s, options.spatial_norm)
        weights: Tensor | None = t
    else:
        t, weights = features.new_ones((batch, positions), dtype=dtype), None

    scaled = options.attention == "channel"  # D = S * A: the scale comes after the pooling
    if options.pool_type == "avg":
        pooled = mean.clone() if weights is None else stages.spatial_sum(features, weights, 1 / positions)
        pooled = s * pooled if scaled else pooled
    elif options.pool_type == "max":
        peak, index = stages.max_pool(features, weights)
        pooled = peak.clone() if weights is None else peak * weights.gather(1, index)
        pooled = s * pooled if scaled else pooled
    else:
        pooled = stages.hadamard(
            features, weights, s if scaled else torch.ones_like(s), options.pool_type == "flatten"
        )
    return Attended(pooled, logits, t, mean, hidden, total, peak, index)


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
    positions = features.shape[2]
    t, s = attended.spatial, torch.softmax(attended.channel_logits, -1)
    scaled = options.attention == "channel"
    norm = options.spatial_norm
    ds: Tensor | None = None
    du: Tensor | None = None

    if options.pool_type == "avg":
        first = grad_pooled / positions
        if scaled:
            ds, first = grad_pooled * attended.mean, first * s
        if options.uses_spatial:
            du = stages.spatial_attention_grad(features, first, grad_spatial, t, attended.total, norm)
        first_mean = first * t.mean(-1, keepdim=True)
    elif options.pool_type == "max":
        first = grad_pooled
        if scaled:
            ds, first = grad_pooled * attended.peak, first * s
        if options.uses_spatial:
            dt = stages.position_scatter(first * attended.peak, attended.peak_index, positions)
            du = stages.spatial_norm_grad(dt, grad_spatial, t, attended.total, norm)
        first_mean = first * t.gather(1, attended.peak_index) / positions
    else:
        first = grad_pooled
        first_mean, dots, dt = stages.grad_cam_means(
            features, grad_pooled, t if options.uses_spatial else None
        )
        if scaled:
            ds, first_mean = dots, first_mean * s
        elif not options.uses_spatial:
            s = torch.ones_like(s)
        if options.uses_spatial:
            du = stages.spatial_norm_grad(dt, grad_spatial, t, attended.total, norm)

    if not options.uses_channel:
        return Factors(first_mean, first, s, du, None, None, None)
    if du is not None:
        ds = stages.spatial_sum(features, du)
    assert ds is not None
    assert mlp.fc1_weight is not None
    assert mlp.fc2_weight is not None
    de = s * (ds - (ds * s).sum(-1, keepdim=True))
    if grad_logits is not None:
        de = de + grad_logits
    dh = (de @ mlp.fc2_weight.to(de.dtype)) * (attended.hidden > 0)
    return Factors(first_mean, first, s, du, dh @ mlp.fc1_weight.to(de.dtype), de, dh)


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
        return tuple(attend(get_stages(backend), features, mlp, options))

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
    da: Tensor | None = None
    if ctx.needs_input_grad[0]:
        g = f.grad_mean
        constant = torch.zeros_like(f.channel) if g is None else g / features.shape[2]
        da = stages.features_grad(
            features, options.pool_type, f.first, attended.peak_index,
            attended.spatial if options.uses_spatial else None, f.grad_map, f.channel, constant,
        )  # fmt: skip
    if f.grad_hidden is None or f.grad_logits is None:
        return da, None, None, None, None, None, None, None, None
    dw1 = f.grad_hidden.t() @ attended.mean
    dw2 = f.grad_logits.t() @ attended.hidden
    mlp_grads = (dw1, f.grad_hidden.sum(0), dw2, f.grad_logits.sum(0))
    typed = [d.to(p.dtype) for d, p in zip(mlp_grads, mlp, strict=True) if p is not None]
    return da, *typed, None, None, None, None


def _differentiable_backward(
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    backend: str,
    grads: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    """The backward under create_graph=True: through the contractions, which have every order."""
    given = [x for x in (features, *mlp) if x is not None]

    def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
        parameters = ChannelMLP(*inputs[1:]) if options.uses_channel else mlp
        return tuple(attend(DifferentiableStages(backend), inputs[0], parameters, options)[:3])

    pull = torch.func.vjp(forward, *given)[1]
    found = pull(tuple(grads))
    return *found, *([None] * (9 - len(found)))


def ggam_attention(
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    backend: str,
    differentiable: bool = False,
) -> Attended:
    """`attend` with gradients: the fused node, or with `differentiable` the contractions."""
    with full_precision(features):
        if differentiable:
            return attend(DifferentiableStages(backend), features, mlp, options)
        return Attended(*Attention.apply(features, *mlp, *options, backend))
