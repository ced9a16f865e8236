"""Launch plans are integer functions: checked as such, every row of every table."""

import pytest

import ggam_fast  # noqa: F401  (makes the checkout's kernels/ importable)

plan = pytest.importorskip("ggam_fast.kernels.plan")

SIZES = [1, 2, 15, 16, 17, 32, 33, 49, 64, 65, 128, 129, 196, 256, 257, 1023, 1024, 2048, 100_000]


@pytest.mark.parametrize("size", SIZES)
def test_next_power_of_2(size: int) -> None:
    found = plan.next_power_of_2(size)
    assert found & (found - 1) == 0
    assert found // 2 < size <= found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", [plan.POSITIONS_FIRST, plan.CHANNELS_FIRST])
def test_a_tile_is_long_in_the_contiguous_direction_and_no_longer_than_needed(size: int, layout: str) -> None:
    channels, positions = (7, size) if layout == plan.POSITIONS_FIRST else (size, 7)
    tile = plan.tile(channels, positions, layout)
    along, across = tile.block_l, tile.block_c
    if layout == plan.CHANNELS_FIRST:
        along, across = across, along
    assert along * across == 2048
    assert along == min(256, max(16, plan.next_power_of_2(size)))
    assert tile.num_warps == 4


def test_every_row_of_the_tables_is_reached() -> None:
    rows = {plan.tile(1, size, plan.POSITIONS_FIRST).block_l for size in SIZES}
    assert rows == {block for _, block in plan._POSITIONS_TILE}
    rows = {plan.tile(size, 1, plan.CHANNELS_FIRST).block_c for size in SIZES}
    assert rows == {block for _, block in plan._CHANNELS_TILE}
    assert {plan.norm_warps(size) for size in (1, 1025, 4097, 16385)} == {4, 8, 16, 32}


@pytest.mark.parametrize("channels", SIZES)
def test_partial_sums_cover_all_channels_once(channels: int) -> None:
    parts = plan.num_partials(channels)
    assert (parts - 1) * plan.CHANNELS_PER_PARTIAL < channels <= parts * plan.CHANNELS_PER_PARTIAL


def test_a_program_of_the_norm_keeps_at_most_128_values_a_thread() -> None:
    for positions in (1, 196, 1024, 1025, 4096, 4097, 16384, plan.MAX_POSITIONS):
        assert plan.next_power_of_2(positions) <= 128 * 32 * plan.norm_warps(positions)
