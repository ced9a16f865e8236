"""S = softmax(e) over channels, and its backward; one program does one image:

    S_c = exp(e_c - max e) / sum exp        de_c = S_c (dS_c - <dS, S>) + scale extra_c

The channels of an image stay in registers.  Touches nothing of A's size.
"""

import triton
import triton.language as tl


@triton.jit
def softmax_kernel(
    logits_ptr,  # (N, C) float32, contiguous: e
    channel_ptr,  # (N, C) float32, contiguous: S
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """This program does all channels of one image."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    e = tl.load(logits_ptr + n * C + c, mask=c < C, other=-float("inf"))
    exponentials = tl.where(c < C, tl.exp(e - tl.max(e, axis=0)), 0.0)
    tl.store(channel_ptr + n * C + c, exponentials / tl.sum(exponentials, axis=0), mask=c < C)


@triton.jit
def softmax_grad_kernel(
    channel_ptr,  # (N, C) float32, contiguous: S
    grad_channel_ptr,  # (N, C) float32, contiguous: dS
    extra_ptr,  # (N, C) float32, contiguous: a further gradient of e; or None
    scale_ptr,  # (), any dtype, or None: 1
    grad_logits_ptr,  # (N, C) float32, contiguous: de
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """This program does all channels of one image."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    s = tl.load(channel_ptr + n * C + c, mask=c < C, other=0.0)
    ds = tl.load(grad_channel_ptr + n * C + c, mask=c < C, other=0.0)
    if extra_ptr is not None:
        extra = tl.load(extra_ptr + n * C + c, mask=c < C, other=0.0)
    de = s * (ds - tl.sum(s * ds, axis=0))
    if extra_ptr is not None:
        if scale_ptr is not None:
            extra *= tl.load(scale_ptr).to(tl.float32)
        de += extra
    tl.store(grad_logits_ptr + n * C + c, de, mask=c < C)
