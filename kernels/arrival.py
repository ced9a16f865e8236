"""Sums over the programs of a launch.  The last program to arrive adds them in a fixed order, so the bits are
the same every run."""

import triton
import triton.language as tl


@triton.jit
def is_last(counter_ptr):
    """Whether all other programs of the launch arrived before.  Their stores can then be loaded with
    cache_modifier=".cg".  The counter is an int32 that starts at zero."""
    tl.debug_barrier()  # the stores and loads of all threads come before the count, which one thread does
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1


@triton.jit
def row_sum(values_ptr, weights_ptr, N, BLOCK: tl.constexpr):
    """sum over n of weights_n values_n, float32; weights are 1 if None.  Other programs may store both."""
    acc = tl.zeros((BLOCK,), tl.float32)
    start = 0
    while start < N:
        n = start + tl.arange(0, BLOCK)
        x = tl.load(values_ptr + n, mask=n < N, other=0.0, cache_modifier=".cg")
        if weights_ptr is not None:
            x *= tl.load(weights_ptr + n, mask=n < N, other=0.0)
        acc += x
        start += BLOCK
    return tl.sum(acc, axis=0)
