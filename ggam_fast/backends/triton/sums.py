"""The passes that add up A, and the spatial norm between them."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from .launch import launch, thread
from .pooling import hadamard, max_pool, pooled
from .register import operator
from .shapes import (
    FP_FUSION,
    NORM,
    POOL,
    contiguous,
    empty,
    geometry,
    layout,
    native,
    pair,
    per_image,
    plan,
    small,
)

from ggam_fast.kernels import channel_sum as channel_sum_kernels  # isort: skip
from ggam_fast.kernels import spatial_norm as spatial_norm_kernels  # isort: skip
from ggam_fast.kernels import spatial_sum as spatial_sum_kernels  # isort: skip


def channel_sums(features: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """channel_sum(A, w) for each of one or two w, in parts: (N, R, P, L)"""
    features = native(features)
    batch, channels, positions = features.shape
    cut = plan.channel_sum(channels, positions, features.element_size(), layout(features))
    parts = plan.blocks(channels, cut.task_c)
    partials = empty((batch, len(weights), parts, positions), features)
    if batch:
        launch(
            channel_sum_kernels.channel_sum_kernel, batch * parts * plan.blocks(positions, cut.block_l),
            features, *pair([w.contiguous() for w in weights]), partials, features.stride(0),
            R=len(weights), PARTIAL_C=cut.task_c, STAGES=cut.stages, **geometry(features, cut),
        )  # fmt: skip
    return partials


def spatial_sums(features: Tensor, weights: Sequence[Tensor], scale: float, out: Sequence[Tensor]) -> None:
    """out = spatial_sum(A, w) for each of one or two w; without any, the sum"""
    features = native(features)
    batch, channels, positions = features.shape
    itemsize = features.element_size()
    cut = plan.spatial_sum(channels, positions, itemsize, layout(features), len(weights))
    notes = thread.recorder
    clear = (None, 0) if notes is None or weights else notes.clearing()
    if batch:
        launch(
            spatial_sum_kernels.spatial_sum_kernel, batch * plan.blocks(channels, cut.task_c),
            features, *pair([w.contiguous() for w in weights]), *pair(out), scale, features.stride(0), *clear,
            R=len(weights), TASK_C=cut.task_c, STAGES=cut.stages, **geometry(features, cut),
        )  # fmt: skip


def normalise(
    partials: Tensor, norm: int, kappa: int, attention: Tensor, weights: Tensor, total: Tensor
) -> None:
    """T, kappa T (but for kappa = 1) and sum(U) of U (N, 1, P, L) in parts"""
    batch, _, parts, positions = partials.shape
    if batch:
        launch(
            spatial_norm_kernels.spatial_norm_kernel, batch,
            partials, attention, None if kappa == 1 else weights, total, parts, float(kappa),
            NORM=norm, **_map_geometry(positions),
        )  # fmt: skip


def normalise_grads(
    partials: Tensor,
    scale: float,
    extra: Tensor | None,
    t: Tensor,
    total: Tensor,
    norm: int,
    grads: Sequence[Tensor],
) -> None:
    """dU of each of the R dT (N, R, P, L) in parts"""
    batch, rows, parts, positions = partials.shape
    if batch:
        launch(
            spatial_norm_kernels.spatial_norm_grad_kernel, batch * rows,
            partials, contiguous(extra), t.contiguous(), total.contiguous(), *pair(grads), scale, parts,
            R=rows, NORM=norm, **_map_geometry(positions),
        )  # fmt: skip


def _map_geometry(positions: int) -> dict[str, int]:
    block_l, num_warps = plan.norm_block(positions)
    return {"L": positions, "BLOCK_L": block_l, "num_warps": num_warps, **FP_FUSION}


def _maps(features: Tensor, kappa: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for T, kappa T and sum(U)."""
    batch, _, positions = features.shape
    weights = per_image(0, features) if kappa == 1 else small(batch, positions, features)
    return small(batch, positions, features), weights, per_image(batch, features)


@operator
def spatial_sum(features: Tensor, weights: Tensor | None, scale: float) -> Iterator[Tensor]:
    """scale * spatial_sum(A, w), or the sum"""
    out = small(features.shape[0], features.shape[1], features)
    yield out
    spatial_sums(features, [] if weights is None else [weights], scale, [out])


@operator
def channel_sum(features: Tensor, weights: Tensor) -> Iterator[Tensor]:
    """channel_sum(A, w)"""
    out = small(features.shape[0], features.shape[2], features)
    yield out
    # Not torch.sum, whose order of addition may depend on the batch.
    partials = channel_sums(features, [weights])
    normalise(partials, NORM["none"], 1, out, out, per_image(features.shape[0], features))


@operator
def spatial_attention(
    features: Tensor, s: Tensor, norm: int, kappa: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """T, kappa T and sum(U) for U = channel_sum(A, s)"""
    t, weights, total = _maps(features, kappa)
    yield t, weights, total
    normalise(channel_sums(features, [s]), norm, kappa, t, weights, total)


@operator
def spatial_norm_grad(
    partials: Tensor, scale: float, extra: Tensor | None, t: Tensor, total: Tensor, norm: int
) -> Iterator[Tensor]:
    """dU of dT = scale sum_p partials (N, P, L) + extra"""
    out = small(t.shape[0], t.shape[1], t)
    yield out
    normalise_grads(partials.contiguous().unsqueeze(1), scale, extra, t, total, norm, [out])


@operator
def spatial_attention_grad(
    features: Tensor, v: Tensor, scale: float, extra: Tensor | None, t: Tensor, total: Tensor, norm: int
) -> Iterator[Tensor]:
    """dU for dT = scale channel_sum(A, v) + extra"""
    out = small(t.shape[0], t.shape[1], t)
    yield out
    normalise_grads(channel_sums(features, [v]), scale, extra, t, total, norm, [out])


@operator
def attended(
    features: Tensor, s: Tensor, norm: int, pool: int, for_flatten: bool, kappa: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """T = norm(channel_sum(A, s)) and A pooled under kappa T: (out, index, T, kappa T, total)"""
    out, index = pooled(features, pool, for_flatten)
    t, weights, total = _maps(features, kappa)
    yield out, index, t, weights, total
    features = native(features)  # copied once, if it must be
    normalise(channel_sums(features, [s]), norm, kappa, t, weights, total)
    multiplied = t if kappa == 1 else weights
    if pool == POOL["avg"]:
        spatial_sums(features, [multiplied], 1.0 / features.shape[2], [out])
    elif pool == POOL["max"]:
        max_pool(features, multiplied, out, index)
    else:
        hadamard(features, multiplied, s, 1.0, out)


@operator
def attention_backward(
    features: Tensor,
    v: Tensor,
    v_1: Tensor | None,
    scale: float,
    extra: Tensor | None,
    t: Tensor,
    total: Tensor,
    norm: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """dU (N, L) and ds (N, C) of v, which may have an extra if it is alone, and of v_1; empty without"""
    batch, channels, positions = features.shape
    second = 0 if v_1 is None else batch
    du, ds = small(batch, positions, features), small(batch, channels, features)
    du_1, ds_1 = small(second, positions, features), small(second, channels, features)
    yield du, ds, du_1, ds_1
    assert extra is None or v_1 is None
    features = native(features)
    grads, sums = ([du], [ds]) if v_1 is None else ([du, du_1], [ds, ds_1])
    partials = channel_sums(features, [v] if v_1 is None else [v, v_1])
    normalise_grads(partials, scale, extra, t, total, norm, grads)
    spatial_sums(features, grads, 1.0, sums)
