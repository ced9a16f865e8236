"""out[n, c] = scale * sum_l weights[n, l] * A[n, c, l], for R = 0, 1 or 2 weights at once.

With R = 0 all weights are 1.  GAP is R = 0 and scale = 1/L; the attended average pool is weights = T and
scale = 1/L.  Reads A once, writes 4*N*C bytes for each output.

`channel_sum` follows the mean, so the mean asks L2 to keep A.  A weighted sum is the last pass of the forward
or of the backward, so A may then leave L2.
"""

import triton
import triton.language as tl

from .offsets import image_offsets


@triton.jit(do_not_specialize=["clear"])
def spatial_sum_kernel(
    features_ptr,  # (N, C, L), any dtype
    weights_ptr, weights_1_ptr,  # (N, L) float32, contiguous; only the first R are not None
    out_ptr, out_1_ptr,  # (N, C) float32, contiguous; the second is None unless R = 2
    scale,
    stride_n,
    clear_ptr,  # (clear,) int32, or None
    clear,
    C: tl.constexpr,
    L: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE_L: tl.constexpr,
    R: tl.constexpr,
    TASK_C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """This program sums TASK_C channels of one image over all positions.  Up to STAGES - 1 tiles are being
    copied to shared memory meanwhile.  The first program clears the counters that later launches use."""
    if clear_ptr is not None and tl.program_id(0) == 0:
        start = 0
        while start < clear:
            at = start + tl.arange(0, 128)
            tl.store(clear_ptr + at, tl.zeros((128,), tl.int32), mask=at < clear)
            start += 128
    tasks: tl.constexpr = (C + TASK_C - 1) // TASK_C
    n = (tl.program_id(0) // tasks).to(tl.int64)
    first = tl.program_id(0) % tasks * TASK_C
    image_ptr = features_ptr + n * stride_n
    policy: tl.constexpr = "evict_last" if R == 0 else "evict_first"
    l = tl.arange(0, BLOCK_L)
    if R > 0:
        w = tl.load(weights_ptr + n * L + l, mask=l < L, other=0.0)
    if R > 1:
        w_1 = tl.load(weights_1_ptr + n * L + l, mask=l < L, other=0.0)
    for start in tl.range(0, TASK_C, BLOCK_C, num_stages=STAGES):
        c = first + start + tl.arange(0, BLOCK_C)
        acc = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
        acc_1 = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
        for at in tl.range(0, L, BLOCK_L, num_stages=STAGES):
            l = at + tl.arange(0, BLOCK_L)
            offsets = image_offsets(c[:, None], l[None, :], C, L, STRIDE_C, STRIDE_L)
            mask = (c < C)[:, None] & (l < L)[None, :]
            a = tl.load(image_ptr + offsets, mask=mask, other=0.0, eviction_policy=policy).to(tl.float32)
            if R == 0:
                acc += a
            if R > 0:
                if L > BLOCK_L:
                    w = tl.load(weights_ptr + n * L + l, mask=l < L, other=0.0)
                acc += a * w[None, :]
            if R > 1:
                if L > BLOCK_L:
                    w_1 = tl.load(weights_1_ptr + n * L + l, mask=l < L, other=0.0)
                acc_1 += a * w_1[None, :]
        tl.store(out_ptr + n * C + c, tl.sum(acc, axis=1) * scale, mask=c < C)
        if R > 1:
            tl.store(out_1_ptr + n * C + c, tl.sum(acc_1, axis=1) * scale, mask=c < C)
