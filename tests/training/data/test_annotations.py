"""Annotations of some rows, and the box around a mask."""

import torch

from ggam_fast.training.data.annotations import Annotations, box_of


def test_annotations_of_some_rows():
    found = Annotations(
        boxes=torch.arange(12.0).view(3, 4), masks=lambda row: torch.full((2, 2), row == 2)
    ).of([2, 0])
    assert found.boxes.tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert found.masks(0).all()
    assert not found.masks(1).any()
    assert box_of(torch.zeros(3, 3, dtype=torch.bool)) == (0, 0, 0, 0)
