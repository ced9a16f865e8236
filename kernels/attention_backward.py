"""What the backward and Grad-CAM need of A, in one persistent launch, by the tickets of `schedule`:

    map     dT = scale sum_c v_c A_c;  dU = norm'(dT)  A from memory
    sums    ds = sum_l dU_l A_l                        A from the L2 cache

for R = 1 gradient v, or for R = 2 at once: that of the class scores (beta) and that of the loss.
Reads A twice, whatever R, of which only the first needs memory.  Writes small tensors.
"""

import triton
import triton.language as tl

from .channel_sum import store_channel_sums
from .schedule import condition, draw, finish, finish_and_count, wait
from .spatial_norm import normalise_grad
from .spatial_sum import store_spatial_sums


@triton.jit
def _map_task(
    image_ptr,
    weights_ptr, weights_1_ptr,  # (C,)
    extra_ptr, attention_ptr, total_ptr,  # (L,), (L,), ()
    partials_ptr,  # (R, P, L)
    grad_map_ptr, grad_map_1_ptr,  # (L,): dU
    done_ptr,  # (): parts of this map
    part,
    scale,
    C: tl.constexpr, L: tl.constexpr, STRIDE_C: tl.constexpr, STRIDE_L: tl.constexpr,
    R: tl.constexpr, NORM: tl.constexpr, HAS_EXTRA: tl.constexpr, TASK_C: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_MAP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One part of an image's dT; whoever stores the last part stores dU and counts once more."""
    parts: tl.constexpr = (C + TASK_C - 1) // TASK_C
    partials_1_ptr = partials_ptr + parts * L
    for start in tl.range(0, L, BLOCK_L, num_stages=STAGES):
        store_channel_sums(
            image_ptr, weights_ptr, weights_1_ptr, partials_ptr + part * L, partials_1_ptr + part * L,
            part * TASK_C, start + tl.arange(0, BLOCK_L), C, L, STRIDE_C, STRIDE_L, R, TASK_C, BLOCK_C,
            BLOCK_L, STAGES,
        )  # fmt: skip
    done = finish_and_count(done_ptr) + 1
    if done >= parts:  # not ==, which would make `done` a constant: see `spatial_norm`
        for r in range(R):
            normalise_grad(
                partials_ptr + r * parts * L, extra_ptr, attention_ptr, total_ptr,
                grad_map_ptr if r == 0 else grad_map_1_ptr, scale, done, L, NORM, HAS_EXTRA, BLOCK_MAP,
            )  # fmt: skip
        finish(done_ptr)


@triton.jit(do_not_specialize=["batch", "group_size"])
def attention_backward_kernel(
    features_ptr,  # (N, C, L), any dtype
    weights_ptr, weights_1_ptr,  # (N, C) float32: v; what ends in _1 only with R = 2
    extra_ptr,  # (N, L) float32: the part of dT that does not come from A; only with HAS_EXTRA
    attention_ptr,  # (N, L) float32: T
    total_ptr,  # (N,) float32: sum(U)
    partials_ptr,  # (N, R, P, L) float32, P = ceil(C / TASK_C)
    grad_map_ptr, grad_map_1_ptr,  # (N, L) float32: dU
    sums_ptr, sums_1_ptr,  # (N, C) float32: ds
    counters_ptr,  # (1 + N,) int32 zeros: the ticket; map by image
    batch,
    group_size,
    stride_n,
    scale,
    C: tl.constexpr,
    L: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE_L: tl.constexpr,
    R: tl.constexpr,
    NORM: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    TASK_C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_MAP: tl.constexpr,
    STAGES: tl.constexpr,
    LAG: tl.constexpr,
):  # fmt: skip
    """This program draws tasks until none is left; a task is TASK_C channels of one image."""
    tl.static_assert(LAG >= 0, "the sums wait for the map")
    parts: tl.constexpr = (C + TASK_C - 1) // TASK_C
    maps = group_size * parts  # a round's phases: map | sums
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
                    image_ptr, weights_ptr + n * C, weights_1_ptr + n * C, extra_ptr + n * L,
                    attention_ptr + n * L, total_ptr + n, partials_ptr + n * R * parts * L,
                    grad_map_ptr + n * L, grad_map_1_ptr + n * L, counters_ptr + 1 + n, part, scale, C, L,
                    STRIDE_C, STRIDE_L, R, NORM, HAS_EXTRA, TASK_C, BLOCK_C, BLOCK_L, BLOCK_MAP, STAGES,
                )  # fmt: skip
            else:
                wait(counters_ptr + 1 + n, parts + 1)
                store_spatial_sums(
                    image_ptr, grad_map_ptr + n * L, grad_map_1_ptr + n * L, sums_ptr + n * C,
                    sums_1_ptr + n * C, part * TASK_C, 1.0, C, L, STRIDE_C, STRIDE_L, R, TASK_C, BLOCK_C,
                    BLOCK_L, STAGES,
                )  # fmt: skip
        ticket = draw(counters_ptr)
