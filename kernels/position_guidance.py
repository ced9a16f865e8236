"""The target of spatial attention, and how far T is from it; one program does one image:

    dT = sum_p partials[p]                                      the class activation map, times any factor > 0
    relu      q_l = relu(dT_l) / sum relu(dT); 1/L if that sum is 0
    softmax   q = softmax(zscore(dT) / temperature)             a z-score of equal values is 0
    loss = KL(q, T) = sum_l q_l (log q_l - log T_l)             0 for an image that does not count

`guided_norm_grad_kernel` also computes dU = T (dT - <dT, T>) for R = 1 or 2 gradients, as `spatial_norm` does
for a softmax.  The first dT makes q, and a second dU gains weight share_n (T - q).

Touches nothing of A's size.  A map of up to BLOCK_L positions is added up once and stays in registers.  Each
sweep adds up a larger map again.
"""

import triton
import triton.language as tl

from .spatial_norm import _sum_partials

FLAT = tl.constexpr(8 * 2.0**-23)


@triton.jit
def _statistics(map_ptr, dt, temperature, P, L: tl.constexpr, SOFTMAX: tl.constexpr, BLOCK_L: tl.constexpr):
    """(highest dT, unit of the z-scores, whether dT is flat, sum of what `_target` divides)."""
    l = tl.arange(0, BLOCK_L)
    sums = tl.zeros((BLOCK_L,), tl.float32)
    highs = tl.full((BLOCK_L,), -float("inf"), tl.float32)
    lows = tl.full((BLOCK_L,), float("inf"), tl.float32)
    for start in range(0, L, BLOCK_L):
        if L > BLOCK_L:
            l = start + tl.arange(0, BLOCK_L)
            dt = _sum_partials(map_ptr, l, P, L, BLOCK_L)
        if SOFTMAX:
            sums += dt
            highs = tl.maximum(highs, tl.where(l < L, dt, -float("inf")))
            lows = tl.minimum(lows, tl.where(l < L, dt, float("inf")))
        else:
            sums += tl.where(dt <= 0.0, 0.0, dt)  # not a maximum, which would drop NaN
    total = tl.sum(sums, axis=0)
    high, low, mean = tl.max(highs, axis=0), tl.min(lows, axis=0), total / L
    flat = high - low <= tl.maximum(tl.abs(high), tl.abs(low)) * FLAT
    unit = tl.where(flat, 1.0, tl.maximum(high - mean, mean - low))
    if SOFTMAX:
        # dT can be far below 1e-7, so it is scaled before it is squared.
        squares = tl.zeros((BLOCK_L,), tl.float32)
        for start in range(0, L, BLOCK_L):
            if L > BLOCK_L:
                l = start + tl.arange(0, BLOCK_L)
                dt = _sum_partials(map_ptr, l, P, L, BLOCK_L)
            z = tl.where(l < L, (dt - mean) / unit, 0.0)
            squares += z * z
        unit *= tl.sqrt(tl.where(flat, 1.0, tl.sum(squares, axis=0) / L)) * temperature
        exponentials = tl.zeros((BLOCK_L,), tl.float32)
        for start in range(0, L, BLOCK_L):
            if L > BLOCK_L:
                l = start + tl.arange(0, BLOCK_L)
                dt = _sum_partials(map_ptr, l, P, L, BLOCK_L)
            exponentials += tl.where(l < L, tl.exp(tl.where(flat, 0.0, (dt - high) / unit)), 0.0)
        total = tl.sum(exponentials, axis=0)
    return high, unit, flat, total


@triton.jit
def _target(dt, high, unit, flat, total, L: tl.constexpr, SOFTMAX: tl.constexpr):
    """q and its logarithm; the latter is 0 where q is 0."""
    if SOFTMAX:
        z = tl.where(flat, 0.0, (dt - high) / unit)
        q = tl.exp(z) / total
        log_q = z - tl.log(total)
    else:
        positive = tl.where(dt <= 0.0, 0.0, dt)
        q = tl.where(total == 0.0, 1.0 / L, positive / tl.where(total == 0.0, 1.0, total))
        log_q = tl.log(tl.where(q == 0.0, 1.0, q))
    return q, log_q


@triton.jit
def position_guidance_kernel(
    partials_ptr,  # (N, P, L) float32: dT in parts
    log_ptr,  # (N, L) float32: log T
    share_ptr,  # (N,) float32: 0 for an image that does not count; or None
    target_ptr,  # (N, L) float32: q
    loss_ptr,  # (N,) float32
    temperature,
    P,
    L: tl.constexpr,
    SOFTMAX: tl.constexpr,  # of z-scores, not relu
    BLOCK_L: tl.constexpr,
):
    """This program does all positions of one image."""
    n = tl.program_id(0).to(tl.int64)
    map_ptr = partials_ptr + n * P * L
    l = tl.arange(0, BLOCK_L)
    dt = _sum_partials(map_ptr, l, P, L, BLOCK_L)
    high, unit, flat, total = _statistics(map_ptr, dt, temperature, P, L, SOFTMAX, BLOCK_L)
    losses = tl.zeros((BLOCK_L,), tl.float32)
    for start in range(0, L, BLOCK_L):
        if L > BLOCK_L:
            l = start + tl.arange(0, BLOCK_L)
            dt = _sum_partials(map_ptr, l, P, L, BLOCK_L)
        q, log_q = _target(dt, high, unit, flat, total, L, SOFTMAX)
        tl.store(target_ptr + n * L + l, q, mask=l < L)
        log_t = tl.load(log_ptr + n * L + l, mask=l < L, other=0.0)
        losses += tl.where((l < L) & (q != 0.0), q * (log_q - log_t), 0.0)
    loss = tl.sum(losses, axis=0)
    if share_ptr is not None:
        loss = tl.where(tl.load(share_ptr + n) > 0.0, loss, 0.0)
    tl.store(loss_ptr + n, loss)


@triton.jit
def guided_norm_grad_kernel(
    partials_ptr,  # (N, R, P, L) float32: dT in parts
    log_ptr,  # (N, L) float32: log T
    attention_ptr,  # (N, L) float32: T
    share_ptr,  # (N,) float32: 0 for an image that does not count; None: 1 / N
    grad_ptr, grad_1_ptr,  # (N, L) float32: dU; the second is None for R = 1
    target_ptr,  # (N, L) float32: q
    loss_ptr,  # (N,) float32
    scale,  # dT is this times the parts
    weight,
    temperature,
    P,
    L: tl.constexpr,
    R: tl.constexpr,
    SOFTMAX: tl.constexpr,  # of z-scores, not relu
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """This program computes one dU of one image.  That of the last one also stores q and the loss."""
    n = (tl.program_id(0) // R).to(tl.int64)
    last = tl.program_id(0) % R == R - 1
    class_ptr = partials_ptr + n * R * P * L
    own_ptr = partials_ptr + tl.program_id(0).to(tl.int64) * P * L
    out_ptr = grad_ptr + n * L
    if R > 1:
        second = tl.program_id(0) % R == 1
        if second:
            out_ptr = grad_1_ptr + n * L
    l = tl.arange(0, BLOCK_L)
    dt = _sum_partials(class_ptr, l, P, L, BLOCK_L)
    own = dt if R == 1 else _sum_partials(own_ptr, l, P, L, BLOCK_L)
    t = tl.load(attention_ptr + n * L + l, mask=l < L, other=0.0)
    high, unit, flat, total = _statistics(class_ptr, dt, temperature, P, L, SOFTMAX, BLOCK_L)
    dots = tl.zeros((BLOCK_L,), tl.float32)
    for start in range(0, L, BLOCK_L):
        if L > BLOCK_L:
            l = start + tl.arange(0, BLOCK_L)
            own = _sum_partials(own_ptr, l, P, L, BLOCK_L)
            t = tl.load(attention_ptr + n * L + l, mask=l < L, other=0.0)
        dots += scale * own * t
    dot = tl.sum(dots, axis=0)
    share = R / tl.num_programs(0) if share_ptr is None else tl.load(share_ptr + n)

    losses = tl.zeros((BLOCK_L,), tl.float32)
    for start in range(0, L, BLOCK_L):
        if L > BLOCK_L:
            l = start + tl.arange(0, BLOCK_L)
            dt = _sum_partials(class_ptr, l, P, L, BLOCK_L)
            own = _sum_partials(own_ptr, l, P, L, BLOCK_L)
            t = tl.load(attention_ptr + n * L + l, mask=l < L, other=0.0)
        q, log_q = _target(dt, high, unit, flat, total, L, SOFTMAX)
        du = t * (scale * own - dot)
        if R > 1:
            du += tl.where(last & (share != 0.0), weight * share * (t - q), 0.0)
        tl.store(out_ptr + l, du, mask=l < L)
        tl.store(target_ptr + n * L + l, q, mask=(l < L) & last)
        log_t = tl.load(log_ptr + n * L + l, mask=l < L, other=0.0)
        losses += tl.where((l < L) & (q != 0.0), q * (log_q - log_t), 0.0)
    loss = tl.where(share > 0.0, tl.sum(losses, axis=0), 0.0)
    tl.store(loss_ptr + n, loss, mask=last)
