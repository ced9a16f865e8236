"""A linear layer or its backward, for the few rows of a head:

    out_mn = sum_k x_mk w_kn  (+ b_n, ReLU | 0 where h_mn <= 0)

for R = 1 or 2 matrices x at once, with the error of float32 (`tf32`).  Few rows leave a GPU idle, so SPLIT
programs share a tile and each does a part of the sum over k.  The last program to arrive adds the parts in
their order, so the bits are the same every run.
"""

import triton
import triton.language as tl

from .tf32 import add_product, combined


@triton.jit(do_not_specialize=["M"])  # batches come in all sizes
def product_kernel(
    x_ptr, x_1_ptr,  # (M, K) float32; pointers that are not needed, as the second for R = 1, are None
    w_ptr,  # (K, N) float32
    bias_ptr,  # (N,) float32
    mask_ptr,  # (M, N) float32, contiguous: h
    out_ptr, out_1_ptr,  # (M, N) float32, contiguous
    partials_ptr,  # (R, SPLIT, M, N) float32
    counters_ptr,  # (R * tiles,) int32 zeros: the number of stored parts of each tile
    M, N, K,
    stride_xm, stride_xk, stride_wk, stride_wn,
    R: tl.constexpr,
    RELU: tl.constexpr,
    SPLIT: tl.constexpr,
    STEPS: tl.constexpr,  # blocks of k in a part
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """This program computes one of SPLIT parts of a BLOCK_M x BLOCK_N tile."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    part = tl.program_id(0) % SPLIT
    tile = tl.program_id(0) // SPLIT  # counted over all R matrices
    r = tile % R
    if R > 1:
        second = r == 1
        if second:
            x_ptr, out_ptr = x_1_ptr, out_1_ptr
    m = tile // R // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile // R % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    low = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    low_1 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        k = (part * STEPS + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + m[:, None] * stride_xm + k[None, :] * stride_xk,
            mask=(m < M)[:, None] & (k < K)[None, :], other=0.0,
        )  # fmt: skip
        w = tl.load(
            w_ptr + k[:, None] * stride_wk + n[None, :] * stride_wn,
            mask=(k < K)[:, None] & (n < N)[None, :], other=0.0,
        )  # fmt: skip
        acc, low, low_1 = add_product(x, w, acc, low, low_1, PRECISION)
    acc = combined(acc, low, low_1)

    offsets = m[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    is_last = True
    if SPLIT > 1:
        partials_ptr += r * SPLIT * M * N
        tl.store(partials_ptr + part * M * N + offsets, acc, mask=mask)
        tl.debug_barrier()  # the stores of all threads come before the count, which one thread does
        is_last = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel") == SPLIT - 1
        if is_last:
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for p in range(SPLIT):  # parts that other programs stored, loaded past the L1 cache
                acc += tl.load(partials_ptr + p * M * N + offsets, mask=mask, other=0.0, cache_modifier=".cg")
    if is_last:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :]
        if RELU:
            acc = tl.where(acc < 0.0, 0.0, acc)  # NaN stays
        if mask_ptr is not None:
            acc = tl.where(tl.load(mask_ptr + offsets, mask=mask, other=0.0) <= 0.0, 0.0, acc)
        tl.store(out_ptr + offsets, acc, mask=mask)
