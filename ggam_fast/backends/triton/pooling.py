"""The other poolings of A: its attended maxima, the attended map, and a dense gradient's means."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .launch import launch
from .register import operator
from .shapes import FP_FUSION, POOL, contiguous, empty, geometry, like_layout, native, plan, small, tile

from ggam_fast.kernels import grad_cam_means as grad_cam_means_kernels  # isort: skip
from ggam_fast.kernels import hadamard as hadamard_kernels  # isort: skip
from ggam_fast.kernels import max_pool as max_pool_kernels  # isort: skip
from ggam_fast.kernels import position_scatter as position_scatter_kernels  # isort: skip


def maxima(features: Tensor) -> tuple[Tensor, Tensor]:
    """Room for A at the maxima, and where."""
    batch, channels, _ = features.shape
    return small(batch, channels, features), empty((batch, channels), features, torch.int64)


def map_like(features: Tensor, for_flatten: bool) -> Tensor:
    """Room for D: in A's layout and type, or for a flattening classifier dense and in float32."""
    if for_flatten:
        return empty(features.shape, features)
    return like_layout(features, features.dtype)


def pooled(features: Tensor, pool: int, for_flatten: bool) -> tuple[Tensor, Tensor]:
    """Room for (out, index): the pooled features, A at the maxima and where, or D."""
    batch, channels, _ = features.shape
    if pool == POOL["max"]:
        return maxima(features)
    index = empty((0,), features, torch.int64)
    if pool == POOL["avg"]:
        return small(batch, channels, features), index
    return map_like(features, for_flatten), index


def max_pool(features: Tensor, t: Tensor | None, peak: Tensor, index: Tensor) -> None:
    """A at the position of max_l t_l A_cl, and that position"""
    features = native(features)
    batch, channels, _ = features.shape
    cut = tile(features)
    if batch:
        launch(
            max_pool_kernels.max_pool_kernel, batch * plan.blocks(channels, cut.block_c),
            features, contiguous(t), peak, index, features.stride(0), **geometry(features, cut),
        )  # fmt: skip


def hadamard(features: Tensor, t: Tensor | None, s: Tensor, scale: float, out: Tensor) -> None:
    """out = scale A * t, or scale A * s without t"""
    features = native(features)
    batch, channels, positions = features.shape
    cut = tile(features)
    if batch:
        programs = batch * plan.blocks(channels, cut.block_c) * plan.blocks(positions, cut.block_l)
        launch(
            hadamard_kernels.hadamard_kernel, programs,
            features, (s if t is None else t).contiguous(), out,
            scale, features.stride(0), out.stride(0), OUT_STRIDE_C=out.stride(1),
            OUT_STRIDE_L=out.stride(2), BY_CHANNEL=t is None, **geometry(features, cut),
        )  # fmt: skip


@operator
def max_pooled(features: Tensor, t: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """`max_pool`"""
    peak, index = maxima(features)
    yield peak, index
    max_pool(features, t, peak, index)


@operator
def attended_map(
    features: Tensor, t: Tensor | None, s: Tensor, scale: float, for_flatten: bool
) -> Iterator[Tensor]:
    """`hadamard`"""
    out = map_like(features, for_flatten)
    yield out
    hadamard(features, t, s, scale, out)


@operator
def position_scatter(values: Tensor, index: Tensor, positions: int) -> Iterator[Tensor]:
    """out[n, l] = sum over c with index[n, c] = l of values[n, c]"""
    batch, channels = values.shape
    out = small(batch, positions, values)
    yield out
    cut = plan.SCATTER_TILE
    if batch:
        launch(
            position_scatter_kernels.position_scatter_kernel, batch * plan.blocks(positions, cut.block_l),
            values.contiguous(), index.contiguous(), out, C=channels, L=positions,
            BLOCK_C=cut.block_c, BLOCK_L=cut.block_l, num_warps=cut.num_warps, **FP_FUSION,
        )  # fmt: skip


@operator
def grad_cam_means(
    features: Tensor, grad: Tensor, t: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """mean_l G t (N, C), sum_l G A (N, C), sum_c G A in parts (N, P, L)"""
    batch, channels, positions = features.shape
    parts = plan.blocks(channels, plan.MEANS_TILE.block_c)
    partials = empty((batch, parts, positions), features)
    means, dots = small(batch, channels, features), small(batch, channels, features)
    yield means, dots, partials
    features = native(features)
    if batch:
        launch(
            grad_cam_means_kernels.grad_cam_means_kernel, batch * parts,
            features, grad, contiguous(t), means, dots, partials,
            features.stride(0), grad.stride(0), GRAD_STRIDE_C=grad.stride(1),
            GRAD_STRIDE_L=grad.stride(2), **geometry(features, plan.MEANS_TILE),
        )  # fmt: skip
