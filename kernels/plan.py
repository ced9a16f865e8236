"""Launch plans: pure integer functions of shape and layout, one table each."""

from typing import NamedTuple

POSITIONS_FIRST = "positions"  # NCHW memory: neighbouring positions are adjacent
CHANNELS_FIRST = "channels"  # channels-last memory, NHWC, tokens: neighbouring channels are adjacent


class Tile(NamedTuple):
    """A BLOCK_C x BLOCK_L block of one image's feature map and the warps that share it."""

    block_c: int
    block_l: int
    num_warps: int


class Sums(NamedTuple):
    """How one program of a pass that adds up A goes through task_c channels of one image: tile by tile,
    stages - 1 of them on their way to shared memory while one is added up."""

    task_c: int
    block_c: int
    block_l: int
    num_warps: int
    stages: int


class Columns(NamedTuple):
    """Columns of a matrix that one program of `batch_norm` owns, and how many rows it takes at a time."""

    block_n: int
    block_c: int
    num_warps: int


# The tile of a pass without sums always holds 2,048 elements, 16 a thread of four warps: four 8-byte loads in
# flight a thread for two-byte types, and few enough registers for several resident programs.  What only
# writes has one warp: on an H100, features_grad in bfloat16, N = 128, takes 41.3 us for 41.6 with four
# (2048 x 14 x 14), in channels-last memory 39.5 for 47.1, and 91 for 116 for 1024 tokens x 1024.
_TILE_ELEMENTS = 2048
_SUM_BYTES = 4096
"""Of a tile of `channel_sum` in NCHW memory."""
_TILE_LENGTH = (16, 256)
"""Neighbours in memory that a tile holds at least and at most."""

# (largest L, (positions in a sweep's block at most, warps)).  A program holds a whole image's block: 8
# values a thread of 32-thread warps, and at most the 1,024 threads that a program may have with AMD's 64.
_NORM_BLOCK = ((1024, (1024, 4)), (None, (4096, 16)))

# (largest C, columns): few columns leave a GPU idle, and 8 are one 32-byte sector of each row.  128 rows at
# a time are 16 values a thread, in flight together, and most batches.  Not timed yet.
_BATCH_NORM = ((1024, Columns(128, 8, 2)), (None, Columns(128, 16, 4)))

LARGEST_CLASSES = 4096
"""Classes of an image that one program of `cross_entropy` holds; of more, it goes through them in sweeps."""

SCALE_BLOCK = 1024
"""Elements of a program of `cross_entropy_grad`, of four warps."""

MEANS_TILE = Tile(64, 32, 8)
"""grad_cam_means reads two maps and keeps two accumulators: with 4 warps a register spills on sm_100.
Its partial sums of dT, one for 64 channels, are 1/64 of a map in float32."""

SCATTER_TILE = Tile(128, 16, 4)
"""position_scatter compares every channel with every position: narrow in L, so that one image is spread
over several programs and none of them walks through the channels in many steps."""

PARTIAL_CHANNELS = 128
"""Channels of one partial sum of `channel_sum`: few images still fill a GPU, and few partial sums are left to
add up.  On an H100, 2048 x 14 x 14, bfloat16, N = 128 and 32: 40.6 and 12.2 us with 128; 41.0 and 11.4 with
64, which leave twice as many to `spatial_norm` (0.7 us more); with 256 39.9 and 15.8.  Times in this file
are of scripts that are not kept (`dev/h100.md`); `python -m bench.tune PARTIAL_CHANNELS=64,128,256`
times whole steps."""

LARGEST_CHANNELS = 8192
"""Channels of an image at most that one program of `guidance` holds."""


class Product(NamedTuple):
    """How a small product of matrices is cut up, and how many programs share the sum of one tile."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    stages: int
    split: int


# Chosen from some twenty tiles for each product of a step at 2048 channels, N = 128 and 32, on an H100:
# "Small products" in `dev/h100.md`.
SMALL_PRODUCT = Product(16, 32, 64, 4, 4, 1)

WIDE_PRODUCT = Product(16, 64, 32, 4, 4, 1)
"""Of many columns: with 64 of k in a block it spills for sm_100 and sm_120 (Triton 3.8)."""

LARGE_PRODUCT = Product(32, 64, 32, 2, 4, 1)
"""Of so many elements that tiles fill a GPU."""

LAYER_GRADS = Product(32, 64, 32, 4, 3, 1)
"""Of weights' gradients, whose sums are over a batch: each element is then split in its parts a half or a
quarter as often as by tiles of 16 x 32."""

LARGEST_PRODUCT = 1 << 28
"""Multiply-adds of a product at most: as many as were measured to be faster than cuBLAS in float32, the
twelve of a step at 2048 channels taking 91 us for 152 at N = 128, and 129 for 211 at 256 (H100)."""


def _row(table: tuple, size: int):
    return next(value for limit, value in table if limit is None or size <= limit)


def power_of_2(size: int) -> int:
    """The smallest that is not below `size`."""
    return 1 << max(size - 1, 0).bit_length()


def _length(size: int, longest: int = _TILE_LENGTH[1]) -> int:
    """Of a tile along `size` neighbours in memory."""
    return min(max(power_of_2(size), _TILE_LENGTH[0]), longest)


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)


def memory_order(strides: tuple[int, ...]) -> str:
    """Which of channels and positions of an (N, C, L) map are neighbours in memory."""
    return POSITIONS_FIRST if strides[2] == 1 else CHANNELS_FIRST


def geometry(shape: tuple[int, ...], strides: tuple[int, ...], cut: "Tile | Sums") -> dict[str, int]:
    """The compile-time constants of a pass over an (N, C, L) map: sizes, inner strides, tile."""
    return {
        "C": shape[1],
        "L": shape[2],
        "STRIDE_C": strides[1],
        "STRIDE_L": strides[2],
        "BLOCK_C": cut.block_c,
        "BLOCK_L": cut.block_l,
        "num_warps": cut.num_warps,
    }


def tile(channels: int, positions: int, layout: str, num_warps: int = 4) -> Tile:
    """The tile for one pass over a (C, L) map: long in the contiguous direction."""
    if layout == POSITIONS_FIRST:
        block_l = _length(positions)
        return Tile(_TILE_ELEMENTS // block_l, block_l, num_warps)
    block_c = _length(channels)
    return Tile(block_c, _TILE_ELEMENTS // block_c, num_warps)


# Programs of one warp, or two, were the fastest for both sums on an H100 (`dev/h100.md`), of which
# sixteen warps or more fit a multiprocessor (`tests/bench/tools/test_codegen.py`).


def partial_sums(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, rows: int
) -> tuple[int, ...]:
    """The shape of what `channel_sum` leaves to add up for R rows of weights: (N, R, P, L)."""
    batch, channels, positions = shape
    cut = channel_sum(channels, positions, itemsize, memory_order(strides))
    return batch, rows, blocks(channels, cut.task_c), positions


def channel_sum(channels: int, positions: int, itemsize: int, layout: str) -> Sums:
    """The pass that adds up over channels: a program stores one partial sum, for block_l positions.  Depends
    on one image alone, so that its result does not depend on the batch it is in."""
    if layout == CHANNELS_FIRST:
        block_c = _length(channels, PARTIAL_CHANNELS)
        return Sums(_task(channels, block_c), block_c, 1024 // block_c, 1, 1)
    block_l = _length(positions)
    block_c = _SUM_BYTES // itemsize // block_l
    stages = 3 if _copied_ahead(positions, itemsize) else 1
    return Sums(_task(channels, block_c), block_c, block_l, 1, stages)


def _task(channels: int, block_c: int) -> int:
    """Channels of a partial sum: whole tiles, and no more of them than there are channels for."""
    return min(PARTIAL_CHANNELS, max(power_of_2(channels), block_c))


def spatial_sum(channels: int, positions: int, itemsize: int, layout: str, rows: int) -> Sums:
    """The pass that adds up over positions, with `rows` weights at once: whole rows of NCHW memory, cache
    lines of channels-last memory."""
    if layout == CHANNELS_FIRST:
        block_c = _length(channels, 64)
        block_l, num_warps = (16, 1) if positions <= 256 else (32, 2)
        return Sums(block_c, block_c, block_l, num_warps, 3)
    block_l = _length(positions, 1024) if positions <= 1024 else 256
    block_c = _TILE_ELEMENTS // block_l
    if rows == 2 and block_l > 256:
        return Sums(2 * block_c, block_c, block_l, 1, 3 if _copied_ahead(positions, itemsize) else 1)
    # Two rows have half as many accumulators each.
    return Sums(block_c, block_c // max(rows, 1), block_l, 1, 1)


def _copied_ahead(positions: int, itemsize: int) -> bool:
    """Whether rows of NCHW memory can go to shared memory by asynchronous copies, which move four bytes at
    least."""
    return positions * itemsize % 4 == 0


def product(m: int, n: int, k: int, has_bias: bool, may_split: bool, must: bool = False) -> Product | None:
    """The plan of (m, k) times (k, n), m counting the rows of both where there are two; None where torch's
    is better, unless there `must` be one.  A long sum over k is shared by as many programs as n and k alone
    ask for, but a row's last bits may change where m asks for larger tiles, or for torch.  With a bias
    large tiles spill for sm_100 (Triton 3.8)."""
    if m * n * k > LARGEST_PRODUCT and not must:
        return None
    if m * n >= 1 << 19 and not has_bias:
        return LARGE_PRODUCT
    split = 1
    if may_split and k > 512:
        programs = 128 if k > 1024 else 64  # for one row of tiles 32 wide
        split = max(1, min(k // 128, programs // max(blocks(n, 32), 1)))
    cut = WIDE_PRODUCT if n >= 512 and k > 128 else SMALL_PRODUCT
    return cut._replace(split=1 << (split.bit_length() - 1))


def norm_block(positions: int) -> tuple[int, int]:
    """(BLOCK_L, warps) of a program that normalises one image over its L positions."""
    largest, num_warps = _row(_NORM_BLOCK, positions)
    return min(power_of_2(positions), largest), num_warps


def map_block(positions: int, num_warps: int) -> int:
    """BLOCK_L of a map in a program of `guidance`: at most 16 values a thread, as it holds two."""
    return min(power_of_2(positions), 512 * num_warps)


def channels_block(channels: int) -> tuple[int, int] | None:
    """(BLOCK_C, warps) of a program that holds an image's channels, 8 a thread in each of its rows, or 16
    where there are many; None where there are too many."""
    if channels > LARGEST_CHANNELS:
        return None
    block = max(power_of_2(channels), 128)
    return block, min(max(block // 256, 1), 16)


def batch_norm(channels: int) -> Columns:
    """For any number of rows, so that batches of all sizes are one kernel."""
    return _row(_BATCH_NORM, channels)


def cross_entropy(classes: int) -> tuple[int, int]:
    """(BLOCK_K, warps) of a program that does an image's classes, 8 a thread."""
    block = min(max(power_of_2(classes), 128), LARGEST_CLASSES)
    return block, max(block // 256, 1)
