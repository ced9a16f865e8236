"""F_cr inside a kernel: e = FC2(relu(FC1(g))) for a group of images, cut into tasks.

    parts[n, p, j] = sum over part p of c of g_nc W1_jc
    hidden[n, j]   = relu(b1_j + sum_p parts[n, p, j])
    e[n, c]        = b2_c + sum_j hidden[n, j] W2_cj
    S[n, c]        = exp(e - m) / sum exp(e - m)        from each block's maximum and sum of exponentials

A task keeps a tile of weights in registers and goes through the images: weights are read once a group, and
before what they wait for.  No tensor cores: a group has few images, and these sums are float32 throughout.
Pointers are to the group's first image.
"""

import triton
import triton.language as tl

from .schedule import finish, wait


@triton.jit
def _load_weights(weight_ptr, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    mask = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    return tl.load(weight_ptr + row[:, None] * COLUMNS + column[None, :], mask, other=0.0).to(tl.float32)


@triton.jit
def _load_mean(mean_ptr, n, c, C: tl.constexpr):
    return tl.load(mean_ptr + n * C + c, c < C, other=0.0, cache_modifier=".cg")


@triton.jit
def fc1_task(
    mean_ptr,  # (images, C) float32: g
    weight_ptr,  # (J, C)
    parts_ptr,  # (images, P, J) float32
    task,
    images,
    means_ptr, means,  # the counter of the group's means, and how many they are
    done_ptr,
    C: tl.constexpr,
    J: tl.constexpr,
    FC1_C: tl.constexpr,
    FC1_J: tl.constexpr,
):  # fmt: skip
    """Store one part of FC1's sum for FC1_J hidden units of every image."""
    P: tl.constexpr = (C + FC1_C - 1) // FC1_C
    part = task % P
    c = part * FC1_C + tl.arange(0, FC1_C)
    j = task // P * FC1_J + tl.arange(0, FC1_J)
    w = _load_weights(weight_ptr, j, c, J, C)
    wait(means_ptr, means)
    g = _load_mean(mean_ptr, 0, c, C)
    n = 0
    while n < images:
        following = _load_mean(mean_ptr, tl.minimum(n + 1, images - 1), c, C)
        tl.store(parts_ptr + (n * P + part) * J + j, tl.sum(w * g[None, :], axis=1), j < J)
        g = following
        n += 1
    finish(done_ptr)


@triton.jit
def _load_hidden(parts_ptr, bias, n, j, P: tl.constexpr, J: tl.constexpr):
    """The hidden units of image n, from FC1's parts."""
    p = tl.arange(0, triton.next_power_of_2(P))
    mask = (p < P)[:, None] & (j < J)[None, :]
    offsets = n * P * J + p[:, None] * J + j[None, :]
    parts = tl.load(parts_ptr + offsets, mask, other=0.0, cache_modifier=".cg")
    return tl.maximum(tl.sum(parts, axis=0) + bias, 0.0, propagate_nan=tl.PropagateNan.ALL)  # as torch.relu


@triton.jit
def fc2_task(
    parts_ptr,  # (images, P, J) float32
    bias1_ptr,  # (J,)
    weight_ptr,  # (C, J)
    bias2_ptr,  # (C,)
    hidden_ptr,  # (images, J) float32
    logits_ptr,  # (images, C) float32: e
    statistics_ptr,  # (images, B, 2) float32: maximum and sum of exponentials of each block
    task,
    images,
    parts_done_ptr, parts_done,  # the counter of FC1's tasks, and how many they are
    done_ptr,
    C: tl.constexpr,
    J: tl.constexpr,
    FC1_C: tl.constexpr,
    FC2_C: tl.constexpr,
):  # fmt: skip
    """Store e and its statistics for FC2_C channels of every image; the first task, the hidden layer too."""
    P: tl.constexpr = (C + FC1_C - 1) // FC1_C
    blocks: tl.constexpr = (C + FC2_C - 1) // FC2_C
    c = task * FC2_C + tl.arange(0, FC2_C)
    j = tl.arange(0, triton.next_power_of_2(J))
    w = _load_weights(weight_ptr, c, j, C, J)
    bias1 = tl.load(bias1_ptr + j, j < J, other=0.0).to(tl.float32)
    bias2 = tl.load(bias2_ptr + c, c < C, other=0.0).to(tl.float32)
    wait(parts_done_ptr, parts_done)
    h = _load_hidden(parts_ptr, bias1, 0, j, P, J)
    n = 0
    while n < images:
        following = _load_hidden(parts_ptr, bias1, tl.minimum(n + 1, images - 1), j, P, J)
        if task == 0:
            tl.store(hidden_ptr + n * J + j, h, j < J)
        e = tl.where(c < C, tl.sum(w * h[None, :], axis=1) + bias2, -float("inf"))
        peak = tl.max(e, axis=0)
        shift = tl.where(peak == -float("inf"), 0.0, peak)  # a block of -inf weighs nothing
        tl.store(logits_ptr + n * C + c, e, c < C)
        tl.store(statistics_ptr + (n * blocks + task) * 2, peak)
        tl.store(statistics_ptr + (n * blocks + task) * 2 + 1, tl.sum(tl.exp(e - shift), axis=0))
        h = following
        n += 1
    finish(done_ptr)


@triton.jit
def softmax_scale(statistics_ptr, C: tl.constexpr, FC2_C: tl.constexpr):
    """(m, 1 / sum exp(e - m)) of one image, from its blocks' statistics."""
    blocks: tl.constexpr = (C + FC2_C - 1) // FC2_C
    block = tl.arange(0, triton.next_power_of_2(blocks))
    row_ptr = statistics_ptr + block * 2
    peaks = tl.load(row_ptr, block < blocks, other=-float("inf"), cache_modifier=".cg")
    sums = tl.load(row_ptr + 1, block < blocks, other=0.0, cache_modifier=".cg")
    peak = tl.max(peaks, axis=0)
    return peak, 1.0 / tl.sum(sums * tl.exp(peaks - peak), axis=0)
