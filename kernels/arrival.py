"""Sums over a launch's programs, added up by whichever arrives last, in a fixed order: the same bits every
run."""

import triton
import triton.language as tl


@triton.jit
def is_last(counter_ptr):
    """Whether all other programs of the launch were here, and what they stored before can be loaded, with
    cache_modifier=".cg".  The counter is an int32 that starts at zero."""
    tl.debug_barrier()  # the stores and loads of all threads, before the one thread that counts
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1


@triton.jit
def row_sum(values_ptr, weights_ptr, N, BLOCK: tl.constexpr):
    """sum over n of weights_n values_n, float32, which other programs may have stored; without weights their
    sum."""
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
