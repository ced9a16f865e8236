"""Drawn splits have a share of every class, keep groups whole, and are the same in every run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ggam_fast.training.data.readers import read_images
from ggam_fast.training.data.splitting import drawn_test, with_validation
from ggam_fast.training.errors import TrainError


def files(count):
    return tuple(Path(f"images/{row}.png") for row in range(count))


def names(images, split):
    return {images.files[row] for row in images.splits[split].tolist()}


def test_a_fifth_of_every_class_is_for_testing():
    labels = torch.tensor([0] * 20 + [1] * 10 + [2] * 3)
    splits = drawn_test(files(33), labels)
    assert torch.bincount(labels[splits["test"]]).tolist() == [4, 2, 1]
    assert sorted(torch.cat([splits["train"], splits["test"]]).tolist()) == list(range(33))
    assert splits["test"].equal(drawn_test(files(33), labels)["test"])
    with pytest.raises(TrainError, match="images must hold two or more images"):
        drawn_test(files(34), torch.cat([labels, torch.tensor([3])]))


def test_groups_stay_whole_and_every_class_has_its_share():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (400,), generator=generator)
    # 80 groups of different sizes; most have images of one class, some of several.
    group_of_row = (torch.arange(400) // 5 + 80 * (torch.arange(400) % 7 == 0)).tolist()
    groups = {path: str(group) for path, group in zip(files(400), group_of_row, strict=True)}
    splits = drawn_test(files(400), labels, groups)
    inside = {split: {group_of_row[row] for row in rows.tolist()} for split, rows in splits.items()}
    assert not inside["train"] & inside["test"]
    shares = torch.bincount(labels[splits["test"]]) / torch.bincount(labels)
    assert shares.min() > 0.15
    assert shares.max() < 0.25


def test_a_class_in_one_group_is_for_training():
    labels = torch.tensor([0] * 8 + [1] * 8)
    groups = {path: "all of 0" if row < 8 else str(row) for row, path in enumerate(files(16))}
    splits = drawn_test(files(16), labels, groups)
    assert set(labels[splits["test"]].tolist()) == {1}
    assert set(range(8)) <= set(splits["train"].tolist())


def test_validation_is_a_share_of_the_training_images(photos, tmp_path):
    plain = read_images("folder", photos, tmp_path)
    images = read_images("folder", photos, tmp_path, val_fraction=0.25)
    assert names(images, "test") == names(plain, "test")
    assert names(images, "train") | names(images, "val") == names(plain, "train")
    assert torch.bincount(images.labels[images.splits["val"]]).tolist() == [2, 2, 2]  # of 8 each
    assert images.digest() == read_images("folder", photos, tmp_path, val_fraction=0.25).digest()
    assert images.digest() != plain.digest()
    assert any("25 % of the training images" in note for note in images.notes)


def test_fixed_test_images_stay_when_some_are_left_out(photos, tmp_path):
    plain = replace(read_images("folder", photos, tmp_path), draw=None)
    images = with_validation(plain, 0.5)
    gone = [int(images.splits[split][0]) for split in ("train", "val", "test")]
    rest = images.without(gone)
    assert names(rest, "test") == names(plain, "test") - {images.files[row] for row in gone}
    assert len(rest.splits["val"]) == 11  # half of 22, rounded down in each class


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (1.0, "--val-fraction must be 0 or more and below 1; got 1.0"),
        (-0.1, "--val-fraction must be 0 or more"),
    ],
)
def test_shares_out_of_range(photos, tmp_path, share, words):
    with pytest.raises(TrainError, match=words):
        read_images("folder", photos, tmp_path, val_fraction=share)


def test_what_cannot_have_a_validation_split(photos, tmp_path):
    with pytest.raises(TrainError, match=r"is for data without a validation split; elpv has one of 600"):
        read_images("elpv", None, tmp_path, val_fraction=0.1)
    images = read_images("folder", photos, tmp_path)
    groups = dict.fromkeys(images.files, "one")
    with pytest.raises(TrainError, match="leaves no image for validation"):
        with_validation(images, 0.1, groups)
