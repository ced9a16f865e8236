"""partials[n, r, p, l] = sum over the channels c of part p of weights_r[n, c] A[n, c, l], for R = 1 or 2
weights at once.

The sum over p, in the order p = 0, 1, ..., is channel_sum; `spatial_norm` adds the partials.  There are no
atomics, so the bits are the same every run.  Reads A once, writes 4*N*R*P*L bytes.

This pass goes through the images from the last to the first, `spatial_sum` from the first to the last.  Each
pass then begins with the images that the pass before it left in L2.  A hint asks L2 to keep A for the next
pass; asynchronous copies to shared memory take no hint.
"""

import triton
import triton.language as tl

from .offsets import image_offsets


@triton.jit
def channel_sum_kernel(
    features_ptr,  # (N, C, L), any dtype
    weights_ptr, weights_1_ptr,  # (N, C) float32, contiguous; the second is None for R = 1
    partials_ptr,  # (N, R, P, L) float32, contiguous
    stride_n,
    C: tl.constexpr,
    L: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE_L: tl.constexpr,
    R: tl.constexpr,
    PARTIAL_C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """This program sums PARTIAL_C channels of one image at BLOCK_L positions.  Up to STAGES - 1 tiles are
    being copied to shared memory meanwhile."""
    parts: tl.constexpr = (C + PARTIAL_C - 1) // PARTIAL_C
    blocks: tl.constexpr = (L + BLOCK_L - 1) // BLOCK_L
    n = tl.num_programs(0) // (parts * blocks) - 1 - tl.program_id(0) // (parts * blocks)
    n = n.to(tl.int64)
    part = tl.program_id(0) // blocks % parts
    l = tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    image_ptr = features_ptr + n * stride_n
    # One accumulator for each position.  One for each element of a tile spilled with two weights.
    acc = tl.zeros((BLOCK_L,), tl.float32)
    acc_1 = tl.zeros((BLOCK_L,), tl.float32)
    for start in tl.range(0, PARTIAL_C, BLOCK_C, num_stages=STAGES):
        c = part * PARTIAL_C + start + tl.arange(0, BLOCK_C)
        offsets = image_offsets(c[:, None], l[None, :], C, L, STRIDE_C, STRIDE_L)
        mask = (c < C)[:, None] & (l < L)[None, :]
        a = tl.load(image_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        acc += tl.sum(a * tl.load(weights_ptr + n * C + c, mask=c < C, other=0.0)[:, None], axis=0)
        if R > 1:
            acc_1 += tl.sum(a * tl.load(weights_1_ptr + n * C + c, mask=c < C, other=0.0)[:, None], axis=0)
    partial_ptr = partials_ptr + (n * R * parts + part) * L
    tl.store(partial_ptr + l, acc, mask=l < L)
    if R > 1:
        tl.store(partial_ptr + parts * L + l, acc_1, mask=l < L)
