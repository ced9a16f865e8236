"""partials[n, p, l] = sum over the channels c of part p of weights[n, c] * A[n, c, l].

The sum over p, in the order p = 0, 1, ..., is channel_sum; `spatial_norm` takes the partials as they
are.  No atomics: the result is the same bits every run.  Reads A once, writes 4*N*P*L bytes.
"""

import triton
import triton.language as tl

from .offsets import image_offsets


@triton.jit
def channel_sums(
    image_ptr,
    weights_ptr,  # (C,) float32 of this image: s, or with EXPONENTIAL logits
    peak,  # s = exp(logits - peak); only with EXPONENTIAL
    first,  # the first channel
    l,  # (BLOCK_L,) positions
    C: tl.constexpr,
    L: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE_L: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    PARTIAL_C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """(BLOCK_L,) float32: sum of s_c A_cl over PARTIAL_C channels of one image."""
    acc = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    for start in range(0, PARTIAL_C, BLOCK_C):
        c = first + start + tl.arange(0, BLOCK_C)
        offsets = image_offsets(c[:, None], l[None, :], C, L, STRIDE_C, STRIDE_L)
        mask = (c < C)[:, None] & (l < L)[None, :]

        a = tl.load(image_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(
            weights_ptr + c, mask=c < C, other=-float("inf") if EXPONENTIAL else 0.0, cache_modifier=".cg"
        )
        if EXPONENTIAL:
            s = tl.exp(s - peak)
        acc += a * s[:, None]
    return tl.sum(acc, axis=0)


@triton.jit
def channel_sums_pair(
    image_ptr,
    weights_ptr,  # (2, C) float32 of this image
    first,  # the first channel
    l,  # (BLOCK_L,) positions
    C: tl.constexpr,
    L: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE_L: tl.constexpr,
    PARTIAL_C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """The sums for two rows of weights, from one read of A."""
    acc_0 = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    acc_1 = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    for start in range(0, PARTIAL_C, BLOCK_C):
        c = first + start + tl.arange(0, BLOCK_C)
        offsets = image_offsets(c[:, None], l[None, :], C, L, STRIDE_C, STRIDE_L)
        mask = (c < C)[:, None] & (l < L)[None, :]

        a = tl.load(image_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        acc_0 += a * tl.load(weights_ptr + c, mask=c < C, other=0.0)[:, None]
        acc_1 += a * tl.load(weights_ptr + C + c, mask=c < C, other=0.0)[:, None]
    return tl.sum(acc_0, axis=0), tl.sum(acc_1, axis=0)


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

    sums = channel_sums(
        features_ptr + n * stride_n, weights_ptr + n * C, 0.0, part * PARTIAL_C, l,
        C, L, STRIDE_C, STRIDE_L, False, PARTIAL_C, BLOCK_C, BLOCK_L,
    )  # fmt: skip
    tl.store(partials_ptr + (n * parts + part) * L + l, sums, mask=l < L)
