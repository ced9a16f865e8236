"""The whole forward in one persistent launch, by the tickets of `schedule`:

    mean       g = 1/L sum_l A                                 A from memory
    FC1, FC2   e = FC2(relu(FC1(g)))                           these three with HAS_MLP; else s is given
    map        U = sum_c softmax(e)_c A_c;  T = norm(U)        A from the L2 cache
    pool       1/L sum_l T A | maximum of T A | D = T A        A from the L2 cache

Reads A three times (twice without the MLP, `plan.MLP_INSIDE`), of which only the first needs memory where the
groups in flight fit the L2 cache (`plan.GROUP_BYTES`).  Writes small tensors, and D in the dense case.
"""

import triton
import triton.language as tl

from .channel_mlp import fc1_task, fc2_task, softmax_scale
from .channel_sum import store_channel_sums
from .features_grad import AVERAGE, MAXIMUM
from .hadamard import store_attended
from .max_pool import store_maxima
from .schedule import condition, draw, finish, finish_and_count, wait
from .spatial_norm import normalise
from .spatial_sum import store_spatial_sums


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
    NORM: tl.constexpr, HAS_MLP: tl.constexpr, FC2_C: tl.constexpr, TASK_C: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_MAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One part of an image's U; whoever stores the last part stores T and counts once more."""
    parts: tl.constexpr = (C + TASK_C - 1) // TASK_C
    peak, scale = 0.0, 1.0
    if HAS_MLP:
        peak, scale = softmax_scale(statistics_ptr, C, FC2_C)
    partial_ptr = partials_ptr + part * L
    for start in tl.range(0, L, BLOCK_L, num_stages=STAGES):
        store_channel_sums(
            image_ptr, channel_ptr, peak, scale, partial_ptr, partial_ptr, part * TASK_C,
            start + tl.arange(0, BLOCK_L), C, L, STRIDE_C, STRIDE_L, 1, HAS_MLP, TASK_C, BLOCK_C, BLOCK_L,
            STAGES,
        )  # fmt: skip
    if finish_and_count(done_ptr) == parts - 1:
        normalise(partials_ptr, attention_ptr, total_ptr, parts, L, NORM, BLOCK_MAP)
        finish(done_ptr)


@triton.jit
def _pool_task(
    image_ptr,
    attention_ptr,  # (L,): T
    out_ptr,  # (C,), or (C, L) in the dense case
    index_ptr,  # (C,); only when POOL is MAXIMUM
    first,  # channel
    C: tl.constexpr, L: tl.constexpr, STRIDE_C: tl.constexpr, STRIDE_L: tl.constexpr,
    OUT_STRIDE_C: tl.constexpr, OUT_STRIDE_L: tl.constexpr, POOL: tl.constexpr, TASK_C: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The attended mean, the attended maximum, or D, of TASK_C channels of one image."""
    if POOL == AVERAGE:
        store_spatial_sums(
            image_ptr, attention_ptr, out_ptr, first, 1.0 / L,
            C, L, STRIDE_C, STRIDE_L, 1, TASK_C, BLOCK_C, BLOCK_L, STAGES,
        )  # fmt: skip
    elif POOL == MAXIMUM:
        store_maxima(
            image_ptr, attention_ptr, out_ptr, index_ptr, first,
            C, L, STRIDE_C, STRIDE_L, True, TASK_C, BLOCK_C, BLOCK_L, STAGES,
        )  # fmt: skip
    else:
        for start in tl.range(0, TASK_C, BLOCK_C, num_stages=STAGES):
            c = first + start + tl.arange(0, BLOCK_C)
            for at in tl.range(0, L, BLOCK_L, num_stages=STAGES):
                store_attended(
                    image_ptr, attention_ptr, out_ptr, c, at + tl.arange(0, BLOCK_L),
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
    hidden_parts_ptr,  # (N, ceil(C / FC1_C), J) float32
    statistics_ptr,  # (N, ceil(C / FC2_C), 2) float32
    partials_ptr,  # (N, P, L) float32, P = ceil(C / TASK_C)
    attention_ptr,  # (N, L) float32: T
    total_ptr,  # (N,) float32: sum(U)
    out_ptr,  # (N, C) float32: pooled, or A at the maxima; D (N, C, L) in the dense case
    index_ptr,  # (N, C) int64: the argmax; only when POOL is MAXIMUM
    counters_ptr,  # (1 + 3 * groups + N,) int32 zeros: the ticket; by group; map by image
    batch, group_size, stride_n, out_stride_n,
    C: tl.constexpr, L: tl.constexpr, J: tl.constexpr,
    STRIDE_C: tl.constexpr, STRIDE_L: tl.constexpr,
    OUT_STRIDE_C: tl.constexpr, OUT_STRIDE_L: tl.constexpr,
    NORM: tl.constexpr, POOL: tl.constexpr,
    HAS_MLP: tl.constexpr, FC1_C: tl.constexpr, FC1_J: tl.constexpr, FC2_C: tl.constexpr,
    FC1_LAG: tl.constexpr, FC2_LAG: tl.constexpr, MAP_LAG: tl.constexpr, POOL_LAG: tl.constexpr,
    TASK_C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_MAP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """This program draws tasks until none is left; a pass over A is cut into TASK_C channels of one image."""
    parts: tl.constexpr = (C + TASK_C - 1) // TASK_C
    HIDDEN_PARTS: tl.constexpr = (C + FC1_C - 1) // FC1_C
    FC1: tl.constexpr = HAS_MLP * HIDDEN_PARTS * ((J + FC1_J - 1) // FC1_J)
    FC2: tl.constexpr = HAS_MLP * ((C + FC2_C - 1) // FC2_C)
    # A round's phases, FC1 | mean | FC2 | map | pool: where they begin.  What a phase waits for is in an
    # earlier round, or earlier in its own.
    tl.static_assert(FC1_LAG >= HAS_MLP, "FC1 waits for the mean")
    tl.static_assert(FC2_LAG >= FC1_LAG, "FC2 waits for FC1")
    tl.static_assert(MAP_LAG >= FC2_LAG, "the map waits for FC2")
    tl.static_assert(POOL_LAG >= MAP_LAG, "the pool waits for the map")
    fc2_at = FC1 + HAS_MLP * group_size * parts
    maps_at = fc2_at + FC2
    pool_at = maps_at + group_size * parts
    round_size = pool_at + group_size * parts
    groups = (batch + group_size - 1) // group_size

    ticket = draw(counters_ptr)
    while condition(ticket < (groups + POOL_LAG) * round_size, disable_licm=True):
        task = ticket % round_size
        group = ticket // round_size
        index = task - FC1
        if task >= pool_at:
            group -= POOL_LAG
            index = task - pool_at
        elif task >= maps_at:
            group -= MAP_LAG
            index = task - maps_at
        elif task >= fc2_at:
            group -= FC2_LAG
        elif task < FC1:
            group -= FC1_LAG
        n = (group * group_size + index // parts).to(tl.int64)
        part = index % parts
        image_ptr = features_ptr + n * stride_n
        done_ptr = counters_ptr + 1 + 3 * group
        maps_done_ptr = counters_ptr + 1 + 3 * groups + n
        if (group >= 0) & (group < groups):
            if HAS_MLP:
                images = tl.minimum(batch - group * group_size, group_size)
                first = (group * group_size).to(tl.int64)
                if task < FC1:
                    fc1_task(
                        mean_ptr + first * C, fc1_weight_ptr, hidden_parts_ptr + first * HIDDEN_PARTS * J,
                        task, images, done_ptr, images * parts, done_ptr + 1, C, J, FC1_C, FC1_J,
                    )  # fmt: skip
                elif (task >= fc2_at) & (task < maps_at):
                    fc2_task(
                        hidden_parts_ptr + first * HIDDEN_PARTS * J, fc1_bias_ptr, fc2_weight_ptr,
                        fc2_bias_ptr, hidden_ptr + first * J, channel_ptr + first * C,
                        statistics_ptr + first * FC2 * 2, task - fc2_at, images, done_ptr + 1, FC1,
                        done_ptr + 2, C, J, FC1_C, FC2_C,
                    )  # fmt: skip
                elif (task < fc2_at) & (n < batch):
                    store_spatial_sums(
                        image_ptr, mean_ptr, mean_ptr + n * C, part * TASK_C, 1.0 / L,
                        C, L, STRIDE_C, STRIDE_L, 0, TASK_C, BLOCK_C, BLOCK_L, STAGES,
                    )  # fmt: skip
                    finish(done_ptr)
                elif (task >= maps_at) & (task < pool_at) & (n < batch):
                    wait(done_ptr + 2, FC2)
            if (task >= maps_at) & (task < pool_at) & (n < batch):
                _map_task(
                    image_ptr, channel_ptr + n * C, statistics_ptr + n * FC2 * 2,
                    partials_ptr + n * parts * L, attention_ptr + n * L, total_ptr + n, maps_done_ptr,
                    part, C, L, STRIDE_C, STRIDE_L, NORM, HAS_MLP, FC2_C, TASK_C, BLOCK_C, BLOCK_L, BLOCK_MAP,
                    STAGES,
                )  # fmt: skip
            elif (task >= pool_at) & (n < batch):
                wait(maps_done_ptr, parts + 1)
                _pool_task(
                    image_ptr, attention_ptr + n * L, out_ptr + n * out_stride_n, index_ptr + n * C,
                    part * TASK_C, C, L, STRIDE_C, STRIDE_L, OUT_STRIDE_C, OUT_STRIDE_L, POOL, TASK_C,
                    BLOCK_C, BLOCK_L, STAGES,
                )  # fmt: skip
        ticket = draw(counters_ptr)
