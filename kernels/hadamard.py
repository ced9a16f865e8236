"""D[n, c, l] = A[n, c, l] * t[n, l], or A[n, c, l] * s[n, c] for channel attention alone.

The attended map, for classifiers that need all of it.  Reads A once, writes D once.
"""

import triton
import triton.language as tl

from .offsets import image_offsets


@triton.jit
def store_attended(
    image_ptr,
    weights_ptr,  # float32: (L,), or (C,) with BY_CHANNEL
    out_ptr,
    c,  # (BLOCK_C,) channels
    l,  # (BLOCK_L,) positions
    C: tl.constexpr,
    L: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE_L: tl.constexpr,
    OUT_STRIDE_C: tl.constexpr,
    OUT_STRIDE_L: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
):
    """Store D of one image at channels c and positions l."""
    mask = (c < C)[:, None] & (l < L)[None, :]
    offsets = image_offsets(c[:, None], l[None, :], C, L, STRIDE_C, STRIDE_L)
    a = tl.load(image_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if BY_CHANNEL:
        d = a * tl.load(weights_ptr + c, mask=c < C, other=0.0)[:, None]
    else:
        d = a * tl.load(weights_ptr + l, mask=l < L, other=0.0, cache_modifier=".cg")[None, :]

    out_offsets = image_offsets(c[:, None], l[None, :], C, L, OUT_STRIDE_C, OUT_STRIDE_L)
    tl.store(out_ptr + out_offsets, d.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def hadamard_kernel(
    features_ptr,  # (N, C, L), any dtype
    weights_ptr,  # float32, contiguous: (N, L), or (N, C) with BY_CHANNEL
    out_ptr,  # (N, C, L)
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
    weights_stride_n: tl.constexpr = C if BY_CHANNEL else L

    store_attended(
        features_ptr + n * stride_n, weights_ptr + n * weights_stride_n, out_ptr + n * out_stride_n, c, l,
        C, L, STRIDE_C, STRIDE_L, OUT_STRIDE_C, OUT_STRIDE_L, BY_CHANNEL,
    )  # fmt: skip
