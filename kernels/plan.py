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


GROUP_BYTES = 4 << 20
"""A fused kernel takes as many images as a group as fit this many bytes of A.  From one read of an image to
the next, the forward reads six groups at most, 24 MiB: half of an H100's 50 MiB of L2 cache, the other half
of which may hold copies."""

LARGEST_GROUP = 16
"""The rows of the channel MLP's matrix products."""

TASK_CHANNELS = 64
"""Channels of one task at least: 25 KB of a 14 x 14 map in bfloat16, so that the tasks of 32 images of 2,048
channels are about twice the programs that run at a time, and drawing one is short against doing it."""

FUSED_TILE_BYTES = 8192
"""A fused kernel's tile of A, 64 bytes for each of 128 threads: with PROGRAMS_PER_SM programs, 32 KB in
flight on each multiprocessor.  Half of it where two accumulators are kept (a pair of gradients; a maximum
and its place), which otherwise spill or leave fewer programs."""

PROGRAMS_PER_SM = 4
"""Programs of 128 threads on each multiprocessor, which leaves them REGISTERS a thread.  Should fewer fit,
the others start when the first have ended, find no ticket and end."""

REGISTERS = 128
"""At most, said to the compiler: left alone, it takes more in some shapes, and in others (sm_100, sm_120)
spills to make room for more programs than there are.  `tests/test_codegen.py` checks small shapes for
spills, `python -m bench.codegen` prints them at real ones."""

MORE_REGISTERS = 168
"""For the backward, and for maximum and dense pooling, which would spill at 128: three programs on each
multiprocessor where they take them all."""

MAP_BLOCK = 1024
"""Positions that a fused kernel normalises at a time."""


class Schedule(NamedTuple):
    """How a fused kernel cuts up its passes over A."""

    group: int  # images whose phases follow one another
    task_c: int  # channels of a task, a multiple of tile.block_c
    tile: Tile
    block_map: int


def _row(table: tuple, size: int):
    return next(value for limit, value in table if limit is None or size <= limit)


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
    return min(1 << (positions - 1).bit_length(), largest), num_warps


def schedule(
    channels: int, positions: int, itemsize: int, layout: str, accumulators: int = 1
) -> Schedule | None:
    """The fused kernels' schedule, or None where pass by pass is better: an image as large as a group would
    have left the cache when it is read again.  Depends on one image alone, as its result does."""
    image_bytes = channels * positions * itemsize
    if image_bytes > GROUP_BYTES:
        return None
    elements = FUSED_TILE_BYTES // (itemsize * accumulators)
    if layout == POSITIONS_FIRST:
        block_l = _row(_POSITIONS_TILE, positions)
        block_c = elements // block_l
    else:
        block_c = min(_row(_CHANNELS_TILE, channels), 2 * TASK_CHANNELS)
        block_l = elements // block_c
    return Schedule(
        group=min(GROUP_BYTES // image_bytes, LARGEST_GROUP),
        task_c=max(block_c, TASK_CHANNELS),
        tile=Tile(block_c, block_l, 4),
        block_map=min(1 << (positions - 1).bit_length(), MAP_BLOCK),
    )


def mlp_inside(
    channels: int, hidden: int, weight_itemsize: int, positions: int, itemsize: int, group: int
) -> bool:
    """Whether the fused forward computes the channel MLP itself.  Its weights are read once a group, from the
    cache; where that is more than the group's own share of A, one matrix product for the batch is better."""
    return 2 * channels * hidden * weight_itemsize <= group * channels * positions * itemsize
