"""beta, the guidance loss and its gradient for the channel logits e; one program does one image:

    S = softmax(e)      beta = first mean_l T / L + S mean_l dU + dg / L      log b~ = log of beta's norm
    symmetric  loss = 1/2 sum_c (S - b~)(log S - log b~)    g = 1/2 (S - b~ + S (log S - log b~))
    forward    loss = sum_c S (log S - log b~)              g = S + S (log S - log b~)
    reverse    loss = sum_c b~ (log b~ - log S)             g = -b~
    de = scale (g - S sum_c g) + S (dS - <dS, S>)

beta counts as constant in de.  dS is a further gradient of S.  share_n is an image's weight in the mean.  For
an image that does not count it is 0, and so is the loss.  With shares, scale is multiplied by share_n (in a
sum by 1, or 0 if the share is 0), and the last program to arrive adds up

    guidance = sum_n share_n loss_n (of a sum: sum_n loss_n)     total = sum_n share_n ce_n + scale guidance

If positions are guided, the mean of their losses KL(q, T) is added up too, and the total gains its weighted
value.
Touches nothing of A's size.
"""

import triton
import triton.language as tl

from .arrival import is_last, row_sum

SYMMETRIC = tl.constexpr(0)
FORWARD = tl.constexpr(1)
REVERSE = tl.constexpr(2)


FLAT = tl.constexpr(8 * 2.0**-23)


@triton.jit
def _partial_sums(row_ptr, L: tl.constexpr, BLOCK_L: tl.constexpr):
    """BLOCK_L sums, each of every BLOCK_L-th position.  Adding these up would take a barrier."""
    acc = tl.zeros((BLOCK_L,), tl.float32)
    for start in range(0, L, BLOCK_L):
        l = start + tl.arange(0, BLOCK_L)
        acc += tl.load(row_ptr + l, mask=l < L, other=0.0)
    return acc


@triton.jit
def _log_softmax(x, mask):
    x = tl.where(mask, x, -float("inf"))
    x -= tl.max(x, axis=0)
    return x - tl.log(tl.sum(tl.exp(x), axis=0))


@triton.jit
def _standardized(beta, mask, C: tl.constexpr):
    """beta with mean 0 and deviation 1 over channels, or 0 if all values are equal but for 8 roundings.

    Values are compared directly, because the mean of equal values may round.  beta can be far below 1e-7, so
    it is scaled before it is squared.
    """
    high = tl.max(tl.where(mask, beta, -float("inf")), axis=0)
    low = tl.min(tl.where(mask, beta, float("inf")), axis=0)
    flat = high - low <= tl.maximum(tl.abs(high), tl.abs(low)) * FLAT
    centred = tl.where(mask, beta - tl.sum(beta, axis=0) / C, 0.0)
    centred = tl.where(flat, 0.0, centred)
    largest = tl.max(tl.abs(centred), axis=0)
    unit = centred / tl.where(flat, 1.0, largest)
    variance = tl.sum(unit * unit, axis=0) / C
    return unit * tl.rsqrt(tl.where(flat, 1.0, variance))


@triton.jit
def guidance_kernel(
    logits_ptr,  # (N, C) float32: e
    first_ptr,  # (N, C) float32
    attention_ptr,  # (N, L) float32: T; None: the first term of beta is `first`
    grad_map_ptr,  # (N, L) float32: dU, or None
    grad_mean_ptr,  # (N, C) float32: dg, or None
    grad_channel_ptr,  # (N, C) float32: dS, or None
    beta_ptr,  # (N, C) float32
    channel_ptr,  # (N, C) float32: S
    loss_ptr,  # (N,) float32
    grad_logits_ptr,  # (N, C) float32: de
    scale,
    temperature,
    share_ptr,  # (N,) float32, or None
    counter_ptr,  # () int32 zero: images done; None: no sums over images
    cross_entropies_ptr,  # (N,) float32: ce; None, as is the total, if not needed
    guidance_ptr,  # () float32
    total_ptr,  # () float32
    position_losses_ptr,  # (N,) float32; None, as is the next, if positions are not guided
    position_ptr,  # () float32: their mean
    position_weight,
    C: tl.constexpr,
    L: tl.constexpr,
    STANDARDIZED: tl.constexpr,  # z-scores of beta over channels
    SOFTMAX: tl.constexpr,  # a softmax, not a sigmoid
    DIVERGENCE: tl.constexpr,
    MEAN: tl.constexpr,  # the mean over images, not the sum; used only with share
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """This program does all channels of one image."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    mask = c < C
    row = n * C + c

    # All loads come before the first sum, because its barrier would delay later loads.
    e = tl.load(logits_ptr + row, mask=mask, other=0.0)
    beta = tl.load(first_ptr + row, mask=mask, other=0.0)
    if grad_mean_ptr is not None:
        dg = tl.load(grad_mean_ptr + row, mask=mask, other=0.0)
    if grad_channel_ptr is not None:
        ds = tl.load(grad_channel_ptr + row, mask=mask, other=0.0)
    if attention_ptr is not None:
        t = _partial_sums(attention_ptr + n * L, L, BLOCK_L)
    if grad_map_ptr is not None:
        du = _partial_sums(grad_map_ptr + n * L, L, BLOCK_L)

    log_s = _log_softmax(e, mask)
    s = tl.exp(log_s)
    if attention_ptr is not None:
        beta *= tl.sum(t, axis=0) / L / L
    if grad_map_ptr is not None:
        beta += s * (tl.sum(du, axis=0) / L)
    if grad_mean_ptr is not None:
        beta += dg / L
    tl.store(beta_ptr + row, beta, mask=mask)
    tl.store(channel_ptr + row, s, mask=mask)

    z = beta
    if STANDARDIZED:
        z = _standardized(z, mask, C)
    z /= temperature
    if SOFTMAX:
        log_q = _log_softmax(z, mask)
        q = tl.exp(log_q)
    else:
        tail = tl.exp(-tl.abs(z))
        log_q = tl.minimum(z, 0.0) - tl.log(1.0 + tail)
        q = tl.where(z < 0.0, tail, 1.0) / (1.0 + tail)

    difference = tl.where(mask, log_s - log_q, 0.0)
    q = tl.where(mask, q, 0.0)
    if DIVERGENCE == SYMMETRIC:
        gap = s - q
        loss, g = 0.5 * tl.sum(gap * difference, axis=0), 0.5 * (gap + s * difference)
    elif DIVERGENCE == FORWARD:
        loss, g = tl.sum(s * difference, axis=0), s + s * difference
    else:
        loss, g = -tl.sum(q * difference, axis=0), -q
    de = scale * (g - s * tl.sum(g, axis=0))
    if share_ptr is not None:
        share = tl.load(share_ptr + n)
        loss = tl.where(share > 0.0, loss, 0.0)
        de = tl.where(share > 0.0, de * share if MEAN else de, 0.0)
    tl.store(loss_ptr + n, loss)
    if grad_channel_ptr is not None:
        de += s * (ds - tl.sum(ds * s, axis=0))
    tl.store(grad_logits_ptr + row, de, mask=mask)

    if counter_ptr is not None and is_last(counter_ptr):
        guidance = row_sum(loss_ptr, share_ptr if MEAN else None, tl.num_programs(0), BLOCK_C)
        tl.store(guidance_ptr, guidance)
        if position_ptr is not None:
            position = row_sum(position_losses_ptr, share_ptr, tl.num_programs(0), BLOCK_C)
            tl.store(position_ptr, position)
        if total_ptr is not None:
            ce = row_sum(cross_entropies_ptr, share_ptr, tl.num_programs(0), BLOCK_C)
            total = ce + scale * guidance
            if position_ptr is not None:
                total += position_weight * position
            tl.store(total_ptr, total)
