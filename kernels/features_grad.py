"""dA, the gradient of the features, written without reading A:

    dA[n, c, l] = scale (first + s_c dU_l + dg_c / L)
    average pool   first = x_c t_l / L
    max pool       first = x_c t_l at l = index_c, else 0
    dense          first = G_cl t_l, or G_cl s_c for channel attention alone

with x = dz.  Without spatial attention t = 1 and there is no s_c dU_l term.  Writes |A|; reads G once in the
dense case.
"""

import triton
import triton.language as tl

from .offsets import image_offsets

AVERAGE = tl.constexpr(0)
MAXIMUM = tl.constexpr(1)
DENSE = tl.constexpr(2)


@triton.jit
def features_grad_kernel(
    out_ptr,  # (N, C, L): dA
    grad_ptr,  # (N, C, L): G, any strides; None unless POOL is DENSE
    x_ptr,  # (N, C) float32; None if POOL is DENSE
    index_ptr,  # (N, C) int64; None unless POOL is MAXIMUM
    attention_ptr,  # (N, L) float32: T; None without spatial attention
    grad_map_ptr,  # (N, L) float32: dU; None without spatial attention
    channel_ptr,  # (N, C) float32: s
    grad_mean_ptr,  # (N, C) float32: dg, or None
    scale_ptr,  # (), any dtype, or None
    out_stride_n,
    grad_stride_n,
    C: tl.constexpr,
    L: tl.constexpr,
    OUT_STRIDE_C: tl.constexpr,
    OUT_STRIDE_L: tl.constexpr,
    GRAD_STRIDE_C: tl.constexpr,
    GRAD_STRIDE_L: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """This program writes a BLOCK_C x BLOCK_L tile of one image's gradient."""
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    blocks_l: tl.constexpr = (L + BLOCK_L - 1) // BLOCK_L
    n = (tl.program_id(0) // (blocks_c * blocks_l)).to(tl.int64)
    c = tl.program_id(0) // blocks_l % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    l = tl.program_id(0) % blocks_l * BLOCK_L + tl.arange(0, BLOCK_L)
    mask = (c < C)[:, None] & (l < L)[None, :]

    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
    if POOL == DENSE:
        grad_image_ptr = grad_ptr + n * grad_stride_n
        offsets = image_offsets(c[:, None], l[None, :], C, L, GRAD_STRIDE_C, GRAD_STRIDE_L)
        first = tl.load(grad_image_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        first = tl.load(x_ptr + n * C + c, mask=c < C, other=0.0)[:, None]
        if POOL == AVERAGE:
            first = first / L
        if POOL == MAXIMUM:
            index = tl.load(index_ptr + n * C + c, mask=c < C, other=-1).to(tl.int32)
            first = tl.where(index[:, None] == l[None, :], first, 0.0)

    s = tl.load(channel_ptr + n * C + c, mask=c < C, other=0.0)
    k = tl.zeros((BLOCK_C,), tl.float32)
    if grad_mean_ptr is not None:
        k = tl.load(grad_mean_ptr + n * C + c, mask=c < C, other=0.0) / L
    if attention_ptr is not None:
        t = tl.load(attention_ptr + n * L + l, mask=l < L, other=0.0)
        du = tl.load(grad_map_ptr + n * L + l, mask=l < L, other=0.0)
        da = first * t[None, :] + s[:, None] * du[None, :] + k[:, None]
    else:
        if POOL == DENSE:
            first = first * s[:, None]
        da = tl.broadcast_to(first + k[:, None], (BLOCK_C, BLOCK_L))
    if scale_ptr is not None:
        da *= scale

    out_image_ptr = out_ptr + n * out_stride_n
    out_offsets = image_offsets(c[:, None], l[None, :], C, L, OUT_STRIDE_C, OUT_STRIDE_L)
    tl.store(out_image_ptr + out_offsets, da.to(out_ptr.dtype.element_ty), mask=mask)
