"""The paper's "2D softmax" and its two alternatives, forward and backward; one program does one image.

    U = sum_p partials[p]                          total = sum_l U_l
    softmax   T_l = exp(U_l - max U) / sum exp     dU = T (dT - <dT, T>)
    sum       T_l = U_l / total; 1/L if total = 0  dU = (dT - <dT, T>) / total; 0 if total = 0
    sigmoid   T_l = 1 / (1 + exp(-U_l))            dU = dT T (1 - T)
    none      T_l = U_l                            channel_sum, added up in a fixed order

On request the forward also writes kappa T_l, the weights of A, and log T_l of a softmax.  In the backward,
for R = 1 or 2 gradients, dT = scale sum_p partials[p] + extra.  On request the last dU gains
weight share_n (T_l - q_l), which pulls T to a target q.

Touches nothing of A's size.  A map of up to BLOCK_L positions is added up once and stays in registers.  Each
sweep adds up a larger map again.
"""

import triton
import triton.language as tl

SOFTMAX = tl.constexpr(0)
SUM = tl.constexpr(1)
SIGMOID = tl.constexpr(2)
NONE = tl.constexpr(3)


@triton.jit
def _sum_partials(partials_ptr, l, P, L: tl.constexpr, BLOCK_L: tl.constexpr):
    # A small map takes several parts at a time, so that their loads are in flight together.
    BLOCK_P: tl.constexpr = max(1, min(32, 2048 // BLOCK_L))
    acc = tl.zeros((BLOCK_P, BLOCK_L), tl.float32)
    start = 0
    while start < P:  # not a range: in Triton 3.6's interpreter its end must be a constant
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < P)[:, None] & (l < L)[None, :]
        offsets = p[:, None] * L + l[None, :]
        acc += tl.load(partials_ptr + offsets, mask=mask, other=0.0)
        start += BLOCK_P
    return tl.sum(acc, axis=0)


@triton.jit
def _dt(partials_ptr, extra_ptr, scale, l, P, L: tl.constexpr, BLOCK_L: tl.constexpr):
    dt = scale * _sum_partials(partials_ptr, l, P, L, BLOCK_L)
    if extra_ptr is not None:
        dt += tl.load(extra_ptr + l, mask=l < L, other=0.0)
    return dt


@triton.jit
def spatial_norm_kernel(
    partials_ptr,  # (N, P, L) float32
    attention_ptr,  # (N, L) float32: T
    weights_ptr,  # (N, L) float32: kappa T, or None
    log_ptr,  # (N, L) float32: log T of a softmax, or None
    total_ptr,  # (N,) float32
    P,
    kappa,
    L: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """This program normalises the map of one image over its positions."""
    n = tl.program_id(0).to(tl.int64)
    image_ptr = partials_ptr + n * P * L
    l = tl.arange(0, BLOCK_L)
    u = _sum_partials(image_ptr, l, P, L, BLOCK_L)
    sums = tl.zeros((BLOCK_L,), tl.float32)
    peaks = tl.full((BLOCK_L,), -float("inf"), tl.float32)
    for start in range(0, L, BLOCK_L):
        if L > BLOCK_L:
            l = start + tl.arange(0, BLOCK_L)
            u = _sum_partials(image_ptr, l, P, L, BLOCK_L)
        sums += u
        peaks = tl.maximum(peaks, tl.where(l < L, u, -float("inf")))
    total, peak = tl.sum(sums, axis=0), tl.max(peaks, axis=0)
    tl.store(total_ptr + n, total)

    exponentials = tl.zeros((BLOCK_L,), tl.float32)
    if NORM == SOFTMAX:
        for start in range(0, L, BLOCK_L):
            if L > BLOCK_L:
                l = start + tl.arange(0, BLOCK_L)
                u = _sum_partials(image_ptr, l, P, L, BLOCK_L)
            exponentials += tl.where(l < L, tl.exp(u - peak), 0.0)
    denominator = tl.sum(exponentials, axis=0)

    for start in range(0, L, BLOCK_L):
        if L > BLOCK_L:
            l = start + tl.arange(0, BLOCK_L)
            u = _sum_partials(image_ptr, l, P, L, BLOCK_L)
        if NORM == SOFTMAX:
            t = tl.exp(u - peak) / denominator
        elif NORM == SUM:
            t = tl.where(total == 0.0, 1.0 / L, u / tl.where(total == 0.0, 1.0, total))
        elif NORM == SIGMOID:
            t = 1.0 / (1.0 + tl.exp(-u))
        else:
            tl.static_assert(NORM == NONE)
            t = u
        tl.store(attention_ptr + n * L + l, t, mask=l < L)
        if weights_ptr is not None:
            tl.store(weights_ptr + n * L + l, kappa * t, mask=l < L)
        if log_ptr is not None:
            tl.store(log_ptr + n * L + l, u - peak - tl.log(denominator), mask=l < L)


@triton.jit
def spatial_norm_grad_kernel(
    partials_ptr,  # (N, R, P, L) float32: dT in parts
    extra_ptr,  # (N, L) float32: the part of dT that does not come from A, or None
    attention_ptr,  # (N, L) float32: T
    total_ptr,  # (N,) float32
    grad_ptr, grad_1_ptr,  # (N, L) float32: dU; the second is None for R = 1
    target_ptr,  # (N, L) float32: q, or None
    share_ptr,  # (N,) float32: where it is 0 the target adds nothing; None: 1 / N
    weight_ptr,  # () float32, a factor of the weight; or None
    weight,
    scale,
    P,
    L: tl.constexpr,
    R: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """This program computes one dU of one image from its dT."""
    n = (tl.program_id(0) // R).to(tl.int64)
    map_ptr = partials_ptr + tl.program_id(0).to(tl.int64) * P * L
    if extra_ptr is not None:
        extra_ptr += n * L
    attention_ptr += n * L
    out_ptr = grad_ptr + n * L
    if R > 1:
        second = tl.program_id(0) % R == 1
        if second:
            out_ptr = grad_1_ptr + n * L
    if target_ptr is not None:
        pull = 1.0 / (tl.num_programs(0) // R) if share_ptr is None else tl.load(share_ptr + n)
        pull *= weight
        if weight_ptr is not None:
            pull *= tl.load(weight_ptr)
        if R > 1:
            pull = tl.where(second, pull, 0.0)
    l = tl.arange(0, BLOCK_L)
    dt = _dt(map_ptr, extra_ptr, scale, l, P, L, BLOCK_L)
    t = tl.load(attention_ptr + l, mask=l < L, other=0.0)
    dots = tl.zeros((BLOCK_L,), tl.float32)
    if NORM != SIGMOID:
        for start in range(0, L, BLOCK_L):
            if L > BLOCK_L:
                l = start + tl.arange(0, BLOCK_L)
                dt = _dt(map_ptr, extra_ptr, scale, l, P, L, BLOCK_L)
                t = tl.load(attention_ptr + l, mask=l < L, other=0.0)
            dots += dt * t
    dot = tl.sum(dots, axis=0)
    if NORM == SUM:  # again, for the rounding of <dT, T>: where dT is constant, that is all there is of dU
        dots = tl.zeros((BLOCK_L,), tl.float32)
        for start in range(0, L, BLOCK_L):
            if L > BLOCK_L:
                l = start + tl.arange(0, BLOCK_L)
                dt = _dt(map_ptr, extra_ptr, scale, l, P, L, BLOCK_L)
                t = tl.load(attention_ptr + l, mask=l < L, other=0.0)
            dots += (dt - dot) * t
        dot += tl.sum(dots, axis=0)

    for start in range(0, L, BLOCK_L):
        if L > BLOCK_L:
            l = start + tl.arange(0, BLOCK_L)
            dt = _dt(map_ptr, extra_ptr, scale, l, P, L, BLOCK_L)
            t = tl.load(attention_ptr + l, mask=l < L, other=0.0)
        if NORM == SOFTMAX:
            du = t * (dt - dot)
        elif NORM == SUM:
            total = tl.load(total_ptr + n)
            du = tl.where(total == 0.0, 0.0, (dt - dot) / tl.where(total == 0.0, 1.0, total))
        else:
            tl.static_assert(NORM == SIGMOID)
            du = dt * t * (1.0 - t)
        if target_ptr is not None:
            q = tl.load(target_ptr + n * L + l, mask=l < L, other=0.0)
            du += tl.where(pull == 0.0, 0.0, pull * (t - q))
        tl.store(out_ptr + l, du, mask=l < L)
