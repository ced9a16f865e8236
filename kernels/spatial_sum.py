"""out[n, c] = scale * sum_l weights[n, l] * A[n, c, l]; of two weights at once with R = 2.

With R = 0 all weights are 1.  GAP is R = 0 and scale = 1/L; the attended average pool is weights = T and
scale = 1/L.  Reads A once, writes 4*N*C bytes a map.
"""

import triton
import triton.language as tl

from .offsets import image_offsets


@triton.jit
def store_spatial_sums(
    image_ptr,
    weights_ptr,  # (L,) float32 of this image; ignored for R = 0
    weights_1_ptr,  # the same for R = 2
    out_ptr,  # (C,) float32 of this image
    out_1_ptr,  # the same for R = 2
    first,  # channel
    scale,
    C: tl.constexpr,
    L: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE_L: tl.constexpr,
    R: tl.constexpr,
    TASK_C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Store the sums of TASK_C channels of one image, with up to STAGES - 1 tiles under way."""
    l = tl.arange(0, BLOCK_L)
    if R > 0:
        t = tl.load(weights_ptr + l, mask=l < L, other=0.0, cache_modifier=".cg")
    if R > 1:
        t_1 = tl.load(weights_1_ptr + l, mask=l < L, other=0.0, cache_modifier=".cg")
    for start in tl.range(0, TASK_C, BLOCK_C, num_stages=STAGES):
        c = first + start + tl.arange(0, BLOCK_C)
        acc = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
        acc_1 = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
        for at in tl.range(0, L, BLOCK_L, num_stages=STAGES):
            l = at + tl.arange(0, BLOCK_L)
            offsets = image_offsets(c[:, None], l[None, :], C, L, STRIDE_C, STRIDE_L)
            mask = (c < C)[:, None] & (l < L)[None, :]
            a = tl.load(image_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            if R == 0:
                acc += a
            if R > 0:
                if L > BLOCK_L:
                    t = tl.load(weights_ptr + l, mask=l < L, other=0.0, cache_modifier=".cg")
                acc += a * t[None, :]
            if R > 1:
                if L > BLOCK_L:
                    t_1 = tl.load(weights_1_ptr + l, mask=l < L, other=0.0, cache_modifier=".cg")
                acc_1 += a * t_1[None, :]
        tl.store(out_ptr + c, tl.sum(acc, axis=1) * scale, mask=c < C)
        if R > 1:
            tl.store(out_1_ptr + c, tl.sum(acc_1, axis=1) * scale, mask=c < C)


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
    first = tl.program_id(0) % blocks * BLOCK_C
    store_spatial_sums(
        features_ptr + n * stride_n, weights_ptr + n * L, weights_ptr, out_ptr + n * C, out_ptr, first, scale,
        C, L, STRIDE_C, STRIDE_L, 1 if HAS_WEIGHTS else 0, BLOCK_C, BLOCK_C, BLOCK_L, 1,
    )  # fmt: skip
