"""The gradients of up to four linear layers, in one launch:

    dW_jc = scale sum_n dy_nj x_nc        db_j = scale sum_n dy_nj

The error is that of float32 (`tf32`).  Each tile reads its dy and x once; dW and db are written.  Up to two
vectors, the gradients of batch norms, are scaled too, so that one launch serves all parameters.
"""

import triton
import triton.language as tl

from .tf32 import add_product, combined


@triton.jit
def _scaled(vector_ptr, out_ptr, scale_ptr, block, V, BLOCK: tl.constexpr):
    at = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(vector_ptr + at, mask=at < V, other=0.0)
    if scale_ptr is not None:
        x *= tl.load(scale_ptr).to(tl.float32)
    tl.store(out_ptr + at, x, mask=at < V)


@triton.jit(do_not_specialize=["N", "J", "C", "J_1", "C_1", "J_2", "C_2", "J_3", "C_3", "V", "V_1"])
def layer_grads_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr,  # (N, J), (N, C), (J, C), (J,) float32, contiguous; for each layer
    dy_1_ptr, x_1_ptr, weight_1_ptr, bias_1_ptr,  # or None
    dy_2_ptr, x_2_ptr, weight_2_ptr, bias_2_ptr,
    dy_3_ptr, x_3_ptr, weight_3_ptr, bias_3_ptr,
    scale_ptr,  # (), any dtype, or None
    N, J, C, J_1, C_1, J_2, C_2, J_3, C_3,
    vector_ptr, vector_out_ptr,  # (V,) float32, or None
    vector_1_ptr, vector_1_out_ptr,  # (V_1,) float32, or None
    V, V_1,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,  # blocks of N, rounded up to a power of two: few batch sizes need a compilation
    WIDE_J: tl.constexpr,  # whether all J are multiples of four, for accesses of 16 bytes
    WIDE_C: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """This program does a BLOCK_J x BLOCK_C tile of a dW.  The first tile in a row also does BLOCK_J of db.
    Each of the programs before the tiles does BLOCK_J * BLOCK_C elements of a vector."""
    tile = tl.program_id(0)  # counted from the first layer to the last, after the vectors
    if vector_ptr is not None:
        if tile < tl.cdiv(V, BLOCK_J * BLOCK_C):
            _scaled(vector_ptr, vector_out_ptr, scale_ptr, tile, V, BLOCK_J * BLOCK_C)
            return
        tile -= tl.cdiv(V, BLOCK_J * BLOCK_C)
    if vector_1_ptr is not None:
        if tile < tl.cdiv(V_1, BLOCK_J * BLOCK_C):
            _scaled(vector_1_ptr, vector_1_out_ptr, scale_ptr, tile, V_1, BLOCK_J * BLOCK_C)
            return
        tile -= tl.cdiv(V_1, BLOCK_J * BLOCK_C)
    if dy_1_ptr is not None:
        tiles = tl.cdiv(J, BLOCK_J) * tl.cdiv(C, BLOCK_C)
        if tile >= tiles:
            tile -= tiles
            dy_ptr, x_ptr, weight_ptr, bias_ptr = dy_1_ptr, x_1_ptr, weight_1_ptr, bias_1_ptr
            J, C = J_1, C_1
    if dy_2_ptr is not None:
        tiles = tl.cdiv(J, BLOCK_J) * tl.cdiv(C, BLOCK_C)
        if tile >= tiles:
            tile -= tiles
            dy_ptr, x_ptr, weight_ptr, bias_ptr = dy_2_ptr, x_2_ptr, weight_2_ptr, bias_2_ptr
            J, C = J_2, C_2
    if dy_3_ptr is not None:
        tiles = tl.cdiv(J, BLOCK_J) * tl.cdiv(C, BLOCK_C)
        if tile >= tiles:
            tile -= tiles
            dy_ptr, x_ptr, weight_ptr, bias_ptr = dy_3_ptr, x_3_ptr, weight_3_ptr, bias_3_ptr
            J, C = J_3, C_3

    if WIDE_J:
        J = J // 4 * 4  # no change, but it tells the compiler that 4 divides J
    if WIDE_C:
        C = C // 4 * 4
    tiles_c = tl.cdiv(C, BLOCK_C)
    j = tile // tiles_c * BLOCK_J + tl.arange(0, BLOCK_J)
    c = tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_J, BLOCK_C), tl.float32)
    low = tl.zeros((BLOCK_J, BLOCK_C), tl.float32)
    low_1 = tl.zeros((BLOCK_J, BLOCK_C), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        n = step * BLOCK_N + tl.arange(0, BLOCK_N)
        dy = tl.load(
            dy_ptr + j[:, None] + n[None, :] * J, mask=(j < J)[:, None] & (n < N)[None, :], other=0.0
        )
        x = tl.load(x_ptr + n[:, None] * C + c[None, :], mask=(n < N)[:, None] & (c < C)[None, :], other=0.0)
        acc, low, low_1 = add_product(dy, x, acc, low, low_1, PRECISION)
    acc = combined(acc, low, low_1)
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr).to(tl.float32)
    tl.store(weight_ptr + j[:, None] * C + c[None, :], acc, mask=(j < J)[:, None] & (c < C)[None, :])

    if tile % tiles_c == 0:
        sums = tl.zeros((BLOCK_J, BLOCK_N), tl.float32)
        for step in range(STEPS):
            n = step * BLOCK_N + tl.arange(0, BLOCK_N)
            sums += tl.load(
                dy_ptr + j[:, None] + n[None, :] * J, mask=(j < J)[:, None] & (n < N)[None, :], other=0.0
            )
        total = tl.sum(sums, axis=1)
        if scale_ptr is not None:
            total *= tl.load(scale_ptr).to(tl.float32)
        tl.store(bias_ptr + j, total, mask=j < J)
