"""Launch plans: integer functions of shape and layout alone, and the tables that they read."""

from typing import NamedTuple

POSITIONS_FIRST = "positions"  # NCHW memory: neighbouring positions are adjacent
CHANNELS_FIRST = "channels"  # channels-last memory, NHWC, tokens: neighbouring channels are adjacent


class Tile(NamedTuple):
    """A BLOCK_C x BLOCK_L block of one image's feature map, and the number of warps that work on it."""

    block_c: int
    block_l: int
    num_warps: int


class Sums(NamedTuple):
    """How one program of a summing pass goes through task_c channels of one image.

    It adds one tile while up to stages - 1 tiles are being copied to shared memory.
    """

    task_c: int
    block_c: int
    block_l: int
    num_warps: int
    stages: int


class Columns(NamedTuple):
    """The columns that one program of `batch_norm` does, and how many rows it reads at a time."""

    block_n: int
    block_c: int
    num_warps: int


# The tile of a pass without sums always holds 2,048 elements, 16 for each thread of four warps.  That is four
# 8-byte loads in flight a thread for two-byte types, with few enough registers for several resident programs.
# A pass that only writes has one warp.  features_grad in bfloat16, N = 128, on an H100, one warp and four:
# 41.3 and 41.6 us (2048 x 14 x 14), 39.5 and 47.1 in channels-last memory, 91 and 116 for 1024 tokens x 1024.
_TILE_ELEMENTS = 2048
_SUM_BYTES = 4096
"""Bytes of a tile of `channel_sum` in NCHW memory."""
_TILE_LENGTH = (16, 256)
"""The smallest and largest length of a tile along neighbours in memory."""

# (largest L, (largest block of positions in a sweep, warps)).  A program holds a block of one image: 8 values
# for each thread of 32-thread warps.  Sixteen of AMD's 64-thread warps are the limit of 1,024 threads.
_NORM_BLOCK = ((1024, (1024, 4)), (None, (4096, 16)))

# (largest C, columns).  A small C would leave a GPU idle, so a program does 8 columns, one 32-byte sector of
# each row.  128 rows at a time are most batches: 16 values a thread, in flight together.  Not timed yet.
_BATCH_NORM = ((1024, Columns(128, 8, 2)), (None, Columns(128, 16, 4)))

LARGEST_CLASSES = 4096
"""The most classes that one program of `cross_entropy` holds.  It goes through more of them in sweeps."""

SCALE_BLOCK = 1024
"""Elements that one program of `cross_entropy_grad` scales with four warps."""

MEANS_TILE = Tile(64, 32, 8)
"""For grad_cam_means, which reads two maps and keeps two accumulators: with 4 warps a register spills on
sm_100.  Its partial sums of dT, one for 64 channels, take 1/64 of a map in float32."""

SCATTER_TILE = Tile(128, 16, 4)
"""For position_scatter, which compares every channel with every position.  The tile is narrow in L, so that
several programs share an image and each goes through the channels in few steps."""

PARTIAL_CHANNELS = 128
"""Channels of one partial sum of `channel_sum`.  With 128 a few images still fill a GPU, and few partial sums
are left to add.  On an H100, 2048 x 14 x 14, bfloat16, N = 128 and 32: 40.6 and 12.2 us with 128, 41.0 and
11.4 with 64, 39.9 and 15.8 with 256.  With 64, `spatial_norm` has twice as many to add and takes 0.7 us more.
The times in this file are from scripts that are not kept (`dev/h100.md`);
`python -m bench.tune PARTIAL_CHANNELS=64,128,256` times whole steps."""

LARGEST_CHANNELS = 8192
"""The most channels of an image that one program of `guidance` holds."""


class Product(NamedTuple):
    """The tile of a small matrix product, and how many programs share the sum of one tile."""

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
"""For many columns.  With 64 of k in a block it spills on sm_100 and sm_120 (Triton 3.8)."""

LARGE_PRODUCT = Product(32, 64, 32, 2, 4, 1)
"""For results with so many elements that large tiles fill a GPU."""

LAYER_GRADS = Product(32, 64, 32, 4, 3, 1)
"""For the gradients of weights, which are sums over a batch.  Each input element is split into its TF32 parts
a half or a quarter as often as with tiles of 16 x 32."""

LARGEST_PRODUCT = 1 << 28
"""The most multiply-adds of a product.  Up to this size it was measured to be faster than cuBLAS in float32:
the twelve products of a step at 2048 channels take 91 us, with cuBLAS 152, at N = 128; 129 and 211 at 256
(H100)."""


def _row(table: tuple, size: int):
    return next(value for limit, value in table if limit is None or size <= limit)


def power_of_2(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << max(size - 1, 0).bit_length()


def _length(size: int, longest: int = _TILE_LENGTH[1]) -> int:
    """The length of a tile along `size` neighbours in memory."""
    return min(max(power_of_2(size), _TILE_LENGTH[0]), longest)


def blocks(size: int, block: int) -> int:
    """The number of blocks that cover `size`."""
    return -(-size // block)


def memory_order(strides: tuple[int, ...]) -> str:
    """Whether channels or positions of an (N, C, L) map are neighbours in memory."""
    return POSITIONS_FIRST if strides[2] == 1 else CHANNELS_FIRST


def dot_options(device: str, hip: bool) -> dict[str, str | int]:
    """The constants of a kernel that multiplies float32 matrices on this type of device."""
    if hip or device not in ("cuda", "cpu", "meta"):
        return {"PRECISION": "ieee"}  # AMD's matrix units multiply full float32; maxnreg is NVIDIA's
    return {"PRECISION": "tf32x3", "maxnreg": 255}  # without a limit Triton 3.9 spills at 168 registers


def readable(strides: tuple[int, ...]) -> bool:
    """Whether kernels can read an (N, C, L) map: channels or positions are neighbours in memory."""
    return 1 in strides[1:]


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


# Programs of one or two warps were the fastest for both sums on an H100 (`dev/h100.md`).  Sixteen of their
# warps or more fit a multiprocessor (`tests/bench/tools/test_codegen.py`).


def partial_sums(
    shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, rows: int
) -> tuple[int, ...]:
    """The shape (N, R, P, L) of the partial sums of `channel_sum` for R rows of weights."""
    batch, channels, positions = shape
    cut = channel_sum(channels, positions, itemsize, memory_order(strides))
    return batch, rows, blocks(channels, cut.task_c), positions


def channel_sum(channels: int, positions: int, itemsize: int, layout: str) -> Sums:
    """The plan of the sum over channels: one program stores one partial sum, for block_l positions.

    It does not depend on the batch size, so an image has the same result in every batch.
    """
    if layout == CHANNELS_FIRST:
        block_c = _length(channels, PARTIAL_CHANNELS)
        return Sums(_task(channels, block_c), block_c, 1024 // block_c, 1, 1)
    block_l = _length(positions)
    block_c = _SUM_BYTES // itemsize // block_l
    stages = 3 if _copied_ahead(positions, itemsize) else 1
    return Sums(_task(channels, block_c), block_c, block_l, 1, stages)


def _task(channels: int, block_c: int) -> int:
    """The channels of a partial sum: whole tiles, and no more than the channels need."""
    return min(PARTIAL_CHANNELS, max(power_of_2(channels), block_c))


def spatial_sum(channels: int, positions: int, itemsize: int, layout: str, rows: int) -> Sums:
    """The plan of the sum over positions, with `rows` weights at once.

    A tile holds whole rows of NCHW memory, or cache lines of channels-last memory.
    """
    if layout == CHANNELS_FIRST:
        block_c = _length(channels, 64)
        block_l, num_warps = (16, 1) if positions <= 256 else (32, 2)
        return Sums(block_c, block_c, block_l, num_warps, 3)
    block_l = _length(positions, 1024) if positions <= 1024 else 256
    block_c = _TILE_ELEMENTS // block_l
    if rows == 2 and block_l > 256:
        return Sums(2 * block_c, block_c, block_l, 1, 3 if _copied_ahead(positions, itemsize) else 1)
    # With two rows of weights, each has half as many accumulators.
    return Sums(block_c, block_c // max(rows, 1), block_l, 1, 1)


def _copied_ahead(positions: int, itemsize: int) -> bool:
    """Whether asynchronous copies, which move at least four bytes, can bring rows of NCHW memory to shared
    memory."""
    return positions * itemsize % 4 == 0


def product(m: int, n: int, k: int, has_bias: bool, may_split: bool, must: bool = False) -> Product | None:
    """The plan of (m, k) times (k, n), or None if torch's product is faster.  With `must` there is a plan.

    m counts the rows of both matrices if there are two.  n and k alone decide how many programs share a long
    sum over k.  A row's last bits may still change with m, because m decides between small tiles, large tiles
    and torch.  With a bias large tiles spill on sm_100 (Triton 3.8).
    """
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
    """BLOCK_L in a program of `guidance`: at most 16 values a thread for each of its two maps."""
    return min(power_of_2(positions), 512 * num_warps)


def channels_block(channels: int) -> tuple[int, int] | None:
    """(BLOCK_C, warps) of a program that holds all channels of an image; None if there are too many.

    A thread holds 8 values of each row, or 16 if there are many channels.
    """
    if channels > LARGEST_CHANNELS:
        return None
    block = max(power_of_2(channels), 128)
    return block, min(max(block // 256, 1), 16)


def batch_norm(channels: int) -> Columns:
    """The plan for any number of rows, so that all batch sizes share one kernel."""
    return _row(_BATCH_NORM, channels)


def cross_entropy(classes: int) -> tuple[int, int]:
    """(BLOCK_K, warps) of a program that does the classes of an image, 8 a thread."""
    block = min(max(power_of_2(classes), 128), LARGEST_CLASSES)
    return block, max(block // 256, 1)
