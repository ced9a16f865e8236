"""The stages as `torch.library` operators over the Triton kernels: check, allocate, launch.

One private functional operator `ggam_fast::...` per fused stage and direction, with a fake of the same
shapes and strides for `torch.compile` and `torch.export`.  Autograd lives outside, in `attention`.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import _checkout, stages

_checkout.load_sibling_kernels()

from ggam_fast.kernels import (  # noqa: E402  (needs the line above in a bare checkout)
    attention_backward,
    attention_forward,
    channel_sum,
    features_grad,
    grad_cam_means,
    guidance,
    hadamard,
    max_pool,
    plan,
    position_scatter,
    spatial_norm,
    spatial_sum,
)

_LIBRARY = torch.library.Library("ggam_fast", "FRAGMENT")
_NORM = {"softmax": 0, "sum": 1, "sigmoid": 2, "none": 3}
_POOL = {"avg": 0, "max": 1, "flatten": 2, "": 2}
_CAM_NORM = {"sigmoid": 0, "softmax": 1, "standardized": 2}
# Multiply-adds round once, whatever Triton's default is: 3.9 warns that it will change.
_FP_FUSION = {"enable_fp_fusion": True}


def _register(schema: str, fake: Callable[..., object]) -> Callable[[Callable], Callable]:
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"ggam_fast::{name}", fake, lib=_LIBRARY)

    def decorate(implementation: Callable) -> Callable:
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        return getattr(torch.ops.ggam_fast, name).default

    return decorate


def _native(features: Tensor) -> Tensor:
    """Features with one dense inner dimension; strides are read here, as Inductor may change them."""
    return features if 1 in (features.stride(1), features.stride(2)) else features.contiguous()


def _layout(features: Tensor) -> str:
    return plan.POSITIONS_FIRST if features.stride(2) == 1 else plan.CHANNELS_FIRST


def _tile(features: Tensor) -> plan.Tile:
    _, channels, positions = features.shape
    return plan.tile(channels, positions, _layout(features))


def _geometry(features: Tensor, tile: plan.Tile) -> dict[str, int]:
    """The compile-time constants of a pass over A: sizes, inner strides, tile."""
    return {
        "C": features.shape[1],
        "L": features.shape[2],
        "STRIDE_C": features.stride(1),
        "STRIDE_L": features.stride(2),
        "BLOCK_C": tile.block_c,
        "BLOCK_L": tile.block_l,
        "num_warps": tile.num_warps,
        **_FP_FUSION,
    }


def _small(batch: int, size: int, like: Tensor) -> Tensor:
    return torch.empty((batch, size), dtype=torch.float32, device=like.device)


def _like_layout(features: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty (N, C, L) tensor, dense, in the memory order of `features`."""
    batch, channels, positions = features.shape
    if features.stride(2) == 1 or features.stride(1) != 1:
        return torch.empty((batch, channels, positions), dtype=dtype, device=features.device)
    shape = (batch, positions, channels)
    return torch.empty(shape, dtype=dtype, device=features.device).transpose(1, 2)


def _channel_sum_partials(features: Tensor, weights: Tensor) -> Tensor:
    """partials (N, P, L) of channel_sum(A, weights)"""
    features = _native(features)
    batch, channels, positions = features.shape
    tile, parts = _tile(features), plan.num_partials(channels)
    partials = torch.empty((batch, parts, positions), dtype=torch.float32, device=features.device)
    if batch:
        grid = (batch * parts * plan.blocks(positions, tile.block_l),)
        with torch.cuda.device_of(features):
            channel_sum.channel_sum_kernel[grid](
                features, weights.contiguous(), partials, features.stride(0),
                PARTIAL_C=min(plan.CHANNELS_PER_PARTIAL, channels), **_geometry(features, tile),
            )  # fmt: skip
    return partials


def _normalise(partials: Tensor, norm: int) -> tuple[Tensor, Tensor]:
    batch, parts, positions = partials.shape
    attention = _small(batch, positions, partials)
    total = torch.empty((batch,), dtype=torch.float32, device=partials.device)
    if batch:
        with torch.cuda.device_of(partials):
            spatial_norm.spatial_norm_kernel[(batch,)](
                partials, attention, total, P=parts, NORM=norm, **_map_geometry(positions)
            )
    return attention, total


def _map_geometry(positions: int) -> dict[str, int]:
    block_l, num_warps = plan.norm_block(positions)
    return {"L": positions, "BLOCK_L": block_l, "num_warps": num_warps, **_FP_FUSION}


def _spatial_sum_fake(features: Tensor, weights: Tensor | None, scale: float) -> Tensor:
    return _small(features.shape[0], features.shape[1], features)


@_register("spatial_sum(Tensor features, Tensor? weights, float scale) -> Tensor", _spatial_sum_fake)
def _spatial_sum(features: Tensor, weights: Tensor | None, scale: float) -> Tensor:
    features = _native(features)
    batch, channels, _ = features.shape
    tile = _tile(features)
    out = _small(batch, channels, features)
    if batch:
        with torch.cuda.device_of(features):
            spatial_sum.spatial_sum_kernel[(batch * plan.blocks(channels, tile.block_c),)](
                features, features if weights is None else weights.contiguous(), out, scale,
                features.stride(0), HAS_WEIGHTS=weights is not None, **_geometry(features, tile),
            )  # fmt: skip
    return out


def _channel_sum_fake(features: Tensor, weights: Tensor) -> Tensor:
    return _small(features.shape[0], features.shape[2], features)


@_register("channel_sum(Tensor features, Tensor weights) -> Tensor", _channel_sum_fake)
def _channel_sum(features: Tensor, weights: Tensor) -> Tensor:
    # Not torch.sum, whose order of addition may depend on the batch.
    return _normalise(_channel_sum_partials(features, weights), _NORM["none"])[0]


def _spatial_attention_fake(features: Tensor, s: Tensor, norm: int) -> tuple[Tensor, Tensor]:
    total = torch.empty((features.shape[0],), dtype=torch.float32, device=features.device)
    return _small(features.shape[0], features.shape[2], features), total


@_register(
    "spatial_attention(Tensor features, Tensor s, int norm) -> (Tensor, Tensor)",
    _spatial_attention_fake,
)
def _spatial_attention(features: Tensor, s: Tensor, norm: int) -> tuple[Tensor, Tensor]:
    return _normalise(_channel_sum_partials(features, s), norm)


def _spatial_norm_grad_fake(
    partials: Tensor, scale: float, extra: Tensor | None, t: Tensor, total: Tensor, norm: int
) -> Tensor:
    return _small(t.shape[0], t.shape[1], t)


@_register(
    "spatial_norm_grad(Tensor partials, float scale, Tensor? extra, Tensor t, Tensor total, int norm)"
    " -> Tensor",
    _spatial_norm_grad_fake,
)
def _spatial_norm_grad(
    partials: Tensor, scale: float, extra: Tensor | None, t: Tensor, total: Tensor, norm: int
) -> Tensor:
    batch, parts, positions = partials.shape
    grad = _small(batch, positions, partials)
    if batch:
        with torch.cuda.device_of(partials):
            spatial_norm.spatial_norm_grad_kernel[(batch,)](
                partials.contiguous(), t if extra is None else extra.contiguous(), t.contiguous(),
                total.contiguous(), grad, scale, P=parts, NORM=norm, HAS_EXTRA=extra is not None,
                **_map_geometry(positions),
            )  # fmt: skip
    return grad


def _spatial_attention_grad_fake(
    features: Tensor, v: Tensor, scale: float, extra: Tensor | None, t: Tensor, total: Tensor, norm: int
) -> Tensor:
    return _small(t.shape[0], t.shape[1], t)


@_register(
    "spatial_attention_grad(Tensor features, Tensor v, float scale, Tensor? extra, Tensor t, Tensor total, "
    "int norm) -> Tensor",
    _spatial_attention_grad_fake,
)
def _spatial_attention_grad(
    features: Tensor, v: Tensor, scale: float, extra: Tensor | None, t: Tensor, total: Tensor, norm: int
) -> Tensor:
    return _spatial_norm_grad(_channel_sum_partials(features, v), scale, extra, t, total, norm)


def _max_pool_fake(features: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor]:
    shape, device = features.shape[:2], features.device
    peak = torch.empty(shape, dtype=torch.float32, device=device)
    return peak, torch.empty(shape, dtype=torch.int64, device=device)


@_register("max_pool(Tensor features, Tensor? t) -> (Tensor, Tensor)", _max_pool_fake)
def _max_pool(features: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor]:
    features = _native(features)
    batch, channels, _ = features.shape
    tile = _tile(features)
    peak, index = _max_pool_fake(features, t)
    if batch:
        with torch.cuda.device_of(features):
            max_pool.max_pool_kernel[(batch * plan.blocks(channels, tile.block_c),)](
                features, features if t is None else t.contiguous(), peak, index,
                features.stride(0), HAS_WEIGHTS=t is not None, **_geometry(features, tile),
            )  # fmt: skip
    return peak, index


def _position_scatter_fake(values: Tensor, index: Tensor, positions: int) -> Tensor:
    return _small(values.shape[0], positions, values)


@_register("position_scatter(Tensor values, Tensor index, int positions) -> Tensor", _position_scatter_fake)
def _position_scatter(values: Tensor, index: Tensor, positions: int) -> Tensor:
    batch, channels = values.shape
    tile = plan.SCATTER_TILE
    out = _small(batch, positions, values)
    if batch:
        with torch.cuda.device_of(values):
            position_scatter.position_scatter_kernel[(batch * plan.blocks(positions, tile.block_l),)](
                values.contiguous(), index.contiguous(), out, C=channels, L=positions,
                BLOCK_C=tile.block_c, BLOCK_L=tile.block_l, num_warps=tile.num_warps, **_FP_FUSION,
            )  # fmt: skip
    return out


def _hadamard_fake(features: Tensor, t: Tensor | None, s: Tensor, for_flatten: bool) -> Tensor:
    if for_flatten:
        return torch.empty(features.shape, dtype=torch.float32, device=features.device)
    return _like_layout(features, features.dtype)


@_register("hadamard(Tensor features, Tensor? t, Tensor s, bool for_flatten) -> Tensor", _hadamard_fake)
def _hadamard(features: Tensor, t: Tensor | None, s: Tensor, for_flatten: bool) -> Tensor:
    out = _hadamard_fake(features, t, s, for_flatten)
    features = _native(features)
    batch, channels, positions = features.shape
    tile = _tile(features)
    if batch:
        grid = (batch * plan.blocks(channels, tile.block_c) * plan.blocks(positions, tile.block_l),)
        with torch.cuda.device_of(features):
            hadamard.hadamard_kernel[grid](
                features, (s if t is None else t).contiguous(), out,
                features.stride(0), out.stride(0), OUT_STRIDE_C=out.stride(1),
                OUT_STRIDE_L=out.stride(2), BY_CHANNEL=t is None, **_geometry(features, tile),
            )  # fmt: skip
    return out


def _grad_cam_means_fake(features: Tensor, grad: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, positions = features.shape
    parts = plan.blocks(channels, plan.MEANS_TILE.block_c)
    partials = torch.empty((batch, parts, positions), dtype=torch.float32, device=features.device)
    return _small(batch, channels, features), _small(batch, channels, features), partials


@_register(
    "grad_cam_means(Tensor features, Tensor grad, Tensor? t) -> (Tensor, Tensor, Tensor)",
    _grad_cam_means_fake,
)
def _grad_cam_means(features: Tensor, grad: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    features = _native(features)
    means, dots, partials = _grad_cam_means_fake(features, grad, t)
    if features.shape[0]:
        with torch.cuda.device_of(features):
            grad_cam_means.grad_cam_means_kernel[(features.shape[0] * partials.shape[1],)](
                features, grad, features if t is None else t.contiguous(), means, dots, partials,
                features.stride(0), grad.stride(0), GRAD_STRIDE_C=grad.stride(1),
                GRAD_STRIDE_L=grad.stride(2), HAS_WEIGHTS=t is not None,
                **_geometry(features, plan.MEANS_TILE),
            )  # fmt: skip
    return means, dots, partials


def _guidance_fake(
    logits: Tensor,
    first: Tensor,
    t: Tensor | None,
    du: Tensor | None,
    grad_mean: Tensor | None,
    ds: Tensor | None,
    positions: int,
    cam_norm: int,
    symmetric: bool,
    temperature: float,
    weight: float,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, channels = logits.shape
    beta, s, de = (_small(batch, channels, logits) for _ in range(3))
    return beta, s, torch.empty((batch,), dtype=torch.float32, device=logits.device), de


@_register(
    "guidance(Tensor logits, Tensor first, Tensor? t, Tensor? du, Tensor? grad_mean, Tensor? ds, "
    "int positions, int cam_norm, bool symmetric, float temperature, float weight, bool mean)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _guidance_fake,
)
def _guidance(
    logits: Tensor,
    first: Tensor,
    t: Tensor | None,
    du: Tensor | None,
    grad_mean: Tensor | None,
    ds: Tensor | None,
    positions: int,
    cam_norm: int,
    symmetric: bool,
    temperature: float,
    weight: float,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    beta, s, loss, de = _guidance_fake(
        logits, first, t, du, grad_mean, ds, positions, cam_norm, symmetric, temperature, weight, mean
    )
    batch, channels = logits.shape
    block = plan.channels_block(channels)
    assert block is not None
    if batch:
        given = [logits if x is None else x.contiguous() for x in (t, du, grad_mean, ds)]
        with torch.cuda.device_of(logits):
            guidance.guidance_kernel[(batch,)](
                logits.contiguous(), first.contiguous(), *given, beta, s, loss, de,
                weight / batch if mean else weight, temperature, C=channels, L=positions, CAM_NORM=cam_norm,
                SYMMETRIC=symmetric, HAS_SPATIAL=t is not None,
                HAS_MAP=du is not None, HAS_MEAN=grad_mean is not None, HAS_CHANNEL=ds is not None,
                BLOCK_C=block[0], BLOCK_L=plan.norm_block(positions)[0], num_warps=block[1], **_FP_FUSION,
            )  # fmt: skip
    return beta, s, loss, de


def _schedule(features: Tensor, resources: plan.Resources, accumulators: int = 1) -> plan.Schedule | None:
    """How a fused kernel goes through these features; None: pass by pass."""
    batch, channels, positions = features.shape
    # AMD's barrier does not wait for the stores of the other waves, which `schedule.finish` counts on.
    if torch.version.hip is not None or features.device.type not in ("cuda", "cpu"):
        return None
    # Tickets are int32; a task has ten at most, as two phases go through the batch and the groups of the lag.
    if batch * plan.blocks(channels, plan.TASK_CHANNELS[0]) > 2**23:
        return None
    itemsize, layout = features.element_size(), _layout(features)
    return plan.schedule(channels, positions, itemsize, layout, resources, accumulators)


@lru_cache
def _multiprocessors(device: torch.device) -> tuple[int, int]:
    """How many, and their major compute capability."""
    if device.type != "cuda":
        return 1, 9
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.major


def _programs(device: torch.device, resources: plan.Resources) -> int:
    """How many programs of a persistent kernel run at a time; any number gives the same bits."""
    count, capability = _multiprocessors(device)
    return count * plan.occupancy(capability, resources)[0]


def _persistent(features: Tensor, schedule: plan.Schedule, resources: plan.Resources) -> dict[str, int]:
    return {
        **_geometry(features, schedule.tile),
        "TASK_C": schedule.task_c,
        "BLOCK_MAP": schedule.block_map,
        "STAGES": schedule.stages,
        "maxnreg": plan.occupancy(_multiprocessors(features.device)[1], resources)[1],
    }


def _pooled(features: Tensor, pool: int, for_flatten: bool) -> tuple[Tensor, Tensor]:
    """Room for (out, index): the pooled features, A at the maxima and where, or D."""
    batch, channels, _ = features.shape
    if pool == _POOL["max"]:
        return _max_pool_fake(features, None)
    index = torch.empty(0, dtype=torch.int64, device=features.device)
    if pool == _POOL["avg"]:
        return _small(batch, channels, features), index
    return _hadamard_fake(features, None, features, for_flatten), index


def _attended_fake(
    features: Tensor, s: Tensor, norm: int, pool: int, for_flatten: bool
) -> tuple[Tensor, ...]:
    return *_pooled(features, pool, for_flatten), *_spatial_attention_fake(features, s, norm)


@_register(
    "attended(Tensor features, Tensor s, int norm, int pool, bool for_flatten)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _attended_fake,
)
def _attended(features: Tensor, s: Tensor, norm: int, pool: int, for_flatten: bool) -> tuple[Tensor, ...]:
    """T = norm(channel_sum(A, s)) and A pooled under it: (out, index, T, total)"""
    features, s = _native(features), s.contiguous()
    average, positions, itemsize = pool == _POOL["avg"], features.shape[2], features.element_size()
    resources = plan.forward_resources(average, positions, itemsize, _layout(features))
    schedule = _schedule(features, resources, 2 if pool == _POOL["max"] else 1)
    if schedule is None:
        t, total = _spatial_attention(features, s, norm)
        index = torch.empty(0, dtype=torch.int64, device=features.device)
        if average:
            out = _spatial_sum(features, t, 1.0 / positions)
        elif pool == _POOL["max"]:
            out, index = _max_pool(features, t)
        else:
            out = _hadamard(features, t, s, for_flatten)
        return out, index, t, total
    batch, channels, _ = features.shape
    out, index, t, total = _attended_fake(features, s, norm, pool, for_flatten)
    parts, device, dense = plan.blocks(channels, schedule.task_c), features.device, pool == _POOL["flatten"]
    partials = torch.empty((batch, parts, positions), dtype=torch.float32, device=device)
    counters = torch.zeros(1 + batch, dtype=torch.int32, device=device)
    if batch:
        with torch.cuda.device_of(features):
            attention_forward.attention_forward_kernel[(_programs(device, resources),)](
                features, s, partials, t, total, out, index, counters, batch, min(schedule.group, batch),
                features.stride(0), out.stride(0),
                OUT_STRIDE_C=out.stride(1) if dense else 1, OUT_STRIDE_L=out.stride(2) if dense else 1,
                NORM=norm, POOL=pool, LAG=plan.REREAD_LAG, **_persistent(features, schedule, resources),
            )  # fmt: skip
    return out, index, t, total


def _attention_backward_fake(
    features: Tensor,
    v: Tensor,
    v_1: Tensor | None,
    scale: float,
    extra: Tensor | None,
    t: Tensor,
    total: Tensor,
    norm: int,
) -> tuple[Tensor, ...]:
    batch, channels, positions = features.shape
    second = 0 if v_1 is None else batch
    return (
        _small(batch, positions, features), _small(batch, channels, features),
        _small(second, positions, features), _small(second, channels, features),
    )  # fmt: skip


@_register(
    "attention_backward(Tensor features, Tensor v, Tensor? v_1, float scale, Tensor? extra, Tensor t, "
    "Tensor total, int norm) -> (Tensor, Tensor, Tensor, Tensor)",
    _attention_backward_fake,
)
def _attention_backward(
    features: Tensor,
    v: Tensor,
    v_1: Tensor | None,
    scale: float,
    extra: Tensor | None,
    t: Tensor,
    total: Tensor,
    norm: int,
) -> tuple[Tensor, ...]:
    """dU (N, L) and ds (N, C) of v, which may have an extra if it is alone, and of v_1; empty without"""
    assert extra is None or v_1 is None
    features = _native(features)
    batch, channels, positions = features.shape
    rows = 1 if v_1 is None else 2
    resources = plan.backward_resources(positions, features.element_size(), _layout(features))
    schedule = _schedule(features, resources, rows)
    found = _attention_backward_fake(features, v, v_1, scale, extra, t, total, norm)
    if schedule is None:
        du = _spatial_attention_grad(features, v, scale, extra, t, total, norm)
        pair = (du, _spatial_sum(features, du, 1.0))
        if v_1 is None:
            return *pair, *found[2:]
        du_1 = _spatial_attention_grad(features, v_1, scale, None, t, total, norm)
        return *pair, du_1, _spatial_sum(features, du_1, 1.0)
    du, ds, du_1, ds_1 = found
    parts = plan.blocks(channels, schedule.task_c)
    device = features.device
    partials = torch.empty((batch, rows, parts, positions), dtype=torch.float32, device=device)
    counters = torch.zeros(1 + batch, dtype=torch.int32, device=device)
    if batch:
        with torch.cuda.device_of(features):
            attention_backward.attention_backward_kernel[(_programs(device, resources),)](
                features, v.contiguous(), v if v_1 is None else v_1.contiguous(),
                t if extra is None else extra.contiguous(), t.contiguous(), total.contiguous(), partials,
                du, du_1, ds, ds_1, counters, batch, min(schedule.group, batch), features.stride(0), scale,
                R=rows, NORM=norm, HAS_EXTRA=extra is not None, LAG=plan.REREAD_LAG,
                **_persistent(features, schedule, resources),
            )  # fmt: skip
    return found


def _features_grad_fake(
    features: Tensor,
    pool: int,
    first: Tensor,
    index: Tensor,
    t: Tensor | None,
    du: Tensor | None,
    s: Tensor,
    grad_mean: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    return _like_layout(features, features.dtype)


@_register(
    "features_grad(Tensor features, int pool, Tensor first, Tensor index, Tensor? t, Tensor? du, "
    "Tensor s, Tensor? grad_mean, Tensor? scale) -> Tensor",
    _features_grad_fake,
)
def _features_grad(
    features: Tensor,
    pool: int,
    first: Tensor,
    index: Tensor,
    t: Tensor | None,
    du: Tensor | None,
    s: Tensor,
    grad_mean: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    out = _like_layout(features, features.dtype)
    batch, channels, positions = out.shape
    tile = _tile(out)
    geometry = _geometry(out, tile)
    dense = pool == _POOL["flatten"]
    if t is None or du is None:
        t = du = s  # not read without HAS_SPATIAL
        has_spatial = False
    else:
        has_spatial = True
    if batch:
        grid = (batch * plan.blocks(channels, tile.block_c) * plan.blocks(positions, tile.block_l),)
        with torch.cuda.device_of(features):
            features_grad.features_grad_kernel[grid](
                out, first, s if dense else first.contiguous(), index.contiguous(), t.contiguous(),
                du.contiguous(), s.contiguous(), s if grad_mean is None else grad_mean.contiguous(),
                s if scale is None else scale, out.stride(0), first.stride(0) if dense else 0,
                C=geometry["C"], L=geometry["L"],
                OUT_STRIDE_C=geometry["STRIDE_C"], OUT_STRIDE_L=geometry["STRIDE_L"],
                GRAD_STRIDE_C=first.stride(1) if dense else 0,
                GRAD_STRIDE_L=first.stride(2) if dense else 0,
                POOL=pool, HAS_SPATIAL=has_spatial, HAS_MEAN=grad_mean is not None,
                HAS_SCALE=scale is not None, BLOCK_C=tile.block_c, BLOCK_L=tile.block_l,
                num_warps=tile.num_warps, **_FP_FUSION,
            )  # fmt: skip
    return out


class TritonStages(stages.Stages):
    """The stages as kernels.  Small results are float32; none of them is differentiable by itself."""

    def channel_sum(self, features: Tensor, weights: Tensor) -> Tensor:
        return _channel_sum(features, weights.float())

    def spatial_sum(self, features: Tensor, weights: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return _spatial_sum(features, None if weights is None else weights.float(), scale)

    def attended(self, features: Tensor, s: Tensor, norm: str, pool_type: str) -> tuple[Tensor, ...]:
        return _attended(features, s, _NORM[norm], _POOL[pool_type], pool_type == "flatten")

    def attention_backward(
        self,
        features: Tensor,
        grads: Sequence[Tensor],
        scale: float,
        extra: Tensor | None,
        t: Tensor,
        total: Tensor,
        norm: str,
    ) -> list[tuple[Tensor, Tensor]]:
        v, v_1 = grads if len(grads) == 2 else (grads[0], None)
        du, ds, du_1, ds_1 = _attention_backward(features, v, v_1, scale, extra, t, total, _NORM[norm])
        return [(du, ds)] if v_1 is None else [(du, ds), (du_1, ds_1)]

    def spatial_attention(self, features: Tensor, s: Tensor, norm: str) -> tuple[Tensor, Tensor]:
        return _spatial_attention(features, s, _NORM[norm])

    def spatial_attention_grad(
        self,
        features: Tensor,
        v: Tensor,
        scale: float,
        extra: Tensor | None,
        t: Tensor,
        total: Tensor,
        norm: str,
    ) -> Tensor:
        return _spatial_attention_grad(features, v, scale, extra, t, total, _NORM[norm])

    def spatial_norm_grad(
        self, dt: Tensor, extra: Tensor | None, t: Tensor, total: Tensor, norm: str
    ) -> Tensor:
        partials = dt.unsqueeze(1) if dt.dim() == 2 else dt
        return _spatial_norm_grad(partials, 1.0, extra, t, total, _NORM[norm])

    def max_pool(self, features: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor]:
        return _max_pool(features, t)

    def position_scatter(self, values: Tensor, index: Tensor, positions: int) -> Tensor:
        return _position_scatter(values, index, positions)

    def hadamard(self, features: Tensor, t: Tensor | None, s: Tensor, for_flatten: bool) -> Tensor:
        return _hadamard(features, t, s, for_flatten)

    def grad_cam_means(
        self, features: Tensor, grad: Tensor, t: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _grad_cam_means(features, grad, t)

    def features_grad(
        self,
        features: Tensor,
        pool_type: str,
        first: Tensor,
        index: Tensor,
        t: Tensor | None,
        du: Tensor | None,
        s: Tensor,
        grad_mean: Tensor | None,
        scale: Tensor | None = None,
    ) -> Tensor:
        return _features_grad(features, _POOL[pool_type], first, index, t, du, s, grad_mean, scale)

    def guidance(
        self,
        logits: Tensor,
        terms: stages.CamTerms,
        ds: Tensor | None,
        positions: int,
        cam_norm: str,
        temperature: float,
        divergence: str,
        weight: float,
        mean: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if plan.channels_block(logits.shape[1]) is None:
            return super().guidance(
                logits, terms, ds, positions, cam_norm, temperature, divergence, weight, mean
            )
        return _guidance(
            logits, *terms, ds, positions, _CAM_NORM[cam_norm], divergence == "symmetric", temperature,
            weight, mean,
        )  # fmt: skip


TRITON = TritonStages()
