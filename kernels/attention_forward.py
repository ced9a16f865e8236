"""The whole forward in one persistent launch, by the tickets of `schedule`:

    mean       g = 1/L sum_l A                                 A from memory
    FC1, FC2   e = FC2(relu(FC1(g)))                           these three with HAS_MLP; else s is given
    map        U = sum_c softmax(e)_c A_c;  T = norm(U)        A from the L2 cache
    pool       1/L sum_l T A | maximum of T A | D = T A        A from the L2 cache

Reads A three times (twice without the MLP), of which only the first needs memory where the groups in
flight fit the L2 cache (`plan.GROUP_BYTES`).  Writes small tensors, and D in the dense case.
"""

import triton
import triton.language as tl

from .channel_mlp import FC1_C, FC1_J, FC2_C, channel_logits, hidden_block, hidden_part, softmax_scale
from .channel_sum import channel_sums
from .features_grad import AVERAGE, MAXIMUM
from .hadamard import store_attended
from .max_pool import store_maxima
from .schedule import draw, finish, wait
from .spatial_norm import normalise
from .spatial_sum import spatial_sums


@triton.jit
def _channel_task(
    image_ptr,
    mean_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr,  # as below
    hidden_parts_ptr, hidden_ptr, logits_ptr, statistics_ptr,
    done_ptr,  # (3 + HIDDEN,) of this group: mean, hidden, logits; parts of each hidden block
    task, group, group_size, n, part, batch,
    C: tl.constexpr, L: tl.constexpr, J: tl.constexpr, STRIDE_C: tl.constexpr, STRIDE_L: tl.constexpr,
    PRECISION: tl.constexpr, TASK_C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
    HIDDEN: tl.constexpr, FC1: tl.constexpr, FC2: tl.constexpr,
):  # fmt: skip
    """FC1 for task < FC1, where whoever stores the last part of a hidden block adds it up; then FC2 for as
    many as FC2; then g of some channels of image n < batch."""
    first = (group * group_size).to(tl.int64)
    images = tl.minimum(batch - group * group_size, group_size)
    if task < FC1:
        block = task % HIDDEN
        wait(done_ptr, images * ((C + TASK_C - 1) // TASK_C))
        hidden_part(
            mean_ptr + first * C, fc1_weight_ptr, hidden_parts_ptr + first * J, task // HIDDEN, block,
            images, batch, C, J, PRECISION,
        )  # fmt: skip
        if finish(done_ptr + 3 + block) == FC1 // HIDDEN - 1:
            hidden_block(
                hidden_parts_ptr + first * J, fc1_bias_ptr, hidden_ptr + first * J, block, images, batch,
                C, J,
            )  # fmt: skip
            finish(done_ptr + 1)
    elif task < FC1 + FC2:
        wait(done_ptr + 1, HIDDEN)
        channel_logits(
            hidden_ptr + first * J, fc2_weight_ptr, fc2_bias_ptr, logits_ptr + first * C,
            statistics_ptr + first * FC2 * 2, task - FC1, images, C, J, PRECISION,
        )  # fmt: skip
        finish(done_ptr + 2)
    elif n < batch:
        for start in range(0, TASK_C, BLOCK_C):
            c = part * TASK_C + start + tl.arange(0, BLOCK_C)
            g = spatial_sums(image_ptr, mean_ptr, c, C, L, STRIDE_C, STRIDE_L, False, BLOCK_C, BLOCK_L)
            tl.store(mean_ptr + n * C + c, g * (1.0 / L), mask=c < C)
        finish(done_ptr)


@triton.jit
def _map_task(
    image_ptr,
    channel_ptr,  # (C,): e with HAS_MLP, else s
    statistics_ptr,  # (B, 2); only with HAS_MLP
    partials_ptr,  # (P, L)
    attention_ptr,  # (L,): T
    total_ptr,  # ()
    done_ptr,  # (): parts of this map
    part,
    C: tl.constexpr, L: tl.constexpr, STRIDE_C: tl.constexpr, STRIDE_L: tl.constexpr,
    NORM: tl.constexpr, HAS_MLP: tl.constexpr, TASK_C: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_MAP: tl.constexpr,
):  # fmt: skip
    """One part of an image's U; whoever stores the last part stores T and counts once more."""
    parts: tl.constexpr = (C + TASK_C - 1) // TASK_C
    peak, scale = 0.0, 1.0
    if HAS_MLP:
        peak, scale = softmax_scale(statistics_ptr, C)
    for start in range(0, L, BLOCK_L):
        l = start + tl.arange(0, BLOCK_L)
        u = channel_sums(
            image_ptr, channel_ptr, peak, part * TASK_C, l,
            C, L, STRIDE_C, STRIDE_L, HAS_MLP, TASK_C, BLOCK_C, BLOCK_L,
        )  # fmt: skip
        tl.store(partials_ptr + part * L + l, u * scale, mask=l < L)
    if finish(done_ptr) == parts - 1:
        normalise(partials_ptr, attention_ptr, total_ptr, parts, L, NORM, BLOCK_MAP)
        finish(done_ptr)


@triton.jit
def _pool_task(
    image_ptr,
    attention_ptr,  # (L,): T
    out_ptr,  # (C,), or (C, L) in the dense case
    index_ptr,  # (C,); only when POOL is MAXIMUM
    part,
    C: tl.constexpr, L: tl.constexpr, STRIDE_C: tl.constexpr, STRIDE_L: tl.constexpr,
    OUT_STRIDE_C: tl.constexpr, OUT_STRIDE_L: tl.constexpr, POOL: tl.constexpr, TASK_C: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """The attended mean, the attended maximum, or D, of TASK_C channels of one image."""
    for start in range(0, TASK_C, BLOCK_C):
        c = part * TASK_C + start + tl.arange(0, BLOCK_C)
        if POOL == AVERAGE:
            z = spatial_sums(image_ptr, attention_ptr, c, C, L, STRIDE_C, STRIDE_L, True, BLOCK_C, BLOCK_L)
            tl.store(out_ptr + c, z * (1.0 / L), mask=c < C)
        elif POOL == MAXIMUM:
            store_maxima(
                image_ptr, attention_ptr, out_ptr, index_ptr, c,
                C, L, STRIDE_C, STRIDE_L, True, BLOCK_C, BLOCK_L,
            )  # fmt: skip
        else:
            for first in range(0, L, BLOCK_L):
                store_attended(
                    image_ptr, attention_ptr, out_ptr, c, first + tl.arange(0, BLOCK_L),
                    C, L, STRIDE_C, STRIDE_L, OUT_STRIDE_C, OUT_STRIDE_L, False,
                )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "group_size"])
def attention_forward_kernel(
    features_ptr,  # (N, C, L), any dtype
    fc1_weight_ptr, fc1_bias_ptr,  # (J, C), (J,), any dtype; these four only with HAS_MLP
    fc2_weight_ptr, fc2_bias_ptr,  # (C, J), (C,)
    channel_ptr,  # (N, C) float32: e, written, with HAS_MLP; else s, read
    mean_ptr,  # (N, C) float32: g
    hidden_ptr,  # (N, J) float32: relu(FC1(g))
    hidden_parts_ptr,  # (ceil(C / FC1_C), N, J) float32
    statistics_ptr,  # (N, ceil(C / FC2_C), 2) float32
    partials_ptr,  # (N, P, L) float32, P = ceil(C / TASK_C)
    attention_ptr,  # (N, L) float32: T
    total_ptr,  # (N,) float32: sum(U)
    out_ptr,  # (N, C) float32: pooled, or A at the maxima; D (N, C, L) in the dense case
    index_ptr,  # (N, C) int64: the argmax; only when POOL is MAXIMUM
    counters_ptr,  # (1 + groups * (3 + HIDDEN) + N,) int32 zeros: the ticket; by group; map by image
    batch, group_size, stride_n, out_stride_n,
    C: tl.constexpr, L: tl.constexpr, J: tl.constexpr,
    STRIDE_C: tl.constexpr, STRIDE_L: tl.constexpr,
    OUT_STRIDE_C: tl.constexpr, OUT_STRIDE_L: tl.constexpr,
    NORM: tl.constexpr, POOL: tl.constexpr, HAS_MLP: tl.constexpr, PRECISION: tl.constexpr,
    TASK_C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_MAP: tl.constexpr,
):  # fmt: skip
    """This program draws tasks until none is left; a pass over A is cut into TASK_C channels of one image."""
    parts: tl.constexpr = (C + TASK_C - 1) // TASK_C
    HIDDEN: tl.constexpr = HAS_MLP * ((J + FC1_J - 1) // FC1_J)  # blocks of the hidden layer
    FC1: tl.constexpr = HIDDEN * ((C + FC1_C - 1) // FC1_C)
    FC2: tl.constexpr = HAS_MLP * ((C + FC2_C - 1) // FC2_C)
    # A round's phases, FC1 | FC2 | mean | map | pool: where they begin, and which group's they are.
    maps_at = FC1 + FC2 + HAS_MLP * group_size * parts
    pool_at = maps_at + group_size * parts
    round_size = pool_at + group_size * parts
    MAPS_LAG: tl.constexpr = 2 * HAS_MLP
    groups = (batch + group_size - 1) // group_size

    ticket = draw(counters_ptr)
    while ticket < (groups + MAPS_LAG + 1) * round_size:
        task = ticket % round_size
        group = ticket // round_size
        index = task - FC1 - FC2
        if task >= pool_at:
            group -= MAPS_LAG + 1
            index = task - pool_at
        elif task >= maps_at:
            group -= MAPS_LAG
            index = task - maps_at
        elif task < FC1 + FC2:
            group -= 1
        n = (group * group_size + index // parts).to(tl.int64)
        part = index % parts
        image_ptr = features_ptr + n * stride_n
        group_done_ptr = counters_ptr + 1 + (3 + HIDDEN) * group
        maps_done_ptr = counters_ptr + 1 + (3 + HIDDEN) * groups + n
        if (group >= 0) & (group < groups):
            if HAS_MLP:
                if task < maps_at:
                    _channel_task(
                        image_ptr, mean_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr,
                        hidden_parts_ptr, hidden_ptr, channel_ptr, statistics_ptr,
                        group_done_ptr, task, group, group_size, n, part, batch, C, L, J,
                        STRIDE_C, STRIDE_L, PRECISION, TASK_C, BLOCK_C, BLOCK_L, HIDDEN, FC1, FC2,
                    )  # fmt: skip
                elif (task < pool_at) & (n < batch):
                    wait(group_done_ptr + 2, FC2)
            if (task >= maps_at) & (task < pool_at) & (n < batch):
                _map_task(
                    image_ptr, channel_ptr + n * C, statistics_ptr + n * FC2 * 2,
                    partials_ptr + n * parts * L, attention_ptr + n * L, total_ptr + n, maps_done_ptr,
                    part, C, L, STRIDE_C, STRIDE_L, NORM, HAS_MLP, TASK_C, BLOCK_C, BLOCK_L, BLOCK_MAP,
                )  # fmt: skip
            elif (task >= pool_at) & (n < batch):
                wait(maps_done_ptr, parts + 1)
                _pool_task(
                    image_ptr, attention_ptr + n * L, out_ptr + n * out_stride_n, index_ptr + n * C,
                    part, C, L, STRIDE_C, STRIDE_L, OUT_STRIDE_C, OUT_STRIDE_L, POOL, TASK_C,
                    BLOCK_C, BLOCK_L,
                )  # fmt: skip
        ticket = draw(counters_ptr)
