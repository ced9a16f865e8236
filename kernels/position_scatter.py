"""out[n, l] = sum over channels c with index[n, c] = l of values[n, c]: dT under max pooling.

The scatter is a masked sum in a fixed order, so it needs no float atomics.
Touches nothing of A's size.
"""

import triton
import triton.language as tl


@triton.jit
def position_scatter_kernel(
    values_ptr,  # (N, C) float32, contiguous
    index_ptr,  # (N, C) int64, contiguous
    out_ptr,  # (N, L) float32, contiguous
    C: tl.constexpr,
    L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """This program sums the values of all channels of one image at BLOCK_L positions."""
    blocks: tl.constexpr = (L + BLOCK_L - 1) // BLOCK_L
    n = (tl.program_id(0) // blocks).to(tl.int64)
    l = tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)

    acc = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        x = tl.load(values_ptr + n * C + c, mask=c < C, other=0.0)
        index = tl.load(index_ptr + n * C + c, mask=c < C, other=-1).to(tl.int32)
        acc += tl.where(index[:, None] == l[None, :], x[:, None], 0.0)

    tl.store(out_ptr + n * L + l, tl.sum(acc, axis=0), mask=l < L)
