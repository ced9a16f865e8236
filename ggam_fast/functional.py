"""The stateless API: one function for each part of the head; each checks its arguments.

Features are (N, C, H, W) ("NCHW", in NCHW or channels-last memory), (N, H, W, C) ("NHWC") or tokens
(N, L, C) ("NLC"). Maps are returned as (N, H, W), or (N, L) for tokens. Types are float32, bfloat16, float16,
and float64 on the torch backend. Small tensors are float32 (float64 for float64 features).
Bad input raises a ValueError or TypeError that names the argument, what came and what is expected.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import checks, entropy, guidance, precision, step
from .backends import registry
from .backends.registry import get_backend, get_differentiable
from .base import GGAMHeadBase
from .closed_form import ChannelMLP, Options
from .step import FusedLoss

__all__ = [
    "FusedLoss",
    "GGAMAttention",
    "GradCamMeans",
    "cam",
    "channel_sum",
    "fused_ggam_loss",
    "ggam_attention",
    "grad_cam_means",
    "grad_cam_weights",
    "guidance_loss",
    "position_loss",
    "spatial_sum",
]


class GGAMAttention(NamedTuple):
    """The result of `ggam_attention`."""

    attended: Tensor
    """(N, C) pooled, (N, C*L) flattened in C, H, W order, or the map in the input's format for "" """
    channel_attention: Tensor
    """(N, C) S"""
    spatial_attention: Tensor
    """(N, H, W) T"""


class GradCamMeans(NamedTuple):
    """The result of `grad_cam_means`."""

    cam_weights: Tensor
    """(N, C) 1/L sum_l T_l G_cl"""
    grad_map: Tensor
    """(N, H, W) sum_c G_cl A_cl"""


def _weights(argument: str, value: Tensor, shape: tuple[int, ...], names: str, like: Tensor) -> Tensor:
    return checks.small(argument, value, shape, names, like.device).to(precision.compute_dtype(like))


def channel_sum(
    features: Tensor,
    channel_weights: Tensor,
    *,
    input_fmt: checks.InputFmt = "NCHW",
    backend: checks.Backend = "auto",
) -> Tensor:
    """out[n, l] = sum_c channel_weights[n, c] * A[n, c, l], a map (N, H, W). Differentiable to any order.

    With S as weights this is U, F_cm and F_fa without the norm. With beta it is the class activation map
    before its ReLU. It reads A once. `channel_weights` is (N, C), any range.
    """
    x, shape = checks.feature_map(features, input_fmt)
    weights = _weights("channel_weights", channel_weights, tuple(x.shape[:2]), "(N, C)", x)
    with registry.full_precision(x):
        stages = get_differentiable(checks.backend(backend, x))
        return stages.channel_sum(x, weights).unflatten(1, shape)


def spatial_sum(
    features: Tensor,
    spatial_weights: Tensor,
    *,
    input_fmt: checks.InputFmt = "NCHW",
    backend: checks.Backend = "auto",
) -> Tensor:
    """out[n, c] = sum_l spatial_weights[n, l] * A[n, c, l], (N, C). Differentiable to any order.

    With weights T / L this is the attended average pool, with 1 / L it is global average pooling.
    It reads A once. `spatial_weights` is (N, H, W) ((N, L) for tokens), any range.
    """
    x, shape = checks.feature_map(features, input_fmt)
    weights = _weights("spatial_weights", spatial_weights, (x.shape[0], *shape), "(N, H, W)", x)
    with registry.full_precision(x):
        return get_differentiable(checks.backend(backend, x)).spatial_sum(x, weights.flatten(1))


def _mlp(
    x: Tensor,
    options: Options,
    fc1_weight: Tensor | None,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor | None,
    fc2_bias: Tensor | None,
) -> ChannelMLP:
    if not options.uses_channel:
        return ChannelMLP(None, None, None, None)
    if fc1_weight is None or fc1_bias is None or fc2_weight is None or fc2_bias is None:
        raise ValueError(
            f"attention={options.attention!r} needs fc1_weight, fc1_bias, fc2_weight and fc2_bias"
        )
    channels = x.shape[1]
    hidden = checks.matrix("fc1_weight", fc1_weight, "(C/r, C)").shape[0]
    if hidden == 0:
        raise ValueError(f"fc1_weight must have at least one row; got shape {tuple(fc1_weight.shape)}")
    checks.small("fc1_weight", fc1_weight, (hidden, channels), "(C/r, C)", x.device)
    checks.small("fc1_bias", fc1_bias, (hidden,), "(C/r,)", x.device)
    checks.small("fc2_weight", fc2_weight, (channels, hidden), "(C, C/r)", x.device)
    checks.small("fc2_bias", fc2_bias, (channels,), "(C,)", x.device)
    return ChannelMLP(fc1_weight, fc1_bias, fc2_weight, fc2_bias)


def _options(attention: str, spatial_norm: str, pool_type: str, attention_scale: str) -> Options:
    return Options(
        checks.one_of("attention", attention, checks.ATTENTION),
        checks.one_of("spatial_norm", spatial_norm, checks.SPATIAL_NORM),
        checks.one_of("pool_type", pool_type, checks.POOL_TYPE),
        checks.one_of("attention_scale", attention_scale, checks.ATTENTION_SCALE),
    )


def ggam_attention(
    features: Tensor,
    fc1_weight: Tensor | None = None,
    fc1_bias: Tensor | None = None,
    fc2_weight: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    *,
    attention: checks.Attention = "channel_spatial",
    spatial_norm: checks.SpatialNorm = "softmax",
    pool_type: checks.PoolType = "avg",
    attention_scale: checks.AttentionScale = "unit_mean",
    input_fmt: checks.InputFmt = "NCHW",
    backend: checks.Backend = "auto",
) -> GGAMAttention:
    """Channel-spatial attention and pooling as one autograd node (equations in `ggam_fast.closed_form`).

        g = mean_l A;  S = softmax(fc2(relu(fc1(g))));  T = norm(sum_c S_c A_c);  D = kappa A T

    `attention_scale="unit_mean"` makes kappa one over the mean of the weights that multiply A; "printed"
    makes it 1. fc1 is (C/r, C), (C/r,) and fc2 is (C, C/r), (C,); both are None for "spatial" and "none".
    Derivatives of every order (`create_graph=True`) work and go through the two contractions.
    """
    x, shape = checks.feature_map(features, input_fmt)
    options = _options(attention, spatial_norm, pool_type, attention_scale)
    mlp = _mlp(x, options, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    out = step.ggam_attention(x, mlp, options, checks.backend(backend, x))
    pooled = out.pooled
    if pool_type == "flatten":
        pooled = pooled.flatten(1)
    elif pool_type == "":
        pooled = checks.like_input(pooled, shape, input_fmt)
    return GGAMAttention(pooled, torch.softmax(out.channel_logits, -1), out.spatial.unflatten(1, shape))


def grad_cam_weights(
    features: Tensor,
    grad_attended: Tensor,
    fc1_weight: Tensor | None = None,
    fc1_bias: Tensor | None = None,
    fc2_weight: Tensor | None = None,
    fc2_bias: Tensor | None = None,
    *,
    attention: checks.Attention = "channel_spatial",
    spatial_norm: checks.SpatialNorm = "softmax",
    pool_type: checks.PoolType = "avg",
    attention_scale: checks.AttentionScale = "unit_mean",
    cam_at: checks.CamAt = "features",
    input_fmt: checks.InputFmt = "NCHW",
    backend: checks.Backend = "auto",
    differentiable: bool = False,
) -> Tensor:
    """beta (N, C) = mean over positions of d y / d A, in closed form (equations in `ggam_fast.closed_form`).

    `grad_attended` is d y / d attended, in the shape that `ggam_attention` returns: (N, C) for "avg" and
    "max", (N, C*L) for "flatten", the map's shape for "". No backward pass runs. beta is detached;
    `differentiable=True` keeps a graph with derivatives of every order.
    """
    x, _ = checks.feature_map(features, input_fmt)
    options = _options(attention, spatial_norm, pool_type, attention_scale)
    checks.one_of("cam_at", cam_at, checks.CAM_AT)
    mlp = _mlp(x, options, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    batch, channels, positions = x.shape
    if pool_type == "":
        checks.small(
            "grad_attended", grad_attended, tuple(features.shape), "the map's shape", features.device
        )
        v = checks.feature_map(grad_attended, input_fmt).features
    elif pool_type == "flatten":
        width = (batch, channels * positions)
        v = checks.small("grad_attended", grad_attended, width, "(N, C*L)", features.device).view(x.shape)
    else:
        v = _weights("grad_attended", grad_attended, (batch, channels), "(N, C)", x)
    resolved = checks.backend(backend, x)
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        out = step.ggam_attention(x, mlp, options, resolved, differentiable)
        return step.grad_cam_weights(x, mlp, options, out, v, cam_at, resolved, differentiable)[0]


def grad_cam_means(
    features: Tensor,
    grad: Tensor,
    spatial_attention: Tensor | None = None,
    *,
    input_fmt: checks.InputFmt = "NCHW",
    backend: checks.Backend = "auto",
) -> GradCamMeans:
    """The two reductions of a dense gradient G that Grad-CAM needs, in one pass over (A, G):

        cam_weights[n, c] = 1/L sum_l T_l G_cl        grad_map[n, l] = sum_c G_cl A_cl

    `grad` is G, in the shape of `features`. `spatial_attention` is T (N, H, W). None means T = 1, and
    cam_weights are then Grad-CAM's channel means of G. Both results are detached.
    """
    x, shape = checks.feature_map(features, input_fmt)
    checks.small("grad", grad, tuple(features.shape), "the shape of features", features.device)
    g = checks.feature_map(grad, input_fmt).features
    t = None
    if spatial_attention is not None:
        expected = (x.shape[0], *shape)
        t = _weights("spatial_attention", spatial_attention, expected, "(N, H, W)", x).flatten(1)
    with torch.no_grad(), registry.full_precision(x):
        means, _, grad_map = get_backend(checks.backend(backend, x)).grad_cam_means(x, g, t)
        if grad_map.dim() == 3:
            grad_map = grad_map.sum(1)
    return GradCamMeans(means, grad_map.unflatten(1, shape))


def fused_ggam_loss(
    head: nn.Module,
    features: Tensor,
    target: Tensor,
    *,
    guidance_weight: float = 1e-3,
    label_smoothing: float = 0.0,
    position_weight: float | None = None,
) -> FusedLoss:
    """CE(logits, target) + guidance_weight * L_GGAM of a `GGAMHead`, and its detached outputs.

        loss, out = fused_ggam_loss(head, features, target)
        loss.backward()  # writes dA, and the parameters' gradients

    A head with `position_guidance` adds position_weight * L of positions; None is a weight of 1.

    Loss and gradients equal those of
    `GGAMLoss(guidance_weight, label_smoothing)(head(features, target), target)`, but beta and the backward
    share their reads of A. With average pooling and both attentions, the backward reads no tensor of A's
    size. With `cam_detach=False`, with `pool_type="flatten"` or "", or with gradients disabled, this runs
    the head and GGAMLoss one after the other.

    `features` and `target` are what the head takes. `guidance_weight` is >= 0, `label_smoothing` in [0, 1].
    `loss` is a scalar in float32 (float64 for float64 features). It can be scaled (GradScaler) and
    differentiated once. torch.func can neither differentiate nor vmap it. `out` carries no gradient.

    `head` may be inside torch.compile, torch's CheckpointWrapper or peft's `modules_to_save`. The head itself
    then runs, not compiled: compile the function that calls this.

    The head's own forward hooks do not run. Under DDP or FSDP call this inside the wrapped module's forward,
    and let FSDP shard a module around the head.

    Raises:
        TypeError: `head` is not a GGAMHead, its parameters are sharded, or an input has the wrong type.
        ValueError: an input does not fit the head or GGAMLoss.
        RuntimeError: in a backward with create_graph=True.
    """
    head, given = unwrapped(head), head
    fused = getattr(head, "fused_loss", None)
    if not isinstance(head, GGAMHeadBase) or fused is None:
        inner = isinstance(getattr(head, "module", None), nn.Module)  # DDP, FSDP, DataParallel
        hint = "; call fused_ggam_loss inside the wrapped module's forward" if inner else ""
        raise TypeError(f"head must be a GGAMHead; got {type(given).__name__}{hint}")
    if any(hasattr(p, "full_tensor") for p in head.parameters()):
        raise TypeError(
            "head must have whole parameters; got sharded DTensors: shard a module around the head, "
            "or use GGAMLoss()(head(features, target), target)"
        )
    return fused(features, target, guidance_weight, label_smoothing, position_weight)


def unwrapped(head: nn.Module) -> nn.Module:
    """The module inside wrappers that change no result: torch.compile, CheckpointWrapper, peft's copies."""
    while isinstance(head, nn.Module):
        inner = _inner(head)
        if inner is None:
            break
        head = inner
    return head


def _inner(module: nn.Module) -> nn.Module | None:
    parts = module._modules
    copies, original = parts.get("modules_to_save"), parts.get("original_module")
    if isinstance(copies, nn.ModuleDict) and original is not None:  # peft trains copies of whole modules
        wrapper: Any = module
        active = [name for name in wrapper.active_adapters if name in copies]
        return copies[active[0]] if active and not wrapper.disable_adapters else original
    return next((parts[n] for n in ("_orig_mod", "_checkpoint_wrapped_module") if n in parts), None)


def guidance_loss(
    channel_attention: Tensor,
    cam_weights: Tensor,
    *,
    cam_norm: checks.CamNorm = "sigmoid",
    cam_temperature: float = 1.0,
    divergence: checks.Divergence = "symmetric",
    reduction: checks.Reduction | None = None,
) -> Tensor:
    """L_GGAM, the divergence of S from the normalised CAM weights (equations in `ggam_fast.guidance`).

    `channel_attention` is S (N, C), non-negative, with rows that sum to 1. `cam_weights` is beta (N, C), any
    range. The result is a scalar, the "mean" or "sum" over the batch, or (N,) for "none". None is the mean
    for "symmetric" and "reverse" and the sum for "forward". S is clamped to the smallest normal number
    before its logarithm. The head uses the logits of S and needs no clamp.
    """
    checks.matrix("channel_attention", channel_attention, "(N, C)")
    checks.small(
        "cam_weights", cam_weights, tuple(channel_attention.shape), "(N, C)", channel_attention.device
    )
    checks.one_of("cam_norm", cam_norm, checks.CAM_NORM)
    checks.one_of("divergence", divergence, checks.DIVERGENCE)
    how = checks.reduction("reduction", None, divergence) if reduction is None else reduction
    checks.one_of("reduction", how, checks.REDUCTION)
    s = channel_attention.to(precision.compute_dtype(channel_attention))
    log_s = s.clamp_min(torch.finfo(s.dtype).tiny).log()
    temperature = checks.temperature(cam_temperature)
    per_image = guidance.kl_guidance(log_s, cam_weights.to(s.dtype), cam_norm, temperature, divergence)
    return entropy.reduce_batch(per_image, how)


def position_loss(
    spatial_attention: Tensor,
    class_map: Tensor | None = None,
    *,
    target: Tensor | None = None,
    position_guidance: Literal["relu", "standardized_softmax"] = "relu",
    position_temperature: float = 1.0,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """KL(q, T), the divergence of T from a target q (equations in `ggam_fast.guidance`).

        q = relu(map) / sum(relu(map))  or  softmax(zscore(map) / position_temperature);  dL/dU = T - q

    `spatial_attention` is T (N, H, W) or (N, L), non-negative, with a sum of 1 for each image.  Give either
    `class_map`, any map of that shape, or `target`, your own distribution q of that shape, such as another
    image's map.  Both count as constants.  The result is the mean over the batch, or (N,) for "none".  T is
    clamped to the smallest normal number before its logarithm; the head uses U and needs no clamp.

    The head's own class activation map is `channel_sum(features, v)` for the class score's gradient v.
    """
    t = spatial_attention
    if not isinstance(t, Tensor) or not t.is_floating_point() or t.dim() < 2:
        got = (t.dtype, tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(f"spatial_attention must be floating-point (N, H, W) or (N, L); got {got}")
    if (class_map is None) == (target is None):
        both = "neither" if target is None else "both"
        raise ValueError(f"position_loss needs either class_map or target; got {both}")
    checks.one_of("position_guidance", position_guidance, checks.POSITION_GUIDANCE[1:])
    checks.one_of("reduction", reduction, ("mean", "none"))
    temperature = checks.temperature(position_temperature, "position_temperature")
    name, given = ("target", target) if class_map is None else ("class_map", class_map)
    assert given is not None
    given = checks.small(name, given, tuple(t.shape), "the shape of spatial_attention", t.device)
    t = t.to(precision.compute_dtype(t)).flatten(1)
    q = given.detach().to(t.dtype).flatten(1)
    if class_map is not None:
        q = guidance.position_target(q, position_guidance, temperature)
    per_image = guidance.kl_positions(q, t.clamp_min(torch.finfo(t.dtype).tiny).log())
    return entropy.reduce_batch(per_image, reduction)


def cam(
    features: Tensor,
    cam_weights: Tensor,
    *,
    input_fmt: checks.InputFmt = "NCHW",
    backend: checks.Backend = "auto",
) -> Tensor:
    """Grad-CAM's heat map (N, H, W): relu(sum_c beta_c A_c), without any scaling.

    Source: Selvaraju et al. (arXiv 1610.02391), eq. 2.
    """
    return torch.relu(channel_sum(features, cam_weights, input_fmt=input_fmt, backend=backend))
