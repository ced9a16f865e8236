"""All sums of a dense gradient G = dy/dD that Grad-CAM and the backward need, in one pass over (A, G):

    means[n, c]       = 1/L * sum_l G_cl t_l       (t = 1 without spatial weights)
    dots[n, c]        = sum_l G_cl A_cl            ds under channel attention alone
    partials[n, p, l] = sum over part p of c of G_cl A_cl      dT, summed over p in order

Reads A and G once, writes 8*N*C + 4*N*P*L bytes.  No atomics.
"""

import triton
import triton.language as tl

from .offsets import image_offsets


@triton.jit
def grad_cam_means_kernel(
    features_ptr,  # (N, C, L), any dtype
    grad_ptr,  # (N, C, L), any dtype, any strides (0 for an expanded gradient)
    weights_ptr,  # (N, L) float32, contiguous; None: all are 1
    means_ptr,  # (N, C) float32
    dots_ptr,  # (N, C) float32
    partials_ptr,  # (N, P, L) float32, P = ceil(C / BLOCK_C)
    stride_n,
    grad_stride_n,
    C: tl.constexpr,
    L: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE_L: tl.constexpr,
    GRAD_STRIDE_C: tl.constexpr,
    GRAD_STRIDE_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """This program reduces BLOCK_C channels of one image over positions and over channels."""
    parts: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    n = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    image_ptr = features_ptr + n * stride_n
    grad_image_ptr = grad_ptr + n * grad_stride_n

    means = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    dots = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    for start in range(0, L, BLOCK_L):
        l = start + tl.arange(0, BLOCK_L)
        mask = (c < C)[:, None] & (l < L)[None, :]
        offsets = image_offsets(c[:, None], l[None, :], C, L, STRIDE_C, STRIDE_L)
        grad_offsets = image_offsets(c[:, None], l[None, :], C, L, GRAD_STRIDE_C, GRAD_STRIDE_L)

        a = tl.load(image_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad_image_ptr + grad_offsets, mask=mask, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            means += g * tl.load(weights_ptr + n * L + l, mask=l < L, other=0.0)[None, :]
        else:
            means += g
        dots += a * g
        tl.store(partials_ptr + (n * parts + part) * L + l, tl.sum(a * g, axis=0), mask=l < L)

    tl.store(means_ptr + n * C + c, tl.sum(means, axis=1) / L, mask=c < C)
    tl.store(dots_ptr + n * C + c, tl.sum(dots, axis=1), mask=c < C)
