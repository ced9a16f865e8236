"""Launch plans are integer functions: checked as such, every row of every table."""

import itertools

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


def test_every_row_of_the_tables_is_reached() -> None:
    rows = {plan.tile(1, size, plan.POSITIONS_FIRST).block_l for size in SIZES}
    assert rows == {block for _, block in plan._POSITIONS_TILE}
    rows = {plan.tile(size, 1, plan.CHANNELS_FIRST).block_c for size in SIZES}
    assert rows == {block for _, block in plan._CHANNELS_TILE}
    rows = {plan.norm_block(size)[1] for size in SIZES}
    assert rows == {warps for _, (_, warps) in plan._NORM_BLOCK}


@pytest.mark.parametrize("channels", SIZES)
def test_partial_sums_cover_all_channels_once(channels: int) -> None:
    parts = plan.num_partials(channels)
    assert (parts - 1) * plan.CHANNELS_PER_PARTIAL < channels <= parts * plan.CHANNELS_PER_PARTIAL


def test_no_block_straddles_two_partial_sums() -> None:
    for layout in (plan.POSITIONS_FIRST, plan.CHANNELS_FIRST):
        for size in SIZES:
            assert plan.CHANNELS_PER_PARTIAL % plan.tile(size, size, layout).block_c == 0


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
    warps = [t.num_warps for t in (*tiles, plan.MEANS_TILE, plan.SCATTER_TILE)]
    assert max(*warps, *(plan.norm_block(size)[1] for size in SIZES)) <= 16


@pytest.mark.parametrize(("size", "block", "expected"), [(0, 8, 0), (1, 8, 1), (8, 8, 1), (9, 8, 2)])
def test_blocks(size: int, block: int, expected: int) -> None:
    assert plan.blocks(size, block) == expected


RESOURCES = (plan.FORWARD, plan.ROOMY, plan.BACKWARD, plan.BACKWARD_WIDE)
MAPS = [
    (2048, 196),
    (512, 784),
    (512, 196),
    (1280, 196),
    (1280, 49),
    (1024, 1024),
    (1, 1),
    (17, 3),
    (64, 4096),
]


@pytest.mark.parametrize("layout", [plan.POSITIONS_FIRST, plan.CHANNELS_FIRST])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("accumulators", [1, 2])
@pytest.mark.parametrize("resources", RESOURCES)
@pytest.mark.parametrize(("channels", "positions"), MAPS)
def test_a_schedule_fits_the_cache_and_its_tasks_whole_tiles(
    channels: int,
    positions: int,
    accumulators: int,
    itemsize: int,
    layout: str,
    resources: plan.Resources,
) -> None:
    found = plan.schedule(channels, positions, itemsize, layout, resources, accumulators)
    assert found is not None
    group, task_c, tile, stages, block_map = found
    image_bytes = channels * positions * itemsize
    assert 1 <= group <= plan.LARGEST_GROUP
    assert group * image_bytes <= plan.GROUP_BYTES
    assert group == plan.LARGEST_GROUP or (group + 1) * image_bytes > plan.GROUP_BYTES
    assert task_c % tile.block_c == 0
    elements = tile.block_c * tile.block_l
    most, most_bytes = resources.tile_elements, resources.tile_bytes
    assert elements * accumulators == most or elements * itemsize == most_bytes
    assert elements * accumulators <= most
    assert elements * itemsize <= most_bytes
    assert (stages - 1) * tile.block_c * tile.block_l * itemsize == resources.copy_bytes
    assert tile.num_warps == resources.warps
    if layout == plan.POSITIONS_FIRST:
        assert tile.block_l in (16, plan.LONG_BLOCK) or tile.block_l // 2 < positions <= tile.block_l
        assert (tile.block_l < positions) == (positions > plan.MAP_BLOCK)
        assert plan.TASK_CHANNELS[0] <= task_c <= max(plan.TASK_CHANNELS[1], tile.block_c)
    else:
        assert tile.block_c in (16, plan.LINE_BYTES // itemsize) or tile.block_c // 2 < channels
    assert block_map & (block_map - 1) == 0
    assert block_map == plan.MAP_BLOCK or positions <= block_map < 2 * positions


def test_resources_by_pooling_and_map() -> None:
    nchw, channels_last = plan.POSITIONS_FIRST, plan.CHANNELS_FIRST
    assert plan.forward_resources(True, 196, 2, nchw) is plan.FORWARD
    assert plan.forward_resources(True, 49, 4, nchw) is plan.FORWARD
    assert plan.forward_resources(True, 49, 2, channels_last) is plan.FORWARD
    assert plan.forward_resources(True, 49, 2, nchw) is plan.ROOMY
    assert plan.forward_resources(False, 196, 2, nchw) is plan.ROOMY
    assert plan.backward_resources(256, 2, nchw) is plan.BACKWARD
    assert plan.backward_resources(257, 4, nchw) is plan.BACKWARD_WIDE
    assert plan.backward_resources(49, 2, nchw) is plan.BACKWARD_WIDE


def test_an_image_larger_than_a_group_goes_pass_by_pass() -> None:
    limit = plan.GROUP_BYTES // (2 * 1024)
    assert plan.schedule(1024, limit, 2, plan.POSITIONS_FIRST, plan.FORWARD) is not None
    assert plan.schedule(1024, limit + 1, 2, plan.POSITIONS_FIRST, plan.FORWARD) is None


def test_registers_of_the_programs_that_share_a_multiprocessor() -> None:
    for capability, resources in itertools.product((8, 9, 10, 12), RESOURCES):
        programs, registers = plan.occupancy(capability, resources)
        assert programs * 32 * resources.warps * -(-registers // 8) * 8 <= 65536
