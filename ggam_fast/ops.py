"""The stages as `torch.library` operators over the Triton kernels: check, allocate, launch.

One private functional operator `ggam_fast::...` per stage and direction, with a fake of the same
shapes and strides for `torch.compile` and `torch.export`.  Autograd lives outside, in `attention` and
`linear`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import _checkout, stages
from .checks import full_precision
from .launch import launch
from .linear import Linear

_checkout.load_sibling_kernels()

from ggam_fast.kernels import (  # noqa: E402  (needs the line above in a bare checkout)
    channel_sum,
    features_grad,
    grad_cam_means,
    guidance,
    hadamard,
    layer_grads,
    max_pool,
    plan,
    position_scatter,
    product,
    spatial_norm,
    spatial_sum,
)

_TORCH = stages.Stages()
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


def _tile(features: Tensor, **options: int) -> plan.Tile:
    _, channels, positions = features.shape
    return plan.tile(channels, positions, _layout(features), **options)


def _geometry(features: Tensor, tile: plan.Tile | plan.Sums) -> dict[str, int]:
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


# What a launch does not need is None: Triton compiles it away, and asks the driver about every pointer it is
# given (4 us each on the machine of `bench/results/h100.md`).


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _pair(tensors: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    first, second = (*tensors, None, None)[:2]
    return first, second


def _like_layout(features: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty (N, C, L) tensor, dense, in the memory order of `features`."""
    batch, channels, positions = features.shape
    if features.stride(2) == 1 or features.stride(1) != 1:
        return torch.empty((batch, channels, positions), dtype=dtype, device=features.device)
    shape = (batch, positions, channels)
    return torch.empty(shape, dtype=dtype, device=features.device).transpose(1, 2)


def _channel_sums(features: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """channel_sum(A, w) for each of one or two w, in parts: (N, R, P, L)"""
    features = _native(features)
    batch, channels, positions = features.shape
    cut = plan.channel_sum(channels, positions, features.element_size(), _layout(features))
    parts = plan.blocks(channels, cut.task_c)
    shape = (batch, len(weights), parts, positions)
    partials = torch.empty(shape, dtype=torch.float32, device=features.device)
    if batch:
        launch(
            channel_sum.channel_sum_kernel, batch * parts * plan.blocks(positions, cut.block_l),
            features, *_pair([w.contiguous() for w in weights]), partials, features.stride(0),
            R=len(weights), PARTIAL_C=cut.task_c, STAGES=cut.stages, **_geometry(features, cut),
        )  # fmt: skip
    return partials


def _spatial_sums(features: Tensor, weights: Sequence[Tensor], scale: float) -> list[Tensor]:
    """spatial_sum(A, w) for each of one or two w; without any, the sum"""
    features = _native(features)
    batch, channels, positions = features.shape
    itemsize, layout = features.element_size(), _layout(features)
    cut = plan.spatial_sum(channels, positions, itemsize, layout, len(weights))
    out = [_small(batch, channels, features) for _ in range(max(len(weights), 1))]
    if batch:
        launch(
            spatial_sum.spatial_sum_kernel, batch * plan.blocks(channels, cut.task_c),
            features, *_pair([w.contiguous() for w in weights]), *_pair(out), scale, features.stride(0),
            R=len(weights), TASK_C=cut.task_c, STAGES=cut.stages, **_geometry(features, cut),
        )  # fmt: skip
    return out


def _normalise(partials: Tensor, norm: int) -> tuple[Tensor, Tensor]:
    """T and sum(U) of U (N, 1, P, L) in parts"""
    batch, _, parts, positions = partials.shape
    attention = _small(batch, positions, partials)
    total = torch.empty((batch,), dtype=torch.float32, device=partials.device)
    if batch:
        launch(
            spatial_norm.spatial_norm_kernel,
            batch,
            partials,
            attention,
            total,
            parts,
            NORM=norm,
            **_map_geometry(positions),
        )
    return attention, total


def _normalise_grads(
    partials: Tensor, scale: float, extra: Tensor | None, t: Tensor, total: Tensor, norm: int
) -> list[Tensor]:
    """dU of each of the R dT (N, R, P, L) in parts"""
    batch, rows, parts, positions = partials.shape
    grads = [_small(batch, positions, partials) for _ in range(rows)]
    if batch:
        launch(
            spatial_norm.spatial_norm_grad_kernel, batch * rows,
            partials, _contiguous(extra), t.contiguous(), total.contiguous(), *_pair(grads), scale, parts,
            R=rows, NORM=norm,
            **_map_geometry(positions),
        )  # fmt: skip
    return grads


def _map_geometry(positions: int) -> dict[str, int]:
    block_l, num_warps = plan.norm_block(positions)
    return {"L": positions, "BLOCK_L": block_l, "num_warps": num_warps, **_FP_FUSION}


def _spatial_sum_fake(features: Tensor, weights: Tensor | None, scale: float) -> Tensor:
    return _small(features.shape[0], features.shape[1], features)


@_register("spatial_sum(Tensor features, Tensor? weights, float scale) -> Tensor", _spatial_sum_fake)
def _spatial_sum(features: Tensor, weights: Tensor | None, scale: float) -> Tensor:
    return _spatial_sums(features, [] if weights is None else [weights], scale)[0]


def _channel_sum_fake(features: Tensor, weights: Tensor) -> Tensor:
    return _small(features.shape[0], features.shape[2], features)


@_register("channel_sum(Tensor features, Tensor weights) -> Tensor", _channel_sum_fake)
def _channel_sum(features: Tensor, weights: Tensor) -> Tensor:
    # Not torch.sum, whose order of addition may depend on the batch.
    return _normalise(_channel_sums(features, [weights]), _NORM["none"])[0]


def _spatial_attention_fake(features: Tensor, s: Tensor, norm: int) -> tuple[Tensor, Tensor]:
    total = torch.empty((features.shape[0],), dtype=torch.float32, device=features.device)
    return _small(features.shape[0], features.shape[2], features), total


@_register(
    "spatial_attention(Tensor features, Tensor s, int norm) -> (Tensor, Tensor)",
    _spatial_attention_fake,
)
def _spatial_attention(features: Tensor, s: Tensor, norm: int) -> tuple[Tensor, Tensor]:
    return _normalise(_channel_sums(features, [s]), norm)


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
    return _normalise_grads(partials.contiguous().unsqueeze(1), scale, extra, t, total, norm)[0]


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
    return _normalise_grads(_channel_sums(features, [v]), scale, extra, t, total, norm)[0]


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
        launch(
            max_pool.max_pool_kernel, batch * plan.blocks(channels, tile.block_c),
            features, _contiguous(t), peak, index, features.stride(0), **_geometry(features, tile),
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
        launch(
            position_scatter.position_scatter_kernel, batch * plan.blocks(positions, tile.block_l),
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
        programs = batch * plan.blocks(channels, tile.block_c) * plan.blocks(positions, tile.block_l)
        launch(
            hadamard.hadamard_kernel, programs,
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
        launch(
            grad_cam_means.grad_cam_means_kernel, features.shape[0] * partials.shape[1],
            features, grad, _contiguous(t), means, dots, partials,
            features.stride(0), grad.stride(0), GRAD_STRIDE_C=grad.stride(1),
            GRAD_STRIDE_L=grad.stride(2), **_geometry(features, plan.MEANS_TILE),
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
        given = [_contiguous(x) for x in (t, du, grad_mean, ds)]
        launch(
            guidance.guidance_kernel, batch,
            logits.contiguous(), first.contiguous(), *given, beta, s, loss, de,
            weight / batch if mean else weight, temperature, C=channels, L=positions, CAM_NORM=cam_norm,
            SYMMETRIC=symmetric,
            BLOCK_C=block[0], BLOCK_L=plan.map_block(positions, block[1]), num_warps=block[1], **_FP_FUSION,
        )  # fmt: skip
    return beta, s, loss, de


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
    features = _native(features)  # copied once, if it must be
    t, total = _normalise(_channel_sums(features, [s]), norm)
    index = torch.empty(0, dtype=torch.int64, device=features.device)
    if pool == _POOL["avg"]:
        (out,) = _spatial_sums(features, [t], 1.0 / features.shape[2])
    elif pool == _POOL["max"]:
        out, index = _max_pool(features, t)
    else:
        out = _hadamard(features, t, s, for_flatten)
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
    grads = _normalise_grads(
        _channel_sums(features, [v] if v_1 is None else [v, v_1]), scale, extra, t, total, norm
    )
    found = [x for pair in zip(grads, _spatial_sums(features, grads, 1.0), strict=True) for x in pair]
    if v_1 is None:
        found += [_small(0, size, features) for size in (features.shape[2], features.shape[1])]
    return tuple(found)


def _dot_options(x: Tensor) -> dict[str, str | int]:
    if torch.version.hip is not None or x.device.type not in ("cuda", "cpu"):
        return {"PRECISION": "ieee"}  # AMD's matrix units multiply float32 as it is; others know no maxnreg
    return {"PRECISION": "tf32x3", "maxnreg": 255}  # without a limit Triton 3.9 spills at 168 registers


def _product_fake(
    x: Tensor, x_1: Tensor | None, matrix: Tensor, bias: Tensor | None, mask: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor]:
    (rows, width), (inner, columns) = x.shape, matrix.shape
    if width != inner:
        raise RuntimeError(f"a layer takes {inner} features; got {width}, of shape {tuple(x.shape)}")
    if any(t is not None and t.device != x.device for t in (matrix, bias)):
        raise RuntimeError(
            f"a layer's parameters must be on its input's device, {x.device}; got {matrix.device}"
        )
    return _small(rows, columns, x), _small(0 if x_1 is None else rows, columns, x)


@_register(
    "product(Tensor x, Tensor? x_1, Tensor matrix, Tensor? bias, Tensor? mask, bool relu)"
    " -> (Tensor, Tensor)",
    _product_fake,
)
def _product(
    x: Tensor, x_1: Tensor | None, matrix: Tensor, bias: Tensor | None, mask: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor]:
    found = _product_fake(x, x_1, matrix, bias, mask, relu)
    rows = [y.contiguous() for y in (x, x_1) if y is not None]
    (m, k), n, count = x.shape, matrix.shape[1], len(rows)
    # The last of those that share a tile counts on a barrier that waits for the stores of all: not AMD's.
    may_split = torch.version.hip is None and x.device.type in ("cuda", "cpu")
    cut = plan.product(count * m, n, k, bias is not None, may_split)
    if cut is None:
        with full_precision(x):
            out = [_TORCH.product([y], matrix, bias, mask, relu)[0] for y in rows]
        return out[0], found[1] if x_1 is None else out[1]
    if (k - 1) * matrix.stride(0) + (n - 1) * matrix.stride(1) >= 2**31:
        matrix = matrix.contiguous()
    tiles = count * plan.blocks(m, cut.block_m) * plan.blocks(n, cut.block_n)
    partials = counters = None
    if cut.split > 1:
        shape = (count, cut.split, m, n)
        partials = torch.empty(shape, dtype=torch.float32, device=x.device)
        counters = torch.zeros(tiles, dtype=torch.int32, device=x.device)
    if tiles:
        launch(
            product.product_kernel, tiles * cut.split,
            *_pair(rows), matrix, _contiguous(bias), _contiguous(mask), *_pair(found[:count]),
            partials, counters, m, n, k, *rows[0].stride(), *matrix.stride(), R=count, RELU=relu,
            SPLIT=cut.split, STEPS=plan.blocks(plan.blocks(k, cut.split), cut.block_k),
            BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, BLOCK_K=cut.block_k,
            STAGES=cut.stages, num_warps=cut.num_warps, **_dot_options(x), **_FP_FUSION,
        )  # fmt: skip
    return found


def _layer_grads_fake(*given: Tensor | None) -> tuple[Tensor, ...]:
    *flat, _ = given
    first = flat[0]
    assert first is not None
    out = []
    for dy, x in zip(flat[::2], flat[1::2], strict=True):
        j, c = (0, 0) if dy is None or x is None else (dy.shape[1], x.shape[1])
        if dy is not None and x is not None and not dy.shape[0] == x.shape[0] == first.shape[0]:
            shapes = [tuple(t.shape) for t in (dy, x, first)]
            raise RuntimeError(f"the layers' gradients and inputs must have one batch size; got {shapes}")
        out += [_small(j, c, first), torch.empty(j, dtype=torch.float32, device=first.device)]
    return tuple(out)


@_register(
    "layer_grads(Tensor dy, Tensor x, Tensor? dy_1, Tensor? x_1, Tensor? dy_2, Tensor? x_2, Tensor? dy_3, "
    "Tensor? x_3, Tensor? scale)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _layer_grads_fake,
)
def _layer_grads(*given: Tensor | None) -> tuple[Tensor, ...]:
    *flat, scale = (_contiguous(x) for x in given)
    out = list(_layer_grads_fake(*flat, scale))
    assert flat[0] is not None
    batch, cut, tiles = flat[0].shape[0], plan.LAYER_GRADS, 0
    pointers: list[Tensor | None] = []
    sizes: list[int] = []
    for i, (dy, x) in enumerate(zip(flat[::2], flat[1::2], strict=True)):
        j, c = out[2 * i].shape
        if dy is None or x is None:
            continue
        # A layer of no inputs has no tile, but a bias.
        if j * c * batch > plan.LARGEST_PRODUCT or c == 0:
            with full_precision(x):
                ((out[2 * i], out[2 * i + 1]),) = _TORCH.layer_grads([(dy, x)], scale)
            continue
        tiles += plan.blocks(j, cut.block_m) * plan.blocks(c, cut.block_n)
        pointers += [dy, x, *out[2 * i : 2 * i + 2]]
        sizes += [j, c]
    if tiles:
        pointers += [None] * (16 - len(pointers))
        sizes += [0] * (8 - len(sizes))
        launch(
            layer_grads.layer_grads_kernel, tiles,
            *pointers, scale, batch, *sizes, STEPS=plan.power_of_2(plan.blocks(batch, cut.block_k)),
            WIDE_J=all(j % 4 == 0 for j in sizes[::2]), WIDE_C=all(c % 4 == 0 for c in sizes[1::2]),
            BLOCK_J=cut.block_m, BLOCK_C=cut.block_n, BLOCK_N=cut.block_k,
            STAGES=cut.stages, num_warps=cut.num_warps, **_dot_options(out[0]), **_FP_FUSION,
        )  # fmt: skip
    return tuple(out)


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
    tile = _tile(out, num_warps=1)
    geometry = _geometry(out, tile)
    dense = pool == _POOL["flatten"]
    if t is None or du is None:
        t = du = None
    if batch:
        programs = batch * plan.blocks(channels, tile.block_c) * plan.blocks(positions, tile.block_l)
        launch(
            features_grad.features_grad_kernel, programs,
            out, first if dense else None, None if dense else first.contiguous(),
            index.contiguous() if pool == _POOL["max"] else None, _contiguous(t), _contiguous(du),
            s.contiguous(), _contiguous(grad_mean), scale, out.stride(0),
            first.stride(0) if dense else 0, C=geometry["C"], L=geometry["L"],
            OUT_STRIDE_C=geometry["STRIDE_C"], OUT_STRIDE_L=geometry["STRIDE_L"],
            GRAD_STRIDE_C=first.stride(1) if dense else 0,
            GRAD_STRIDE_L=first.stride(2) if dense else 0,
            POOL=pool, BLOCK_C=tile.block_c, BLOCK_L=tile.block_l, num_warps=tile.num_warps,
            **_FP_FUSION,
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

    def product(
        self,
        rows: Sequence[Tensor],
        matrix: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        relu: bool = False,
    ) -> list[Tensor]:
        if matrix.dtype != torch.float32:
            return super().product(rows, matrix, bias, mask, relu)
        x, x_1 = rows if len(rows) == 2 else (rows[0], None)
        return list(_product(x, x_1, matrix, bias, mask, relu))[: len(rows)]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weight.dtype != torch.float32:
            return super().linear(x, weight, bias)
        if not torch.is_grad_enabled():
            return self.product([x], weight.t(), bias)[0]
        return Linear.apply(x, weight, bias, "triton")

    def layer_grads(
        self, factors: Sequence[tuple[Tensor, Tensor]], scale: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        if not factors or any(x.dtype != torch.float32 for pair in factors for x in pair):
            return super().layer_grads(factors, scale)
        found: list[Tensor] = []
        for i in range(0, len(factors), 4):
            flat = [x for pair in factors[i : i + 4] for x in pair]
            found += _layer_grads(*flat, *[None] * (8 - len(flat)), scale)[: len(flat)]
        return list(zip(found[::2], found[1::2], strict=True))

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
