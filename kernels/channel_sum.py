"""partials[n, p, l] = sum over the channels c of part p of weights[n, c] * A[n, c, l]; of two weights at once
with R = 2.

The sum over p, in the order p = 0, 1, ..., is channel_sum; `spatial_norm` takes the partials as they
are.  No atomics: the result is the same bits every run.  Reads A once, writes 4*N*R*P*L bytes.
"""

import triton
import triton.language as tl

from .offsets import image_offsets


@triton.jit
def store_channel_sums(
    image_ptr,
    weights_ptr,  # (C,) float32 of this image
    weights_1_ptr,  # the same for R = 2
    partial_ptr,  # (L,) float32: this part
    partial_1_ptr,  # the same for R = 2
    first,  # channel
    l,  # (BLOCK_L,) positions
    C: tl.constexpr,
    L: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE_L: tl.constexpr,
    R: tl.constexpr,
    PARTIAL_C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Store sum_c s_c A_cl over PARTIAL_C channels of one image, with up to STAGES - 1 tiles under way."""
    acc = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    acc_1 = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    for start in tl.range(0, PARTIAL_C, BLOCK_C, num_stages=STAGES):
        c = first + start + tl.arange(0, BLOCK_C)
        offsets = image_offsets(c[:, None], l[None, :], C, L, STRIDE_C, STRIDE_L)
        mask = (c < C)[:, None] & (l < L)[None, :]
        a = tl.load(image_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        acc += a * tl.load(weights_ptr + c, mask=c < C, other=0.0)[:, None]
        if R > 1:
            acc_1 += a * tl.load(weights_1_ptr + c, mask=c < C, other=0.0)[:, None]
    tl.store(partial_ptr + l, tl.sum(acc, axis=0), mask=l < L)
    if R > 1:
        tl.store(partial_1_ptr + l, tl.sum(acc_1, axis=0), mask=l < L)


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
    partial_ptr = partials_ptr + (n * parts + part) * L
    store_channel_sums(
        features_ptr + n * stride_n, weights_ptr + n * C, weights_ptr, partial_ptr, partial_ptr,
        part * PARTIAL_C, l, C, L, STRIDE_C, STRIDE_L, 1, PARTIAL_C, BLOCK_C, BLOCK_L, 1,
    )  # fmt: skip
