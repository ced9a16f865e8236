"""Every measure on pictures small enough to count by hand."""

import numpy as np
import pytest
import torch

from ggam_fast.training.measure import localization as loc
from ggam_fast.training.measure.geometry import Placed, boxes_to_masks


def heat(*points, size=(10, 10), background=0.0):
    """Maps that are zero except at the pixels (x, y, value)."""
    maps = torch.full((1, *size), background)
    for x, y, value in points:
        maps[0, y, x] = value
    return maps


def mask(x0, y0, x1, y1, size=(10, 10)):
    return boxes_to_masks(torch.tensor([[x0, y0, x1, y1]], dtype=torch.float32), size)


def test_peak_is_the_first_of_equals():
    maps = torch.cat([heat((3, 7, 1.0), (4, 2, 1.0)), heat((9, 0, 2.0), (0, 9, 1.0))])
    assert loc.peaks(maps).tolist() == [[4, 2], [9, 0]]


@pytest.mark.parametrize(("tolerance", "hit"), [(0, False), (4.9, False), (5, True), (100, True)])
def test_pointing_game_allows_a_circle(tolerance, hit):
    # The nearest pixel (4, 5) of the object is 3 across and 4 down from the peak (1, 1).
    maps, area = heat((1, 1, 1.0)), mask(4, 5, 9, 9)
    assert loc.pointing_game(maps, area, tolerance).tolist() == [hit]


def test_pointing_game_on_and_off():
    area = mask(4, 5, 9, 9).expand(2, 10, 10)
    maps = torch.cat([heat((4, 5, 1.0)), heat((3, 5, 1.0))])
    assert loc.pointing_game(maps, area).tolist() == [True, False]


def test_energy_is_the_share_inside():
    maps = heat((4, 5, 3.0), (0, 0, 1.0))
    assert loc.energy(maps, mask(4, 5, 9, 9)).tolist() == [0.75]
    assert loc.energy(torch.zeros(1, 10, 10), mask(4, 5, 9, 9)).tolist() == [0.0]
    assert loc.energy(torch.ones(1, 10, 10), mask(0, 0, 5, 2)).tolist() == pytest.approx([0.1])


def test_parts_that_are_not_visible_do_not_count():
    parts = torch.tensor([[[1.0, 1.0, 0.0], [5.0, 1.0, 1.0]]])
    maps = heat((1, 1, 1.0))
    assert loc.part_hits(maps, parts, 3.9).tolist() == [False]
    assert loc.part_hits(maps, parts, 4.0).tolist() == [True]
    assert loc.part_hits(
        maps.expand(2, 10, 10), parts.expand(2, 2, 3), torch.tensor([1.0, 5.0])
    ).tolist() == [
        False,
        True,
    ]
    assert loc.part_hits(maps, parts * torch.tensor([1.0, 1.0, 0.0]), 50.0).tolist() == [False]


def test_box_overlaps_by_hand():
    # A plateau of 1 (2 x 2) lies in a plateau of 0.5 (4 x 4). A second island has 0.7 (1 x 3).
    maps = torch.zeros(1, 12, 12)
    maps[0, 2:6, 2:6] = 0.5
    maps[0, 3:5, 3:5] = 1.0
    maps[0, 9, 8:11] = 0.7
    box = torch.tensor([[3.0, 3.0, 5.0, 5.0]])
    found = loc.box_overlaps(maps, box, thresholds=10)[0]
    assert found[:5].tolist() == [4 / 16] * 5  # 0 <= threshold < 0.5
    assert found[5:].tolist() == [1.0] * 5
    island = torch.tensor([[8.0, 9.0, 11.0, 10.0]])
    assert loc.box_overlaps(maps, island, thresholds=10)[0].tolist() == [1.0] * 7 + [0.0] * 3


def test_diagonal_neighbours_are_one_area():
    maps = heat((2, 2, 1.0), (3, 3, 1.0))
    assert loc.box_overlaps(maps, torch.tensor([[2.0, 2.0, 4.0, 4.0]]), 2)[0].tolist() == [1.0, 1.0]


def test_constant_map_has_no_box():
    assert loc.box_overlaps(torch.ones(1, 5, 5), torch.tensor([[0.0, 0.0, 5.0, 5.0]]), 3).sum() == 0


def test_max_box_acc_v2_by_hand():
    # Different thresholds suit the images. For each delta, the best single threshold counts.
    overlaps = torch.tensor([[0.9, 0.1], [0.2, 0.6], [0.2, 0.35]])
    # delta 0.3: 1/3, 2/3 -> 2/3; 0.5: 1/3, 1/3 -> 1/3; 0.7: 1/3, 0 -> 1/3
    assert loc.max_box_acc_v2(overlaps) == pytest.approx((2 / 3 + 1 / 3 + 1 / 3) / 3)


def test_overlap_agrees_with_torchvision():
    from torchvision.ops import box_iou

    generator = np.random.default_rng(0)
    for _ in range(50):
        corner = generator.integers(0, 6, (2, 2))
        ours, theirs = (np.concatenate([c, c + generator.integers(1, 5, 2)]).astype(float) for c in corner)
        expected = box_iou(torch.tensor(ours[None]), torch.tensor(theirs[None])).item()
        assert loc._overlap(tuple(ours), theirs) == pytest.approx(expected)


def test_centred_map_peaks_in_the_middle():
    maps = loc.centred(2, (9, 15))
    assert maps.shape == (2, 9, 15)
    assert loc.peaks(maps).tolist() == [[7, 4]] * 2
    assert maps[0, 4, 7] == 1


def test_enlarged_keeps_the_place():
    maps = heat((1, 3, 1.0), size=(5, 5))
    assert loc.peaks(loc.enlarged(maps, (50, 50))).float().sub(torch.tensor([15.0, 35.0])).abs().max() <= 1


def test_measures_of_a_data_set_are_means_over_its_images():
    maps = heat((1, 1, 1.0)).expand(2, 10, 10)
    areas = torch.stack([mask(0, 0, 5, 5)[0], mask(5, 5, 10, 10)[0]])
    boxes = torch.tensor([[0.0, 0.0, 5.0, 5.0], [5.0, 5.0, 10.0, 10.0]])
    parts = torch.tensor([[[1.4, 1.0, 1.0]], [[9.0, 9.0, 1.0]]])
    both = loc.measured(maps, Placed(areas, boxes, parts))
    found = loc.summary(
        [{name: rows[:1] for name, rows in both.items()}, {name: rows[1:] for name, rows in both.items()}]
    )
    assert found == loc.summary([both])
    assert found["pointing"] == found["energy"] == found["parts"] == 0.5
    assert found["pointing_15px"] == 1
    assert set(found) == {"pointing", "pointing_15px", "energy", "parts", "max_box_acc_v2"}
    assert set(loc.measured(maps, Placed(areas, None, None))) == {
        "pointing",
        "pointing_15px",
        "energy",
    }


def test_a_tally_over_batches_is_the_summary_of_all():
    maps = torch.rand(5, 4, 4)
    boxes = torch.tensor([[1, 1, 5, 6]] * 5, dtype=torch.float32)
    truth = Placed(boxes_to_masks(boxes, (8, 8)), boxes, None)
    tally = loc.Tally((8, 8), thresholds=4)
    for rows in (slice(0, 3), slice(3, 5)):
        part = Placed(truth.areas[rows], boxes[rows], None)
        tally.add({"a": maps[rows], "b": 1 - maps[rows]}, part)
    whole = {
        name: loc.summary([loc.measured(loc.enlarged(heat, (8, 8)), truth, 4)])
        for name, heat in (("a", maps), ("b", 1 - maps))
    }
    assert tally.means() == {name: pytest.approx(values) for name, values in whole.items()}
    empty = loc.Tally((8, 8), 4)
    empty.add({"a": maps}, Placed(None, None, None))
    assert empty.means() == {}


def test_centred_map_has_a_deviation_of_a_quarter_of_the_side():
    (found,) = loc.centred(1, (5, 9))
    assert found[2, 4] == 1
    assert found[[1, 3], 4].tolist() == pytest.approx([np.exp(-0.5)] * 2)  # of -2, -1, 0, 1, 2
    assert found[2, [2, 6]].tolist() == pytest.approx([np.exp(-0.5)] * 2)


def test_box_overlaps_do_not_depend_on_a_maps_lowest_value():
    maps = heat((1, 1, 1.0), (2, 1, 0.5))
    box = torch.tensor([[1.0, 1.0, 3.0, 2.0]])
    expected = loc.box_overlaps(maps, box, 10)
    assert expected.tolist() == [[1.0] * 5 + [0.5] * 5]
    assert loc.box_overlaps(maps + 8, box, 10).equal(expected)


def test_pointing_game_of_a_data_set_allows_15_pixels():
    areas = mask(20, 0, 21, 1, (40, 40)).expand(2, 40, 40)
    maps = torch.cat([heat((5, 0, 1.0), size=(40, 40)), heat((4, 0, 1.0), size=(40, 40))])
    rows = loc.measured(maps, Placed(areas, None, None))
    assert rows["pointing_15px"].tolist() == [True, False]


def test_parts_of_a_data_set_are_hit_within_a_tenth():
    parts = torch.tensor([[[8.0, 0.0, 1.0]]])
    maps = heat((0, 0, 1.0), size=(40, 80))
    assert loc.measured(maps, Placed(None, None, parts))["parts"].tolist() == [True]  # of the picture
    for side, hit in ((80, True), (79, False)):  # of the box
        box = torch.tensor([[0.0, 0.0, side, 10.0]])
        assert loc.measured(maps, Placed(None, box, parts), 2)["parts"].tolist() == [hit]
