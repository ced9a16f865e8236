"""Launch plans, as integer functions, in every row of every table."""

import pytest

import ggam_fast  # noqa: F401  (makes the checkout's kernels/ importable)

plan = pytest.importorskip("ggam_fast.kernels.plan")

SIZES = [1, 2, 15, 16, 17, 32, 33, 49, 64, 65, 128, 129, 196, 256, 257, 1023, 1024, 2048, 4097, 100_000]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", [plan.POSITIONS_FIRST, plan.CHANNELS_FIRST])
def test_a_tile_is_long_in_the_contiguous_direction_and_no_longer_than_needed(size: int, layout: str) -> None:
    channels, positions = (7, size) if layout == plan.POSITIONS_FIRST else (size, 7)
    tile = plan.tile(channels, positions, layout)
    along, across = tile.block_l, tile.block_c
    if layout == plan.CHANNELS_FIRST:
        along, across = across, along
    assert along * across == 2048
    assert along in (16, 256) or along // 2 < size <= along
    assert (along == 16) == (size <= 16)
    assert (along == 256) == (size > 128)
    assert tile.num_warps == 4


def test_every_row_of_the_norm_is_reached() -> None:
    rows = {plan.norm_block(size)[1] for size in SIZES}
    assert rows == {warps for _, (_, warps) in plan._NORM_BLOCK}


LAYOUTS = (plan.POSITIONS_FIRST, plan.CHANNELS_FIRST)
SUMS = [
    (f"{name} {c}x{l} {itemsize} {layout} {rows}", cut, c, l, itemsize, layout)
    for c, l in ((7, size) for size in SIZES)
    for c, l in ((c, l), (l, c))
    for itemsize in (2, 4)
    for layout in LAYOUTS
    for rows in (0, 1, 2)
    for name, cut in (
        ("channel_sum", plan.channel_sum(c, l, itemsize, layout)),
        ("spatial_sum", plan.spatial_sum(c, l, itemsize, layout, rows)),
    )
]


def test_sums_go_through_whole_tiles_of_whole_rows() -> None:
    for name, cut, c, l, itemsize, layout in SUMS:
        assert cut.task_c % cut.block_c == 0, name
        along, size = (cut.block_l, l) if layout == plan.POSITIONS_FIRST else (cut.block_c, c)
        longest = 1024 if name.startswith("spatial") else 256
        # A cache line of channels, or the row; a row of more than a tile in pieces.
        assert along == 16 or along // 2 < size <= along or size > along in (64, 128, 256), name
        assert along <= longest, name
        # Tiles on their way fit the shared memory of many programs; accumulators fit a thread's registers.
        assert cut.stages * cut.block_c * cut.block_l * itemsize <= 48 << 10, name
        assert cut.block_c * cut.block_l <= 64 * 32 * cut.num_warps, name
        assert cut.stages == 1 or layout == plan.CHANNELS_FIRST or l * itemsize % 4 == 0, name


@pytest.mark.parametrize("positions", SIZES)
def test_a_program_of_the_norm_keeps_few_values_a_thread(positions: int) -> None:
    block, warps = plan.norm_block(positions)
    assert block & (block - 1) == 0
    assert block // 2 < positions <= block or block == 4096
    assert block <= 8 * 32 * warps


def test_no_program_has_more_threads_than_amd_allows() -> None:
    """1,024 a program, in warps of 64; 32 warps were launched there for large maps once."""
    tiles = [plan.tile(c, l, layout) for c in SIZES for l in SIZES
             for layout in (plan.POSITIONS_FIRST, plan.CHANNELS_FIRST)]  # fmt: skip
    warps = [t.num_warps for t in (*tiles, plan.MEANS_TILE, plan.SCATTER_TILE, *(cut for _, cut, *_ in SUMS))]
    assert max(*warps, *(plan.norm_block(size)[1] for size in SIZES)) <= 16


@pytest.mark.parametrize(("size", "block", "expected"), [(0, 8, 0), (1, 8, 1), (8, 8, 1), (9, 8, 2)])
def test_blocks(size: int, block: int, expected: int) -> None:
    assert plan.blocks(size, block) == expected


@pytest.mark.parametrize("channels", SIZES)
def test_columns_of_batch_norm_are_sectors(channels: int) -> None:
    """Whole 32-byte sectors of each row, 16 values a thread, and a GPU full of programs where there are
    columns for them."""
    cut = plan.batch_norm(channels)
    assert cut.block_c % 8 == 0
    assert cut.block_n * cut.block_c == 16 * 32 * cut.num_warps
    assert plan.blocks(channels, cut.block_c) >= min(channels // 8, 65)


def test_every_row_of_batch_norm_is_reached() -> None:
    assert {plan.batch_norm(size) for size in SIZES} == {cut for _, cut in plan._BATCH_NORM}
    assert plan.blocks(2048, plan.batch_norm(2048).block_c) == 128
    assert plan.blocks(512, plan.batch_norm(512).block_c) == 64


@pytest.mark.parametrize("classes", SIZES)
def test_classes_of_an_image_are_held_or_swept(classes: int) -> None:
    block, warps = plan.cross_entropy(classes)
    assert block & (block - 1) == 0
    assert block >= min(classes, plan.LARGEST_CLASSES)
    assert block == 128 or block < 2 * classes
    assert block <= 8 * 32 * warps
    assert warps <= 16
