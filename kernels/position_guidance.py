"""The target of spatial attention, and how far T is from it; one program does one image:

    dT = sum_p partials[p]                                      the class activation map, times any factor > 0
    relu      q_l = relu(dT_l) / sum relu(dT); 1/L if that sum is 0
    softmax   q = softmax(zscore(dT) / temperature)             a z-score of equal values is 0
    loss = KL(q, T) = sum_l q_l (log q_l - log T_l)             0 for an image that does not count

Touches nothing of A's size.  A map of up to BLOCK_L positions is added up once and stays in registers.  Each
sweep adds up a larger map again.
"""

import triton
import triton.language as tl

from .spatial_norm import _sum_partials

FLAT = tl.constexpr(8 * 2.0**-23)


@triton.jit
def position_guidance_kernel(
    partials_ptr,  # (N, R, P, L) float32: dT in parts is [:, 0]
    log_ptr,  # (N, L) float32: log T
    share_ptr,  # (N,) float32: 0 for an image that does not count; or None
    target_ptr,  # (N, L) float32: q
    loss_ptr,  # (N,) float32
    temperature,
    P,
    L: tl.constexpr,
    R: tl.constexpr,
    SOFTMAX: tl.constexpr,  # of z-scores, not relu
    BLOCK_L: tl.constexpr,
):
    """This program does all positions of one image."""
    n = tl.program_id(0).to(tl.int64)
    map_ptr = partials_ptr + n * R * P * L
    l = tl.arange(0, BLOCK_L)
    dt = _sum_partials(map_ptr, l, P, L, BLOCK_L)

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

    if SOFTMAX:
        # dT can be far below 1e-7, so it is scaled before it is squared.
        high, low, mean = tl.max(highs, axis=0), tl.min(lows, axis=0), total / L
        flat = high - low <= tl.maximum(tl.abs(high), tl.abs(low)) * FLAT
        largest = tl.where(flat, 1.0, tl.maximum(high - mean, mean - low))
        squares = tl.zeros((BLOCK_L,), tl.float32)
        for start in range(0, L, BLOCK_L):
            if L > BLOCK_L:
                l = start + tl.arange(0, BLOCK_L)
                dt = _sum_partials(map_ptr, l, P, L, BLOCK_L)
            unit = tl.where(l < L, (dt - mean) / largest, 0.0)
            squares += unit * unit
        deviation = tl.sqrt(tl.where(flat, 1.0, tl.sum(squares, axis=0) / L))
        exponentials = tl.zeros((BLOCK_L,), tl.float32)
        for start in range(0, L, BLOCK_L):
            if L > BLOCK_L:
                l = start + tl.arange(0, BLOCK_L)
                dt = _sum_partials(map_ptr, l, P, L, BLOCK_L)
            z = tl.where(flat, 0.0, (dt - high) / largest / deviation / temperature)
            exponentials += tl.where(l < L, tl.exp(z), 0.0)
        total = tl.sum(exponentials, axis=0)

    losses = tl.zeros((BLOCK_L,), tl.float32)
    for start in range(0, L, BLOCK_L):
        if L > BLOCK_L:
            l = start + tl.arange(0, BLOCK_L)
            dt = _sum_partials(map_ptr, l, P, L, BLOCK_L)
        if SOFTMAX:
            z = tl.where(flat, 0.0, (dt - high) / largest / deviation / temperature)
            q = tl.exp(z) / total
            log_q = z - tl.log(total)
        else:
            positive = tl.where(dt <= 0.0, 0.0, dt)
            q = tl.where(total == 0.0, 1.0 / L, positive / tl.where(total == 0.0, 1.0, total))
            log_q = tl.log(tl.where(q == 0.0, 1.0, q))
        tl.store(target_ptr + n * L + l, q, mask=l < L)
        log_t = tl.load(log_ptr + n * L + l, mask=l < L, other=0.0)
        losses += tl.where((l < L) & (q != 0.0), q * (log_q - log_t), 0.0)
    loss = tl.sum(losses, axis=0)
    if share_ptr is not None:
        loss = tl.where(tl.load(share_ptr + n) > 0.0, loss, 0.0)
    tl.store(loss_ptr + n, loss)
