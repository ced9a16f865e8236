"""What the forward needs of A once the channel weights s are known, in one persistent launch, by the tickets
of `schedule`:

    map     U = sum_c s_c A_c;  T = norm(U)            A from memory
    pool    1/L sum_l T A | maximum of T A | D = T A   A from the L2 cache

Reads A twice, of which only the first needs memory where the groups in flight fit the L2 cache
(`plan.GROUP_BYTES`).  Writes small tensors, and D in the dense case.
"""

import triton
import triton.language as tl

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
    channel_ptr,  # (C,): s
    partials_ptr,  # (P, L)
    attention_ptr,  # (L,): T
    total_ptr,  # ()
    done_ptr,  # (): parts of this map
    part,
    C: tl.constexpr, L: tl.constexpr, STRIDE_C: tl.constexpr, STRIDE_L: tl.constexpr,
    NORM: tl.constexpr, TASK_C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_MAP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One part of an image's U; whoever stores the last part stores T and counts once more."""
    parts: tl.constexpr = (C + TASK_C - 1) // TASK_C
    partial_ptr = partials_ptr + part * L
    for start in tl.range(0, L, BLOCK_L, num_stages=STAGES):
        store_channel_sums(
            image_ptr, channel_ptr, channel_ptr, partial_ptr, partial_ptr, part * TASK_C,
            start + tl.arange(0, BLOCK_L), C, L, STRIDE_C, STRIDE_L, 1, TASK_C, BLOCK_C, BLOCK_L, STAGES,
        )  # fmt: skip
    done = finish_and_count(done_ptr) + 1
    if done >= parts:  # not ==, which would make `done` a constant: see `spatial_norm`
        normalise(partials_ptr, attention_ptr, total_ptr, done, L, NORM, BLOCK_MAP)
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
            image_ptr, attention_ptr, attention_ptr, out_ptr, out_ptr, first, 1.0 / L,
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
    channel_ptr,  # (N, C) float32: s
    partials_ptr,  # (N, P, L) float32, P = ceil(C / TASK_C)
    attention_ptr,  # (N, L) float32: T
    total_ptr,  # (N,) float32: sum(U)
    out_ptr,  # (N, C) float32: pooled, or A at the maxima; D (N, C, L) in the dense case
    index_ptr,  # (N, C) int64: the argmax; only when POOL is MAXIMUM
    counters_ptr,  # (1 + N,) int32 zeros: the ticket; map by image
    batch,
    group_size,
    stride_n,
    out_stride_n,
    C: tl.constexpr,
    L: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE_L: tl.constexpr,
    OUT_STRIDE_C: tl.constexpr,
    OUT_STRIDE_L: tl.constexpr,
    NORM: tl.constexpr,
    POOL: tl.constexpr,
    TASK_C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_MAP: tl.constexpr,
    STAGES: tl.constexpr,
    LAG: tl.constexpr,
):
    """This program draws tasks until none is left; a task is TASK_C channels of one image."""
    tl.static_assert(LAG >= 0, "the pool waits for the map")
    parts: tl.constexpr = (C + TASK_C - 1) // TASK_C
    maps = group_size * parts  # a round's phases: map | pool
    groups = (batch + group_size - 1) // group_size

    ticket = draw(counters_ptr)
    while condition(ticket < (groups + LAG) * 2 * maps, disable_licm=True):
        phase = ticket % (2 * maps) // maps
        group = ticket // (2 * maps) - phase * LAG
        n = (group * group_size + ticket % maps // parts).to(tl.int64)
        part = ticket % parts
        image_ptr = features_ptr + n * stride_n
        if (group >= 0) & (n < batch):
            if phase == 0:
                _map_task(
                    image_ptr, channel_ptr + n * C, partials_ptr + n * parts * L, attention_ptr + n * L,
                    total_ptr + n, counters_ptr + 1 + n, part, C, L, STRIDE_C, STRIDE_L, NORM, TASK_C,
                    BLOCK_C, BLOCK_L, BLOCK_MAP, STAGES,
                )  # fmt: skip
            else:
                wait(counters_ptr + 1 + n, parts + 1)
                _pool_task(
                    image_ptr, attention_ptr + n * L, out_ptr + n * out_stride_n, index_ptr + n * C,
                    part * TASK_C, C, L, STRIDE_C, STRIDE_L, OUT_STRIDE_C, OUT_STRIDE_L, POOL, TASK_C,
                    BLOCK_C, BLOCK_L, STAGES,
                )  # fmt: skip
        ticket = draw(counters_ptr)
