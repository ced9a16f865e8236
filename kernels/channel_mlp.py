"""F_cr inside a kernel: e = FC2(relu(FC1(g))) for a group of up to 16 images, cut into tasks.

    hidden[n, j] = relu(b1_j + sum_c g_nc W1_jc)      in parts over c, added up in a fixed order
    e[n, c]      = b2_c + sum_j hidden[n, j] W2_cj
    S[n, c]      = exp(e - m) / sum exp(e - m)        from each block's maximum and sum of exponentials

The images of a group are the rows of a matrix product, so that the weights are read once a group.  Pointers
are to the group's first image: offsets from there are short, and fit int32.
"""

import triton
import triton.language as tl

ROWS = tl.constexpr(16)  # the smallest side of tl.dot; a group has at most as many images
FC1_C = tl.constexpr(256)  # channels of one part of FC1's sum
FC1_J = tl.constexpr(32)  # hidden units of one task, and of one block whose parts are added up
FC2_C = tl.constexpr(32)  # channels of one task of FC2, and of one block of the softmax's statistics
BLOCK_K = tl.constexpr(32)  # of both sums at a time


@triton.jit
def hidden_part(
    mean_ptr,  # (images, C) float32: g
    fc1_weight_ptr,  # (J, C)
    parts_ptr,  # (P, N, J) float32, from the group's first image
    part,
    block,
    images,  # of this group
    batch,  # N
    C: tl.constexpr,
    J: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store one part of FC1's sum for one block of hidden units."""
    n = tl.arange(0, ROWS)
    j = block * FC1_J + tl.arange(0, FC1_J)

    acc = tl.zeros((ROWS, FC1_J), tl.float32)
    for start in range(0, FC1_C, BLOCK_K):
        c = part * FC1_C + start + tl.arange(0, BLOCK_K)
        mean_mask = (n < images)[:, None] & (c < C)[None, :]
        weight_mask = (c < C)[:, None] & (j < J)[None, :]
        g = tl.load(mean_ptr + n[:, None] * C + c[None, :], mean_mask, other=0.0, cache_modifier=".cg")
        w = tl.load(fc1_weight_ptr + j[None, :] * C + c[:, None], weight_mask, other=0.0)
        acc = tl.dot(g, w.to(tl.float32), acc, input_precision=PRECISION)

    out_ptr = parts_ptr + part * batch.to(tl.int64) * J
    tl.store(out_ptr + n[:, None] * J + j[None, :], acc, mask=(n < images)[:, None] & (j < J)[None, :])


@triton.jit
def hidden_block(
    parts_ptr,  # (P, N, J) float32, from the group's first image
    fc1_bias_ptr,  # (J,)
    hidden_ptr,  # (images, J) float32
    block,
    images,  # of this group
    batch,  # N
    C: tl.constexpr,
    J: tl.constexpr,
):
    """Store one block of the hidden layer, all of whose parts are stored."""
    parts: tl.constexpr = (C + FC1_C - 1) // FC1_C
    n = tl.arange(0, ROWS)
    j = block * FC1_J + tl.arange(0, FC1_J)
    offsets = n[:, None] * J + j[None, :]
    mask = (n < images)[:, None] & (j < J)[None, :]

    h = tl.zeros((ROWS, FC1_J), tl.float32)
    for part in range(parts):
        part_ptr = parts_ptr + part * batch.to(tl.int64) * J
        h += tl.load(part_ptr + offsets, mask, other=0.0, cache_modifier=".cg")
    h += tl.load(fc1_bias_ptr + j, j < J, other=0.0).to(tl.float32)[None, :]
    h = tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL)  # as torch.relu
    tl.store(hidden_ptr + offsets, h, mask)


@triton.jit
def channel_logits(
    hidden_ptr,  # (images, J) float32
    fc2_weight_ptr,  # (C, J)
    fc2_bias_ptr,  # (C,)
    logits_ptr,  # (images, C) float32: e
    statistics_ptr,  # (images, B, 2) float32: maximum and sum of exponentials of each block
    task,
    images,  # of this group
    C: tl.constexpr,
    J: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store e and its statistics for FC2_C channels."""
    blocks: tl.constexpr = (C + FC2_C - 1) // FC2_C
    c = task * FC2_C + tl.arange(0, FC2_C)
    n = tl.arange(0, ROWS)
    valid = n < images

    acc = tl.zeros((ROWS, FC2_C), tl.float32)
    for start in range(0, J, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        hidden_mask = valid[:, None] & (j < J)[None, :]
        weight_mask = (j < J)[:, None] & (c < C)[None, :]
        h = tl.load(hidden_ptr + n[:, None] * J + j[None, :], hidden_mask, other=0.0, cache_modifier=".cg")
        w = tl.load(fc2_weight_ptr + c[None, :] * J + j[:, None], weight_mask, other=0.0)
        acc = tl.dot(h, w.to(tl.float32), acc, input_precision=PRECISION)

    e = acc + tl.load(fc2_bias_ptr + c, c < C, other=0.0).to(tl.float32)[None, :]
    e = tl.where((c < C)[None, :], e, -float("inf"))
    peak = tl.max(e, axis=1)
    shift = tl.where(peak == -float("inf"), 0.0, peak)  # a block of -inf weighs nothing
    exponentials = tl.sum(tl.exp(e - shift[:, None]), axis=1)
    tl.store(logits_ptr + n[:, None] * C + c[None, :], e, valid[:, None] & (c < C)[None, :])
    tl.store(statistics_ptr + (n * blocks + task) * 2, peak, valid)
    tl.store(statistics_ptr + (n * blocks + task) * 2 + 1, exponentials, valid)


@triton.jit
def softmax_scale(statistics_ptr, C: tl.constexpr):
    """(m, 1 / sum exp(e - m)) of one image, from its blocks' statistics."""
    blocks: tl.constexpr = (C + FC2_C - 1) // FC2_C
    block = tl.arange(0, triton.next_power_of_2(blocks))
    row_ptr = statistics_ptr + block * 2
    peaks = tl.load(row_ptr, block < blocks, other=-float("inf"), cache_modifier=".cg")
    sums = tl.load(row_ptr + 1, block < blocks, other=0.0, cache_modifier=".cg")
    peak = tl.max(peaks, axis=0)
    return peak, 1.0 / tl.sum(sums * tl.exp(peaks - peak), axis=0)
