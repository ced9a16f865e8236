"""The other poolings of A: attended maxima and the attended map, and Grad-CAM's means of a dense gradient."""

import torch
from torch import Tensor

from .launch import (
    FP_FUSION,
    Empty,
    Work,
    contiguous,
    empty,
    launch,
    launch_all,
    like_layout,
    plan,
    runs,
    small,
)
from .register import KernelBackend, operator

from ggam_fast.kernels import grad_cam_means as grad_cam_means_kernels  # isort: skip
from ggam_fast.kernels import hadamard as hadamard_kernels  # isort: skip
from ggam_fast.kernels import max_pool as max_pool_kernels  # isort: skip
from ggam_fast.kernels import position_scatter as position_scatter_kernels  # isort: skip


class Pooling(KernelBackend):
    """The stages of this file."""

    def max_pool(self, features: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.run.max_pooled(features, t)

    def position_scatter(self, values: Tensor, index: Tensor, positions: int) -> Tensor:
        return self.run.position_scatter(values, index, positions)

    def hadamard(self, features: Tensor, t: Tensor | None, s: Tensor, for_flatten: bool) -> Tensor:
        return self.run.attended_map(features, t, s, 1.0, for_flatten)

    def multiply(self, x: Tensor, y: Tensor, kappa: int) -> Tensor:
        return self.run.attended_map(x.unsqueeze(2), None, y, float(kappa), True).squeeze(2)

    def grad_cam_means(
        self, features: Tensor, grad: Tensor, t: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.run.grad_cam_means(features, grad, t)


@operator
def max_pooled(features: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor]:
    """The operator of `max_pool`."""
    batch, channels, _ = features.shape
    peak, index = small(batch, channels, features), empty((batch, channels), features, torch.int64)
    if runs(batch):
        features = features if plan.readable(features.stride()) else features.contiguous()
        launch_all(features, [], [max_pool(features, None if t is None else t.contiguous(), peak, index)])
    return peak, index


@operator
def attended_map(features: Tensor, t: Tensor | None, s: Tensor, scale: float, for_flatten: bool) -> Tensor:
    """The operator of `hadamard`."""
    out = map_like(features, for_flatten)
    if runs(features.shape[0]):
        features = features if plan.readable(features.stride()) else features.contiguous()
        weights = (s if t is None else t).contiguous()
        launch_all(features, [], [hadamard(features, weights, scale, out, by_channel=t is None)])
    return out


def map_like(features: Tensor, for_flatten: bool) -> Tensor:
    """Memory for D: in A's layout and type, or with `for_flatten` dense and float32."""
    if for_flatten:
        return empty(features.shape, features)
    return like_layout(features, features.dtype)


def max_pool(features: Tensor, t: Tensor | Empty | None, peak: Tensor | Empty, index: Tensor | Empty) -> Work:
    """A at the position of max_l t_l A_cl, and that position, for `plan.readable` features and dense t."""
    batch, channels, positions = features.shape
    cut = plan.tile(channels, positions, plan.memory_order(features.stride()))
    arguments = (features, t, peak, index, features.stride(0))
    return Work(
        max_pool_kernels.max_pool_kernel, batch * plan.blocks(channels, cut.block_c), arguments,
        {**plan.geometry(features.shape, features.stride(), cut), **FP_FUSION},
    )  # fmt: skip


def hadamard(features: Tensor, weights: Tensor | Empty, scale: float, out: Tensor, by_channel: bool) -> Work:
    """out = scale A * t, or scale A * s `by_channel`, for `plan.readable` features and dense weights."""
    batch, channels, positions = features.shape
    cut = plan.tile(channels, positions, plan.memory_order(features.stride()))
    programs = batch * plan.blocks(channels, cut.block_c) * plan.blocks(positions, cut.block_l)
    return Work(
        hadamard_kernels.hadamard_kernel, programs,
        (features, weights, out, scale, features.stride(0), out.stride(0)),
        {"OUT_STRIDE_C": out.stride(1), "OUT_STRIDE_L": out.stride(2), "BY_CHANNEL": by_channel,
         **plan.geometry(features.shape, features.stride(), cut), **FP_FUSION},
    )  # fmt: skip


@operator
def position_scatter(values: Tensor, index: Tensor, positions: int) -> Tensor:
    """out[n, l] = sum over c with index[n, c] = l of values[n, c]."""
    batch, channels = values.shape
    out = small(batch, positions, values)
    if runs(batch):
        cut = plan.SCATTER_TILE
        launch(
            position_scatter_kernels.position_scatter_kernel, batch * plan.blocks(positions, cut.block_l),
            values.contiguous(), index.contiguous(), out, C=channels, L=positions,
            BLOCK_C=cut.block_c, BLOCK_L=cut.block_l, num_warps=cut.num_warps, **FP_FUSION,
        )  # fmt: skip
    return out


@operator
def grad_cam_means(features: Tensor, grad: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """mean_l G t (N, C), sum_l G A (N, C), sum_c G A in parts (N, P, L)."""
    batch, channels, positions = features.shape
    parts = plan.blocks(channels, plan.MEANS_TILE.block_c)
    partials = empty((batch, parts, positions), features)
    means, dots = small(batch, channels, features), small(batch, channels, features)
    if runs(batch):
        features = features if plan.readable(features.stride()) else features.contiguous()
        launch(
            grad_cam_means_kernels.grad_cam_means_kernel, batch * parts,
            features, grad, contiguous(t), means, dots, partials,
            features.stride(0), grad.stride(0), GRAD_STRIDE_C=grad.stride(1),
            GRAD_STRIDE_L=grad.stride(2),
            **plan.geometry(features.shape, features.stride(), plan.MEANS_TILE), **FP_FUSION,
        )  # fmt: skip
    return means, dots, partials
