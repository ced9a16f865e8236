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
