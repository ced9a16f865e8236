"""The passes that sum over A, and the spatial norm between them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ggam_fast.backends.torch import PositionGuidance, PositionPull, PositionTerms

from .launch import (
    CLEARING,
    FP_FUSION,
    NORM,
    POOL,
    POSITION_GUIDANCE,
    Empty,
    Work,
    launch_all,
    plan,
    thread,
)
from .pooling import hadamard, map_like, max_pool
from .register import KernelBackend, operator

from ggam_fast.kernels import channel_sum as channel_sum_kernels  # isort: skip
from ggam_fast.kernels import position_guidance as position_guidance_kernels  # isort: skip
from ggam_fast.kernels import spatial_norm as spatial_norm_kernels  # isort: skip
from ggam_fast.kernels import spatial_sum as spatial_sum_kernels  # isort: skip


class Sums(KernelBackend):
    """The stages of this file."""

    def channel_sum(self, features: Tensor, weights: Tensor) -> Tensor:
        return self.run.channel_sum(features, weights.float())

    def spatial_sum(self, features: Tensor, weights: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return self.run.spatial_sum(features, None if weights is None else weights.float(), scale)

    def attended(
        self, features: Tensor, s: Tensor, norm: str, pool_type: str, kappa: int = 1, log: bool = False
    ) -> tuple[Tensor, ...]:
        return self.run.attended(features, s, NORM[norm], POOL[pool_type], pool_type == "flatten", kappa, log)

    def attention_backward(
        self,
        features: Tensor,
        grads: Sequence[Tensor],
        scale: float,
        extra: Tensor | None,
        t: Tensor,
        total: Tensor,
        norm: str,
        pull: PositionPull | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        v, v_1 = grads if len(grads) == 2 else (grads[0], None)
        du, ds, du_1, ds_1 = self.run.attention_backward(
            features, v, v_1, scale, extra, t, total, NORM[norm], *_pull(pull)
        )
        return [(du, ds)] if v_1 is None else [(du, ds), (du_1, ds_1)]

    def guided_attention_backward(
        self,
        features: Tensor,
        grads: Sequence[Tensor],
        scale: float,
        t: Tensor,
        total: Tensor,
        norm: str,
        terms: PositionTerms,
        weight: float,
    ) -> tuple[list[tuple[Tensor, Tensor]], PositionGuidance]:
        v, v_1 = grads if len(grads) == 2 else (grads[0], None)
        du, ds, du_1, ds_1, q, losses = self.run.guided_attention_backward(
            features, v, v_1, scale, t, total, NORM[norm], POSITION_GUIDANCE[terms.norm], *terms[1:], weight
        )
        pairs = [(du, ds)] if v_1 is None else [(du, ds), (du_1, ds_1)]
        return pairs, PositionGuidance(q, losses)

    def spatial_attention(
        self, features: Tensor, s: Tensor, norm: str, kappa: int = 1, log: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.run.spatial_attention(features, s, NORM[norm], kappa, log)

    def spatial_attention_grad(
        self,
        features: Tensor,
        v: Tensor,
        scale: float,
        extra: Tensor | None,
        t: Tensor,
        total: Tensor,
        norm: str,
        pull: PositionPull | None = None,
    ) -> Tensor:
        return self.run.spatial_attention_grad(features, v, scale, extra, t, total, NORM[norm], *_pull(pull))

    def guided_spatial_attention_grad(
        self,
        features: Tensor,
        v: Tensor,
        scale: float,
        t: Tensor,
        total: Tensor,
        norm: str,
        terms: PositionTerms,
    ) -> tuple[Tensor, PositionGuidance]:
        du, q, losses = self.run.guided_spatial_attention_grad(
            features, v, scale, t, total, NORM[norm], POSITION_GUIDANCE[terms.norm], *terms[1:]
        )
        return du, PositionGuidance(q, losses)

    def spatial_norm_grad(
        self,
        dt: Tensor,
        scale: float,
        extra: Tensor | None,
        t: Tensor,
        total: Tensor,
        norm: str,
        pull: PositionPull | None = None,
    ) -> Tensor:
        partials = dt.unsqueeze(1) if dt.dim() == 2 else dt
        return self.run.spatial_norm_grad(partials, float(scale), extra, t, total, NORM[norm], *_pull(pull))

    def position_guidance(self, class_map: Tensor, terms: PositionTerms) -> PositionGuidance:
        partials = class_map.unsqueeze(1) if class_map.dim() == 2 else class_map
        kind = POSITION_GUIDANCE[terms.norm]
        return PositionGuidance(*self.run.position_guidance(partials, kind, *terms[1:]))


def _pull(pull: PositionPull | None) -> tuple[Tensor | None, Tensor | None, float, Tensor | None]:
    return (None, None, 0.0, None) if pull is None else pull


# ---- the stages.  A stage describes its memory and its launches; `launch_all` makes both.  A fake has no
# launches, because sizes may be symbols there.


@operator
def spatial_sum(features: Tensor, weights: Tensor | None, scale: float) -> Tensor:
    """scale * spatial_sum(A, w); weights = 1 if None."""
    out, works = Empty(features.shape[:2]), []
    if not thread.faked and features.shape[0]:
        w = [] if weights is None else [weights.contiguous()]
        features = features if plan.readable(features.stride()) else features.contiguous()
        works = [_spatial_sums(features, w, scale, [out], clears=weights is None)]
    return launch_all(features, [out], works)[0]


@operator
def channel_sum(features: Tensor, weights: Tensor) -> Tensor:
    """channel_sum(A, w)."""
    batch, _, positions = features.shape
    out, works = Empty((batch, positions)), []
    if not thread.faked and batch:
        features = features if plan.readable(features.stride()) else features.contiguous()
        partials, total = _partials(features, 1), Empty((batch,))
        works = [
            # Not torch.sum: its order of addition may depend on the batch.
            _channel_sums(features, [weights.contiguous()], partials),
            _normalise(partials, NORM["none"], 1, out, out, total),
        ]
    return launch_all(features, [out], works)[0]


@operator
def spatial_attention(
    features: Tensor, s: Tensor, norm: int, kappa: int, log: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """T, kappa T, sum(U) for U = channel_sum(A, s), and log T on request."""
    batch, _, positions = features.shape
    log_t = Empty((batch, positions) if log else (0,))
    t, total, works = Empty((batch, positions)), Empty((batch,)), []
    weights = Empty((0,) if kappa == 1 else (batch, positions))
    if not thread.faked and batch:
        features = features if plan.readable(features.stride()) else features.contiguous()
        partials = _partials(features, 1)
        works = [
            _channel_sums(features, [s.contiguous()], partials),
            _normalise(partials, norm, kappa, t, weights, total, log_t),
        ]
    return tuple(launch_all(features, [t, weights, total, log_t], works))  # type: ignore[return-value]


@operator
def spatial_norm_grad(
    partials: Tensor,
    scale: float,
    extra: Tensor | None,
    t: Tensor,
    total: Tensor,
    norm: int,
    target: Tensor | None,
    share: Tensor | None,
    weight: float,
    weight_scale: Tensor | None,
) -> Tensor:
    """dU for dT = scale sum_p partials (N, P, L) + extra, and `PositionPull`."""
    out, works = Empty(t.shape), []
    if not thread.faked and t.shape[0]:
        parts = partials.contiguous().unsqueeze(1)
        pull = (target, share, weight, weight_scale)
        works = [_normalise_grads(parts, scale, extra, t, total, norm, [out], pull)]
    return launch_all(t, [out], works)[0]


@operator
def position_guidance(
    partials: Tensor, kind: int, temperature: float, log_t: Tensor, share: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q and KL(q, T) of each image for dT = sum_p partials (N, P, L)."""
    q, losses, works = Empty(log_t.shape), Empty(log_t.shape[:1]), []
    if not thread.faked and log_t.shape[0]:
        parts = partials.contiguous()
        works = [_guide(parts, kind, temperature, log_t, share, q, losses)]
    return tuple(launch_all(log_t, [q, losses], works))  # type: ignore[return-value]


@operator
def spatial_attention_grad(
    features: Tensor,
    v: Tensor,
    scale: float,
    extra: Tensor | None,
    t: Tensor,
    total: Tensor,
    norm: int,
    target: Tensor | None,
    share: Tensor | None,
    weight: float,
    weight_scale: Tensor | None,
) -> Tensor:
    """dU for dT = scale channel_sum(A, v) + extra, and `PositionPull`."""
    out, works = Empty(t.shape), []
    if not thread.faked and t.shape[0]:
        features = features if plan.readable(features.stride()) else features.contiguous()
        partials, pull = _partials(features, 1), (target, share, weight, weight_scale)
        works = [
            _channel_sums(features, [v.contiguous()], partials),
            _normalise_grads(partials, scale, extra, t, total, norm, [out], pull),
        ]
    return launch_all(features, [out], works)[0]


@operator
def guided_spatial_attention_grad(
    features: Tensor,
    v: Tensor,
    scale: float,
    t: Tensor,
    total: Tensor,
    norm: int,
    kind: int,
    temperature: float,
    log_t: Tensor,
    share: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dU, q and KL(q, T) of each image for dT = scale channel_sum(A, v)."""
    out, q, losses, works = Empty(t.shape), Empty(t.shape), Empty(t.shape[:1]), []
    if not thread.faked and t.shape[0]:
        features = features if plan.readable(features.stride()) else features.contiguous()
        partials = _partials(features, 1)
        works = [
            _channel_sums(features, [v.contiguous()], partials),
            _guided_grads(partials, scale, t, [out], (kind, temperature, log_t, share), 0.0, q, losses),
        ]
    return tuple(launch_all(features, [out, q, losses], works))  # type: ignore[return-value]


@operator
def attended(
    features: Tensor, s: Tensor, norm: int, pool: int, for_flatten: bool, kappa: int, log: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """T = norm(channel_sum(A, s)) and A pooled under kappa T: (out, index, T, kappa T, total, log T)."""
    batch, channels, positions = features.shape
    dense = pool == POOL["flatten"]
    out: Any = map_like(features, for_flatten) if dense else Empty((batch, channels))
    index = Empty((batch, channels) if pool == POOL["max"] else (0,), torch.int64)
    t, total, works = Empty((batch, positions)), Empty((batch,)), []
    weights = Empty((0,) if kappa == 1 else (batch, positions))
    log_t = Empty((batch, positions) if log else (0,))
    if not thread.faked and batch:
        # At most one copy, for both passes.
        features = features if plan.readable(features.stride()) else features.contiguous()
        partials = _partials(features, 1)
        multiplied = t if kappa == 1 else weights
        if pool == POOL["avg"]:
            pooled = _spatial_sums(features, [multiplied], 1.0 / positions, [out])
        elif pool == POOL["max"]:
            pooled = max_pool(features, multiplied, out, index)
        else:
            pooled = hadamard(features, multiplied, 1.0, out, by_channel=False)
        works = [
            _channel_sums(features, [s.contiguous()], partials),
            _normalise(partials, norm, kappa, t, weights, total, log_t),
            pooled,
        ]
    made = [out, index, t, weights, total, log_t]
    return tuple(launch_all(features, made, works))  # type: ignore[return-value]


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
    target: Tensor | None,
    share: Tensor | None,
    weight: float,
    weight_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dU (N, L) and ds (N, C) for v and for v_1 (empty if it is None).

    `extra` needs a v alone.  `PositionPull` adds to the last dU.
    """
    assert extra is None or v_1 is None
    pull = (target, share, weight, weight_scale)
    found = _attention_backward(features, v, v_1, scale, extra, t, total, norm, pull)
    return found  # type: ignore[return-value]


@operator
def guided_attention_backward(
    features: Tensor,
    v: Tensor,
    v_1: Tensor | None,
    scale: float,
    t: Tensor,
    total: Tensor,
    norm: int,
    kind: int,
    temperature: float,
    log_t: Tensor,
    share: Tensor | None,
    weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`attention_backward`, q and KL(q, T) of each image by the dT of v; q pulls the dU of v_1."""
    guide = (kind, temperature, log_t, share)
    found = _attention_backward(
        features, v, v_1, scale, None, t, total, norm, (None, None, weight, None), guide
    )
    return found  # type: ignore[return-value]


_Pull = tuple[Tensor | None, Tensor | None, float, Tensor | None]


def _attention_backward(
    features: Tensor,
    v: Tensor,
    v_1: Tensor | None,
    scale: float,
    extra: Tensor | None,
    t: Tensor,
    total: Tensor,
    norm: int,
    pull: _Pull,
    guide: tuple[int, float, Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """`attention_backward`, and with `guide` q and the losses."""
    batch, channels, positions = features.shape
    second = 0 if v_1 is None else batch
    du, ds = Empty((batch, positions)), Empty((batch, channels))
    du_1, ds_1 = Empty((second, positions)), Empty((second, channels))
    q, losses = Empty((batch, positions)), Empty((batch,))
    works = []
    if not thread.faked and batch:
        features = features if plan.readable(features.stride()) else features.contiguous()
        vs, grads, sums = [v.contiguous()], [du], [ds]
        if v_1 is not None:
            vs, grads, sums = [*vs, v_1.contiguous()], [du, du_1], [ds, ds_1]
        partials = _partials(features, len(vs))
        if guide is None:
            normalised = _normalise_grads(partials, scale, extra, t, total, norm, grads, pull)
        else:
            normalised = _guided_grads(partials, scale, t, grads, guide, pull[2], q, losses)
        works = [
            _channel_sums(features, vs, partials),
            normalised,
            _spatial_sums(features, grads, 1.0, sums),
        ]
    made = [du, ds, du_1, ds_1] if guide is None else [du, ds, du_1, ds_1, q, losses]
    return tuple(launch_all(features, made, works))


# ---- each function returns one launch, for features that are `plan.readable` and dense weights


def _partials(features: Tensor, rows: int) -> Empty:
    """Memory for the partial sums of R rows of weights: (N, R, P, L)."""
    return Empty(plan.partial_sums(features.shape, features.stride(), features.element_size(), rows))


def _channel_sums(features: Tensor, weights: Sequence[Tensor], partials: Empty) -> Work:
    """channel_sum(A, w) for one or two w, in parts (N, R, P, L)."""
    batch, channels, positions = features.shape
    order = plan.memory_order(features.stride())
    cut = plan.channel_sum(channels, positions, features.element_size(), order)
    programs = batch * partials.shape[2] * plan.blocks(positions, cut.block_l)
    arguments = (features, *_two(weights), partials, features.stride(0))
    return Work(channel_sum_kernels.channel_sum_kernel, programs, arguments, {
        "R": len(weights), "PARTIAL_C": cut.task_c, "STAGES": cut.stages,
        **plan.geometry(features.shape, features.stride(), cut), **FP_FUSION,
    })  # fmt: skip


def _spatial_sums(
    features: Tensor,
    weights: Sequence[Tensor | Empty],
    scale: float,
    out: Sequence[Empty],
    clears: bool = False,
) -> Work:
    """out = spatial_sum(A, w) for one or two w.  Without w, the sum; that launch can clear counters."""
    batch, channels, positions = features.shape
    order = plan.memory_order(features.stride())
    cut = plan.spatial_sum(channels, positions, features.element_size(), order, len(weights))
    programs = batch * plan.blocks(channels, cut.task_c)
    clear = (CLEARING,) if clears else (None, 0)
    arguments = (features, *_two(weights), *_two(out), scale, features.stride(0), *clear)
    return Work(spatial_sum_kernels.spatial_sum_kernel, programs, arguments, {
        "R": len(weights), "TASK_C": cut.task_c, "STAGES": cut.stages,
        **plan.geometry(features.shape, features.stride(), cut), **FP_FUSION,
    })  # fmt: skip


def _normalise(
    partials: Empty,
    norm: int,
    kappa: int,
    attention: Empty,
    weights: Empty,
    total: Empty,
    log: Empty | None = None,
) -> Work:
    """T, kappa T (unless kappa = 1), sum(U) and log T (unless it is empty) from U in parts (N, 1, P, L)."""
    batch, _, parts, positions = partials.shape
    block_l, num_warps = plan.norm_block(positions)
    log = None if log is None or len(log.shape) == 1 else log
    arguments = (partials, attention, None if kappa == 1 else weights, log, total, parts, float(kappa))
    return Work(spatial_norm_kernels.spatial_norm_kernel, batch, arguments, {
        "NORM": norm, "L": positions, "BLOCK_L": block_l, "num_warps": num_warps, **FP_FUSION,
    })  # fmt: skip


def _normalise_grads(
    partials: Tensor | Empty,
    scale: float,
    extra: Tensor | None,
    t: Tensor,
    total: Tensor,
    norm: int,
    grads: Sequence[Empty],
    pull: _Pull = (None, None, 0.0, None),
) -> Work:
    """dU for each of the R dT, which are in parts (N, R, P, L).  The pull adds to the last one."""
    batch, rows, parts, positions = partials.shape
    block_l, num_warps = plan.norm_block(positions)
    extra = None if extra is None else extra.contiguous()
    target, share, weight, weight_scale = pull
    if target is None:
        pulls: tuple[Any, ...] = (None, None, None, None)
    else:
        pulls = (target.contiguous(), None if share is None else share.contiguous(), weight_scale, weight)
    arguments = (partials, extra, t.contiguous(), total.contiguous(), *_two(grads), *pulls, scale, parts)
    return Work(spatial_norm_kernels.spatial_norm_grad_kernel, batch * rows, arguments, {
        "R": rows, "NORM": norm, "L": positions, "BLOCK_L": block_l, "num_warps": num_warps, **FP_FUSION,
    })  # fmt: skip


def _guide(
    partials: Tensor,
    kind: int,
    temperature: float,
    log_t: Tensor,
    share: Tensor | None,
    target: Empty,
    losses: Empty,
) -> Work:
    """q and KL(q, T) from dT in parts (N, P, L)."""
    batch, parts, positions = partials.shape
    block_l, num_warps = plan.norm_block(positions)
    share = None if share is None else share.contiguous()
    arguments = (partials, log_t.contiguous(), share, target, losses, temperature, parts)
    return Work(position_guidance_kernels.position_guidance_kernel, batch, arguments, {
        "L": positions, "SOFTMAX": kind == 1, "BLOCK_L": block_l, "num_warps": num_warps, **FP_FUSION,
    })  # fmt: skip


def _guided_grads(
    partials: Empty,
    scale: float,
    t: Tensor,
    grads: Sequence[Empty],
    guide: tuple[int, float, Tensor, Tensor | None],
    weight: float,
    target: Empty,
    losses: Empty,
) -> Work:
    """dU of a softmax for each of the R dT, in parts (N, R, P, L); q and KL(q, T) from the first one.

    q pulls a second dU.
    """
    batch, rows, parts, positions = partials.shape
    kind, temperature, log_t, share = guide
    block_l, num_warps = plan.norm_block(positions)
    share = None if share is None else share.contiguous()
    arguments = (
        partials, log_t.contiguous(), t.contiguous(), share, *_two(grads), target, losses, scale, weight,
        temperature, parts,
    )  # fmt: skip
    return Work(position_guidance_kernels.guided_norm_grad_kernel, batch * rows, arguments, {
        "L": positions, "R": rows, "SOFTMAX": kind == 1, "BLOCK_L": block_l, "num_warps": num_warps,
        **FP_FUSION,
    })  # fmt: skip


def _two(tensors: Sequence[Tensor | Empty]) -> tuple[Tensor | Empty | None, ...]:
    return (*tensors, None, None)[:2]
