"""out[n, c] = scale * sum_l weights[n, l] * A[n, c, l]; without weights, scale * sum_l A[n, c, l].

GAP is scale = 1/L without weights; the attended average pool is weights = T, scale = 1/L.
Reads A once, writes 4*N*C bytes.
"""

import triton
import triton.language as tl

from .offsets import image_offsets


@triton.jit
def spatial_sum_kernel(
    features_ptr,  # (N, C, L), any dtype
    weights_ptr,  # (N, L) float32, contiguous; ignored without HAS_WEIGHTS
    out_ptr,  # (N, C) float32, contiguous
    scale,
    stride_n,
    C: tl.constexpr,
    L: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE_L: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """This program sums BLOCK_C channels of one image over all positions."""
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    image_ptr = features_ptr + n * stride_n

    acc = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    for start in range(0, L, BLOCK_L):
        l = start + tl.arange(0, BLOCK_L)
        offsets = image_offsets(c[:, None], l[None, :], C, L, STRIDE_C, STRIDE_L)
        mask = (c < C)[:, None] & (l < L)[None, :]

        a = tl.load(image_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            t = tl.load(weights_ptr + n * L + l, mask=l < L, other=0.0)
            acc += a * t[None, :]
        else:
            acc += a

    tl.store(out_ptr + n * C + c, tl.sum(acc, axis=1) * scale, mask=c < C)
