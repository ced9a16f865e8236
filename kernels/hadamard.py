"""D[n, c, l] = scale A[n, c, l] * t[n, l], or scale A[n, c, l] * s[n, c] for channel attention alone.

The attended map, for classifiers that need all of it.  Reads A once, writes D once.
"""

import triton
import triton.language as tl

from .offsets import image_offsets


@triton.jit
def hadamard_kernel(
    features_ptr,  # (N, C, L), any dtype
    weights_ptr,  # float32, contiguous: (N, L), or (N, C) with BY_CHANNEL
    out_ptr,  # (N, C, L)
    scale,
    stride_n,
    out_stride_n,
    C: tl.constexpr,
    L: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE_L: tl.constexpr,
    OUT_STRIDE_C: tl.constexpr,
    OUT_STRIDE_L: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """This program weights a BLOCK_C x BLOCK_L tile of one image."""
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    blocks_l: tl.constexpr = (L + BLOCK_L - 1) // BLOCK_L
    n = (tl.program_id(0) // (blocks_c * blocks_l)).to(tl.int64)
    c = tl.program_id(0) // blocks_l % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    l = tl.program_id(0) % blocks_l * BLOCK_L + tl.arange(0, BLOCK_L)
    mask = (c < C)[:, None] & (l < L)[None, :]
    offsets = image_offsets(c[:, None], l[None, :], C, L, STRIDE_C, STRIDE_L)
    a = tl.load(features_ptr + n * stride_n + offsets, mask=mask, other=0.0).to(tl.float32)
    if BY_CHANNEL:
        d = a * tl.load(weights_ptr + n * C + c, mask=c < C, other=0.0)[:, None]
    else:
        d = a * tl.load(weights_ptr + n * L + l, mask=l < L, other=0.0)[None, :]

    d *= scale
    out_offsets = image_offsets(c[:, None], l[None, :], C, L, OUT_STRIDE_C, OUT_STRIDE_L)
    tl.store(out_ptr + n * out_stride_n + out_offsets, d.to(out_ptr.dtype.element_ty), mask=mask)
