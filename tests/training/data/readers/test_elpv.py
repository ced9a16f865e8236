"""elpv is the published set, in splits that share no block."""

from pathlib import Path

import pytest
import torch

from ggam_fast.training.data.image_set import ImageSet
from ggam_fast.training.data.readers import elpv as elpv_reader


@pytest.fixture(scope="module")
def elpv() -> ImageSet:
    return elpv_reader.read(Path(), Path())


def test_elpv_is_the_published_set(elpv):
    assert len(elpv.files) == 2624
    assert all(path.is_file() for path in elpv.files)
    # These are the counts of (cell type, defect probability) in labels.csv.
    assert torch.bincount(elpv.labels).tolist() == [588, 117, 56, 313, 920, 178, 50, 402]
    assert elpv.classes[0] == "mono 0 %"
    assert elpv.classes[7] == "poly 100 %"
    assert any("CC BY-NC-SA 4.0" in note for note in elpv.notes)


def test_elpv_splits_share_no_block_and_leave_nothing_out(elpv):
    blocks = {name: set((rows // elpv_reader.BLOCK).tolist()) for name, rows in elpv.splits.items()}
    assert not blocks["train"] & blocks["test"]
    assert not blocks["train"] & blocks["val"]
    assert not blocks["val"] & blocks["test"]
    rows = torch.cat(list(elpv.splits.values()))
    assert rows.sort().values.equal(torch.arange(2624))


def test_elpv_splits_have_every_class_in_similar_shares(elpv):
    whole = torch.bincount(elpv.labels, minlength=8) / len(elpv.labels)
    for rows in elpv.splits.values():
        counts = torch.bincount(elpv.labels[rows], minlength=8)
        assert counts.min() >= 8
        assert (counts / len(rows) / whole).log().abs().max() < 0.5


def test_elpv_splits_are_the_same_every_time(elpv):
    again = elpv_reader.read(Path(), Path())
    assert all(rows.equal(again.splits[name]) for name, rows in elpv.splits.items())
