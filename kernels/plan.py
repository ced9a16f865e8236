"""Launch plans: pure integer functions of shape and layout, one table each."""

from typing import NamedTuple

POSITIONS_FIRST = "positions"  # NCHW memory: neighbouring positions are adjacent
CHANNELS_FIRST = "channels"  # channels-last memory, NHWC, tokens: neighbouring channels are adjacent

MAX_POSITIONS = 1 << 17
"""spatial_norm keeps a whole map of L float32 values in one program's registers."""


class Tile(NamedTuple):
    """A BLOCK_C x BLOCK_L block of one image's feature map and the warps that share it."""

    block_c: int
    block_l: int
    num_warps: int


# (largest L, positions in a tile).  The tile always holds 2,048 elements, 16 a thread: four 8-byte
# loads in flight a thread for two-byte types, and few enough registers for 16 resident programs.
_POSITIONS_TILE = ((16, 16), (32, 32), (64, 64), (128, 128), (None, 256))
# (largest C, channels in a tile), for channels-last memory.
_CHANNELS_TILE = ((16, 16), (32, 32), (64, 64), (128, 128), (None, 256))
_TILE_ELEMENTS = 2048

# (largest L, warps): at most 128 float32 values a thread.
_NORM_WARPS = ((1024, 4), (4096, 8), (16384, 16), (None, 32))

CHANNELS_PER_PARTIAL = 256
"""channel_sum splits C into partial sums of this many channels, so that few images still fill a GPU."""


def _row(table: tuple[tuple[int | None, int], ...], size: int) -> int:
    return next(value for limit, value in table if limit is None or size <= limit)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (1 for n <= 1)."""
    return 1 << max(n - 1, 0).bit_length()


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
    return max(1, -(-channels // CHANNELS_PER_PARTIAL))


def norm_warps(positions: int) -> int:
    """Warps for a program that holds one image's L positions."""
    return _row(_NORM_WARPS, positions)
