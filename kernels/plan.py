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


REREAD_LAG = 3
"""Rounds (`kernels/schedule.py`) after the map of a group that its second read comes, the pool in the forward
and the sums in the backward.  With more, less is waited for, and more of A is read before a group is read
again."""

GROUP_BYTES = 4 << 20
"""A fused kernel takes as many images as a group as fit this many bytes of A.  From the first read of an
image to the second, seven groups are read at most (one and twice the lag), 28 MiB: about half of an H100's
50 MiB of L2 cache, the other half of which may hold copies."""

LARGEST_GROUP = 16
"""Images of a group at most, so that small images are several groups and one's map goes on beside another's
pool."""

TASK_BYTES = 65536
"""A task's tiles of A, with their padding: 50 KB of a 14 x 14 map.  One phase of 32 images of 2,048 channels
has about as many tasks as programs of the forward run at a time on an H100 (512 and 528)."""

TASK_CHANNELS = (32, 128)
"""Channels of a task at least, as each task stores one partial sum, in float32, for every position; and at
most, so that few images of small maps still fill a GPU."""

LINE_BYTES = 128
"""Neighbouring channels that a task reads of channels-last memory: a whole cache line at all positions."""

LONG_BLOCK = 512
"""Positions of a tile of a map that has more than MAP_BLOCK: their weights are copied beside it.  With 256,
513 x 1025 in float32 spills (Triton 3.6)."""

MAP_BLOCK = 1024
"""Positions that a fused kernel normalises at a time."""


LARGEST_CHANNELS = 8192
"""Channels of an image at most that one program of `guidance` holds."""


class Resources(NamedTuple):
    """What a program of a persistent kernel has.

    Too many registers for `programs` of them on a multiprocessor, and some start when others have ended, find
    no ticket and end; too few, and the compiler spills: `tests/test_codegen.py` checks small shapes,
    `python -m bench.codegen` prints real ones."""

    warps: int
    tile_elements: int  # of a tile of A at most, over the accumulators kept for each
    tile_bytes: int  # at most
    copy_bytes: int  # tiles on their way to shared memory at a time
    occupancy: tuple  # (largest major compute capability, (programs a multiprocessor, registers a thread))


FORWARD = Resources(4, 4096, 8192, 16384, ((9, (4, 128)), (None, (2, 255))))
ROOMY = Resources(4, 4096, 8192, 32768, ((None, (2, 255)),))
"""The forward with maximum and dense pooling, and of rows that cannot be copied ahead, which spill with fewer
registers in some shapes (maximum, 512 x 56 x 56; 2048 x 7 x 7)."""
BACKWARD = Resources(1, 2048, 4096, 8192, ((None, (8, 255)),))
"""One warp, whose sums over positions need no other.  On an H100, 2048 x 14 x 14, bfloat16, two gradients,
N = 128 and 32: 97 and 36 us; with twelve programs of 168 registers 103 and 42, with two warps 119 and 43,
with four 129 and 41 (`bench/results/h100.md`; before the parts of a map were loaded a few at a time)."""
BACKWARD_WIDE = Resources(4, 4096, 8192, 16384, ((9, (3, 168)), (None, (2, 255))))
"""For more positions than SMALL_MAP, where one warp is slower (512 x 28 x 28, N = 128: 107 us, with four 96)
or spills, and for rows that cannot be copied ahead."""
SMALL_MAP = 256


class Schedule(NamedTuple):
    """How a fused kernel cuts up its passes over A."""

    group: int  # images whose phases follow one another
    task_c: int  # channels of a task, a multiple of tile.block_c
    tile: Tile
    stages: int  # tiles under way, and the one that is added up
    block_map: int


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


def channels_block(channels: int) -> tuple[int, int] | None:
    """(BLOCK_C, warps) of a program that holds an image's channels, 8 a thread in each of its rows, or 16
    where there are many; None where there are too many."""
    if channels > LARGEST_CHANNELS:
        return None
    block = max(_power_of_2(channels), 128)
    return block, min(max(block // 256, 1), 16)


def schedule(
    channels: int, positions: int, itemsize: int, layout: str, resources: Resources, accumulators: int = 1
) -> Schedule | None:
    """The fused kernels' schedule, or None where pass by pass is better: an image as large as a group would
    have left the cache when it is read again.  Depends on one image alone, as its result does."""
    image_bytes = channels * positions * itemsize
    if image_bytes > GROUP_BYTES:
        return None
    elements = min(resources.tile_elements // accumulators, resources.tile_bytes // itemsize)
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
        tile=Tile(block_c, block_l, resources.warps),
        stages=1 + resources.copy_bytes // (elements * itemsize),
        block_map=min(_power_of_2(positions), MAP_BLOCK),
    )


def _copied_ahead(positions: int, itemsize: int, layout: str) -> bool:
    """Whether rows can go to shared memory by asynchronous copies, which move four bytes at least."""
    return layout == CHANNELS_FIRST or positions * itemsize % 4 == 0


def forward_resources(average: bool, positions: int, itemsize: int, layout: str) -> Resources:
    """Of the fused forward, by its pooling and map."""
    return FORWARD if average and _copied_ahead(positions, itemsize, layout) else ROOMY


def backward_resources(positions: int, itemsize: int, layout: str) -> Resources:
    """Of the fused backward, by its map."""
    small = positions <= SMALL_MAP and _copied_ahead(positions, itemsize, layout)
    return BACKWARD if small else BACKWARD_WIDE


def occupancy(capability: int, resources: Resources) -> tuple[int, int]:
    """(programs on each multiprocessor, registers a thread) of a persistent kernel."""
    return _row(resources.occupancy, capability)
