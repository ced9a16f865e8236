"""offset(c, l) = c * STRIDE_C + l * STRIDE_L: the place of A[c, l], from the first element of its image."""

import triton
import triton.language as tl


@triton.jit
def image_offsets(
    c, l, C: tl.constexpr, L: tl.constexpr, STRIDE_C: tl.constexpr, STRIDE_L: tl.constexpr
):  # fmt: skip
    """Offsets of channels c at positions l, which broadcast; int64 only if int32 would overflow.

    One image is rarely so large, but a slice of a larger tensor, (C, N, L) or (L, N, C) memory, can be.
    """
    WIDE: tl.constexpr = (C - 1) * STRIDE_C + (L - 1) * STRIDE_L >= 2**31
    if WIDE:
        c = c.to(tl.int64)
        l = l.to(tl.int64)
    return c * STRIDE_C + l * STRIDE_L
