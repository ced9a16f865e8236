"""partials[n, p, l] = sum over the channels c of part p of weights[n, c] * A[n, c, l].

The sum over p, in the order p = 0, 1, ..., is channel_sum; `spatial_norm` takes the partials as they
are.  No atomics: the result is the same bits every run.  Reads A once, writes 4*N*P*L bytes.
"""

import triton
import triton.language as tl

from .offsets import image_offsets


@triton.jit
def channel_sum_kernel(
    features_ptr,  # (N, C, L), any dtype
    weights_ptr,  # (N, C) float32, contiguous
    partials_ptr,  # (N, P, L) float32, contiguous
    stride_n,
    C: tl.constexpr,
    L: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE_L: tl.constexpr,
    PARTIAL_C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """This program sums PARTIAL_C channels of one image at BLOCK_L positions."""
    parts: tl.constexpr = (C + PARTIAL_C - 1) // PARTIAL_C
    blocks: tl.constexpr = (L + BLOCK_L - 1) // BLOCK_L
    n = (tl.program_id(0) // (parts * blocks)).to(tl.int64)
    part = tl.program_id(0) // blocks % parts
    l = tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    image_ptr = features_ptr + n * stride_n

    acc = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    for start in range(0, PARTIAL_C, BLOCK_C):
        c = part * PARTIAL_C + start + tl.arange(0, BLOCK_C)
        offsets = image_offsets(c[:, None], l[None, :], C, L, STRIDE_C, STRIDE_L)
        mask = (c < C)[:, None] & (l < L)[None, :]

        a = tl.load(image_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(weights_ptr + n * C + c, mask=c < C, other=0.0)
        acc += a * s[:, None]

    tl.store(partials_ptr + (n * parts + part) * L + l, tl.sum(acc, axis=0), mask=l < L)
