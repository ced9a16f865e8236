"""Launch plans: pure integer functions of shape and layout, one table each."""

from typing import NamedTuple

POSITIONS_FIRST = "positions"  # NCHW memory: neighbouring positions are adjacent
CHANNELS_FIRST = "channels"  # channels-last memory, NHWC, tokens: neighbouring channels are adjacent


class Tile(NamedTuple):
    """A BLOCK_C x BLOCK_L block of one image's feature map and the warps that share it."""

    block_c: int
    block_l: int
    num_warps: int


# (largest L, positions in a tile).  The tile always holds 2,048 elements, 16 a thread: four 8-byte
# loads in flight a thread for two-byte types, and few enough registers for several resident programs.
_POSITIONS_TILE = ((16, 16), (32, 32), (64, 64), (128, 128), (None, 256))
# (largest C, channels in a tile), for channels-last memory.
_CHANNELS_TILE = ((16, 16), (32, 32), (64, 64), (128, 128), (None, 256))
_TILE_ELEMENTS = 2048

# (largest L, (positions in a sweep's block at most, warps)).  A program holds a whole image's block: 8
# values a thread of 32-thread warps, and at most the 1,024 threads that a program may have with AMD's 64.
_NORM_BLOCK = ((1024, (1024, 4)), (None, (4096, 16)))

MEANS_TILE = Tile(64, 32, 8)
"""grad_cam_means reads two maps and keeps two accumulators: with 4 warps a register spills on sm_100.
Its partial sums of dT, one for 64 channels, are 1/64 of a map in float32."""

SCATTER_TILE = Tile(128, 16, 4)
"""position_scatter compares every channel with every position: narrow in L, so that one image is spread
over several programs and none of them walks through the channels in many steps."""

CHANNELS_PER_PARTIAL = 256
"""channel_sum splits C into partial sums of this many channels, so that few images still fill a GPU.
A multiple of every block_c: no block straddles two parts."""


FORWARD_LAGS = (1, 1, 2, 3)
"""Rounds (`kernels/schedule.py`) after the mean of a group that its FC1, FC2, map and pool come: at least 1,
none less than the one before it.  With more, less is waited for, and more of A is read before a group is read
again."""

REREAD_LAG = 2
"""The same where only two phases read A: the sums after the map in the backward, the pool after the map where
s is given."""

GROUP_BYTES = 4 << 20
"""A fused kernel takes as many images as a group as fit this many bytes of A.  From the first read of an
image to the last, the forward reads seven groups at most (one and twice the lag), 28 MiB: about half of an
H100's 50 MiB of L2 cache, the other half of which may hold copies."""

MLP_TILE = 4096
"""Weights of a task of the channel MLP, which stay in registers: 32 for each of 128 threads."""

LARGEST_HIDDEN = 512
"""Hidden units at most: of FC2, a task takes whole rows of weights."""

LARGEST_GROUP = 16
"""Images of a group at most: a task of the channel MLP goes through them one after another."""

TILE_ELEMENTS = 4096
"""Of a fused kernel's tile of A at most: 32 float32 accumulators for each of 128 threads.  Half of it where
two are kept: of a pair of gradients; of a maximum and its place."""

TILE_BYTES = 8192
"""Of a fused kernel's tile of A at most: four 16-byte loads for each of 128 threads."""

TASK_BYTES = 65536
"""A task's tiles of A, with their padding: 50 KB of a 14 x 14 map.  One phase of 32 images of 2,048 channels
still has more tasks than programs run at a time on an H100 (512 and 396)."""

COPY_BYTES = 32768
"""Tiles on their way to shared memory at a time: with three programs 96 KB a multiprocessor.  Its share of an
H100's 3.35 TB/s, 25 bytes/ns, asks for 18 KB if memory takes 700 ns (assumed, not measured); more, because a
program also draws, waits, adds up and counts.  Two-byte values in rows of odd length are not copied so: no
copy is that narrow."""

TASK_CHANNELS = (32, 128)
"""Channels of a task at least, as each task stores one partial sum, in float32, for every position; and at
most, so that few images of small maps still fill a GPU."""

LINE_BYTES = 128
"""Neighbouring channels that a task reads of channels-last memory: a whole cache line at all positions."""

LONG_BLOCK = 512
"""Positions of a tile of a map that has more than MAP_BLOCK: their weights are copied beside it.  With 256,
513 x 1025 in float32 spills (Triton 3.6)."""

OCCUPANCY = ((9, (3, 168)), (None, (2, 255)))
"""(largest major compute capability, (programs of 128 threads on each multiprocessor, the registers that this
leaves a thread)).  The latter is said to the compiler, which may take more if left alone, or spill to make
room for more programs than there are.  With fewer it spills in some shapes: at 128 on sm_90 (1280 x 7 x 7),
at 168 on sm_100 (2048 x 14 x 14, channels-last, two gradients).  `tests/test_codegen.py` checks small shapes
for spills, `python -m bench.codegen` prints them at real ones.  Should fewer programs fit, the others start
when the first have ended, find no ticket and end."""

ROOMY = (2, 255)
"""The same for maximum and dense pooling, which spill at 168 in some shapes (maximum, 512 x 56 x 56)."""

MAP_BLOCK = 1024
"""Positions that a fused kernel normalises at a time."""


class Schedule(NamedTuple):
    """How a fused kernel cuts up its passes over A."""

    group: int  # images whose phases follow one another
    task_c: int  # channels of a task, a multiple of tile.block_c
    tile: Tile
    stages: int  # tiles under way, and the one that is added up
    block_map: int


class MlpTasks(NamedTuple):
    """How the fused forward cuts up the channel MLP."""

    fc1_c: int  # channels of one part of FC1's sum
    fc1_j: int  # hidden units of a task of FC1
    fc2_c: int  # channels of a task of FC2, and of one block of the softmax's statistics


def _row(table: tuple, size: int):
    return next(value for limit, value in table if limit is None or size <= limit)


def _power_of_2(size: int) -> int:
    """The smallest that is not below `size`."""
    return 1 << (size - 1).bit_length()


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)


def tile(channels: int, positions: int, layout: str) -> Tile:
    """The tile for one pass over a (C, L) map: long in the contiguous direction."""
    if layout == POSITIONS_FIRST:
        block_l = _row(_POSITIONS_TILE, positions)
        return Tile(_TILE_ELEMENTS // block_l, block_l, 4)
    block_c = _row(_CHANNELS_TILE, channels)
    return Tile(block_c, _TILE_ELEMENTS // block_c, 4)


def num_partials(channels: int) -> int:
    """How many partial sums channel_sum stores for each position; depends on C alone, so that an
    image's result does not depend on the batch it is in."""
    return blocks(channels, CHANNELS_PER_PARTIAL)


def norm_block(positions: int) -> tuple[int, int]:
    """(BLOCK_L, warps) of a program that normalises one image over its L positions."""
    largest, num_warps = _row(_NORM_BLOCK, positions)
    return min(_power_of_2(positions), largest), num_warps


def schedule(
    channels: int, positions: int, itemsize: int, layout: str, accumulators: int = 1
) -> Schedule | None:
    """The fused kernels' schedule, or None where pass by pass is better: an image as large as a group would
    have left the cache when it is read again.  Depends on one image alone, as its result does."""
    image_bytes = channels * positions * itemsize
    if image_bytes > GROUP_BYTES:
        return None
    elements = min(TILE_ELEMENTS // accumulators, TILE_BYTES // itemsize)
    if layout == POSITIONS_FIRST:
        block_l = max(_power_of_2(positions), 16) if positions <= MAP_BLOCK else LONG_BLOCK
        block_c = elements // block_l
        least, most = TASK_CHANNELS
        task_c = max(block_c, least, min(TASK_BYTES // (itemsize * block_l), most))
    else:
        task_c = block_c = max(min(_power_of_2(channels), LINE_BYTES // itemsize), 16)
        block_l = elements // block_c
    return Schedule(
        group=min(GROUP_BYTES // image_bytes, LARGEST_GROUP),
        task_c=task_c,
        tile=Tile(block_c, block_l, 4),
        stages=1 + COPY_BYTES // (elements * itemsize),
        block_map=min(_power_of_2(positions), MAP_BLOCK),
    )


def occupancy(capability: int, roomy: bool) -> tuple[int, int]:
    """(programs on each multiprocessor, registers a thread) of a persistent kernel."""
    return ROOMY if roomy else _row(OCCUPANCY, capability)


def forward_lags(has_mlp: bool) -> dict[str, int]:
    """The forward's constants of that name."""
    lags = FORWARD_LAGS if has_mlp else (0, 0, 0, REREAD_LAG)
    return dict(zip(("FC1_LAG", "FC2_LAG", "MAP_LAG", "POOL_LAG"), lags, strict=True))


def mlp_tasks(channels: int, hidden: int) -> MlpTasks:
    """At most a quarter of (many) channels for FC1, whole rows for FC2; at most MLP_TILE weights a task."""
    fc1_c = min(max(_power_of_2(channels // 4 + 1) // 2, 16), MLP_TILE // 8)
    return MlpTasks(fc1_c, 8, min(MLP_TILE // _power_of_2(hidden), 32))


def mlp_inside(
    channels: int, hidden: int, weight_itemsize: int, positions: int, itemsize: int, group: int
) -> bool:
    """Whether the fused forward computes the channel MLP itself.  Its weights are read once a group, from the
    cache; where that is more than the group's own share of A, one matrix product for the batch is better."""
    if hidden > LARGEST_HIDDEN:
        return False
    return 2 * channels * hidden * weight_itemsize <= group * channels * positions * itemsize
