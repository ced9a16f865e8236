"""index[n, c] = argmax_l t_l A_cl, peak[n, c] = A at that position; the pooled value is peak * t[index].

Ties go to the first position and a NaN wins over everything, as in torch's MaxPool.
Reads A once, and then the N*C maxima again; writes 12*N*C bytes.
"""

import triton
import triton.language as tl

from .offsets import image_offsets


@triton.jit
def max_pool_kernel(
    features_ptr,  # (N, C, L), any dtype
    weights_ptr,  # (N, L) float32, contiguous; None: all are 1
    peak_ptr,  # (N, C) float32, contiguous
    index_ptr,  # (N, C) int64, contiguous
    stride_n,
    C: tl.constexpr,
    L: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """This program finds the attended maximum of BLOCK_C channels of one image."""
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    image_ptr = features_ptr + n * stride_n
    best = tl.full((BLOCK_C, BLOCK_L), -float("inf"), tl.float32)
    where = tl.zeros((BLOCK_C, BLOCK_L), tl.int32) + tl.arange(0, BLOCK_L)[None, :]
    for at in range(0, L, BLOCK_L):
        l = at + tl.arange(0, BLOCK_L)
        offsets = image_offsets(c[:, None], l[None, :], C, L, STRIDE_C, STRIDE_L)
        mask = (c < C)[:, None] & (l < L)[None, :]
        d = tl.load(image_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            d *= tl.load(weights_ptr + n * L + l, mask=l < L, other=0.0)[None, :]
        d = tl.where(mask, d, -float("inf"))
        better = (d > best) | ((d != d) & (best == best))
        best = tl.where(better, d, best)
        where = tl.where(better, l[None, :], where)

    is_nan = (best != best).to(tl.int32)
    row_max = tl.max(tl.where(is_nan == 1, -float("inf"), best), axis=1)
    row_has_nan = tl.max(is_nan, axis=1)
    candidate = tl.where(row_has_nan[:, None] == 1, is_nan == 1, best == row_max[:, None])
    index = tl.min(tl.where(candidate, where, L - 1), axis=1)

    peak_offsets = image_offsets(c, index, C, L, STRIDE_C, STRIDE_L)
    peak = tl.load(image_ptr + peak_offsets, mask=c < C, other=0.0)
    tl.store(peak_ptr + n * C + c, peak.to(tl.float32), mask=c < C)
    tl.store(index_ptr + n * C + c, index.to(tl.int64), mask=c < C)
