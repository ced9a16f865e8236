"""out[n, c] = scale * sum_l weights[n, l] * A[n, c, l]; without weights, scale * sum_l A[n, c, l].

GAP is scale = 1/L without weights; the attended average pool is weights = T, scale = 1/L.
Reads A once, writes 4*N*C bytes.
"""

import triton
import triton.language as tl

from .offsets import image_offsets


@triton.jit
def spatial_sums(
    image_ptr,
    weights_ptr,  # (L,) float32 of this image; ignored without HAS_WEIGHTS
    c,  # (BLOCK_C,) channels
    C: tl.constexpr,
    L: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE_L: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """(BLOCK_C,) float32: sum_l weights_l A_cl of one image."""
    acc = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    for start in range(0, L, BLOCK_L):
        l = start + tl.arange(0, BLOCK_L)
        offsets = image_offsets(c[:, None], l[None, :], C, L, STRIDE_C, STRIDE_L)
        mask = (c < C)[:, None] & (l < L)[None, :]

        a = tl.load(image_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            t = tl.load(weights_ptr + l, mask=l < L, other=0.0, cache_modifier=".cg")
            acc += a * t[None, :]
        else:
            acc += a
    return tl.sum(acc, axis=1)


@triton.jit
def spatial_sums_pair(
    image_ptr,
    weights_ptr,  # (2, L) float32 of this image
    c,  # (BLOCK_C,) channels
    C: tl.constexpr,
    L: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """The sums for two maps of weights, from one read of A."""
    acc_0 = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    acc_1 = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    for start in range(0, L, BLOCK_L):
        l = start + tl.arange(0, BLOCK_L)
        offsets = image_offsets(c[:, None], l[None, :], C, L, STRIDE_C, STRIDE_L)
        mask = (c < C)[:, None] & (l < L)[None, :]

        a = tl.load(image_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        t_0 = tl.load(weights_ptr + l, mask=l < L, other=0.0, cache_modifier=".cg")
        t_1 = tl.load(weights_ptr + L + l, mask=l < L, other=0.0, cache_modifier=".cg")
        acc_0 += a * t_0[None, :]
        acc_1 += a * t_1[None, :]
    return tl.sum(acc_0, axis=1), tl.sum(acc_1, axis=1)


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

    sums = spatial_sums(
        features_ptr + n * stride_n, weights_ptr + n * L, c,
        C, L, STRIDE_C, STRIDE_L, HAS_WEIGHTS, BLOCK_C, BLOCK_L,
    )  # fmt: skip
    tl.store(out_ptr + n * C + c, sums * scale, mask=c < C)
