"""Class folders with and without splits."""

from pathlib import Path

import pytest
import torch

from ggam_fast.training.data.readers import folder, read_images
from ggam_fast.training.errors import TrainError
from tests.training.conftest import write_image


def test_plain_folder_is_split_within_every_class(photos):
    images = folder.read(photos, photos)
    assert images.classes == ("blue", "green", "red")
    assert torch.bincount(images.labels[images.splits["test"]]).tolist() == [2, 2, 2]
    assert torch.bincount(images.labels[images.splits["train"]]).tolist() == [8, 8, 8]
    again = folder.read(photos, photos)
    assert images.splits["test"].equal(again.splits["test"])
    assert any("held out at random" in note for note in images.notes)


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (("train", "test"), {"train", "test"}),
        (("train", "val"), {"train", "test"}),
        (("train", "valid", "test"), {"train", "val", "test"}),
        (("Training", "TESTING"), {"train", "test"}),
        (("training_set", "Validation", "test_set"), {"train", "val", "test"}),
    ],
)
def test_folder_with_splits_keeps_them(tmp_path, folders, splits):
    for number, part in enumerate(folders):
        for colour, name in enumerate("ab"):
            for index in range(2 + number):
                write_image(tmp_path / part / name / f"{index}.png", colour, index)
    images = folder.read(tmp_path, tmp_path)
    assert set(images.splits) == splits
    for rows in images.splits.values():
        parents = {images.files[row].parents[1].name for row in rows}
        assert len(parents) == 1
        for row in rows:
            assert images.classes[images.labels[row]] == images.files[row].parent.name
    assert len(images.splits["train"]) == 4


def test_labels_follow_names_where_a_split_lacks_a_class(tmp_path):
    for name in "abc":
        for index in range(2):
            write_image(tmp_path / "train" / name / f"{index}.png", 0, index)
    write_image(tmp_path / "test" / "c" / "0.png", 0, 0)
    images = folder.read(tmp_path, tmp_path)
    assert images.labels[images.splits["test"]].tolist() == [2]


def _one_class(root: Path) -> Path:
    for index in range(3):
        write_image(root / "only" / f"{index}.png", 0, index)
    return root


def _empty_class(root: Path) -> Path:
    _one_class(root)
    (root / "empty").mkdir()
    return root


def _no_test(root: Path) -> Path:
    _one_class(root / "train")
    return root


def _stranger(root: Path) -> Path:
    for name in "ab":
        write_image(root / "train" / name / "0.png", 0, 0)
    write_image(root / "test" / "zebra" / "0.png", 0, 0)
    return root


def _single_image(root: Path) -> Path:
    _one_class(root)
    write_image(root / "lonely" / "0.png", 0, 0)
    return root


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: root / "missing", "is not a folder"),
        (lambda root: None, "--root"),
        (_one_class, "two or more classes"),
        (_empty_class, "empty"),
        (_no_test, "must have one of test/"),
        (_stranger, "zebra"),
        (_single_image, "must hold two or more images"),
    ],
)
def test_bad_folder_is_one_line(tmp_path, make, words):
    with pytest.raises(TrainError, match=words) as raised:
        read_images("folder", make(tmp_path), tmp_path)
    assert "\n" not in str(raised.value)


def test_folders_of_splits_are_not_classes(tmp_path):
    for split in ("Val", "Test"):
        write_image(tmp_path / split / "0.png", 0, seed=0)
    with pytest.raises(TrainError, match="look like splits"):
        folder.read(tmp_path, tmp_path)


def test_hidden_folders_and_other_files_are_left_out(tmp_path, photos):
    (photos / ".ipynb_checkpoints").mkdir()
    (photos / "red" / "moving.gif").write_bytes(b"GIF")
    images = folder.read(photos, tmp_path)
    assert images.classes == ("blue", "green", "red")
    assert any(": 1 (1 .gif), such as" in note and "moving.gif" in note for note in images.notes)


def test_two_folders_of_one_split_are_refused(tmp_path):
    for split in ("train", "Training", "test"):
        write_image(tmp_path / split / "a" / "0.png", 0, seed=0)
    with pytest.raises(TrainError, match="Training/ and train/"):
        folder.read(tmp_path, tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    for name in ("car", "train"):
        for index in range(2):
            write_image(tmp_path / name / f"{index}.png", 0, index)
    assert folder.read(tmp_path, tmp_path).classes == ("car", "train")


def test_splits_are_drawn_from_the_images_that_are_left(photos, tmp_path):
    """A fifth of what can be read is held out, not what is left of a fifth of everything."""
    images = folder.read(photos, tmp_path)
    gone = [row for row in images.splits["test"].tolist() if images.files[row].parent.name == "red"]
    assert len(gone) == 2
    rest = images.without(gone)
    assert torch.bincount(rest.labels[rest.splits["test"]]).tolist() == [2, 2, 1]
    assert not set(rest.splits["test"].tolist()) & set(rest.splits["train"].tolist())
    red = [row for row, path in enumerate(images.files) if path.parent.name == "red"]
    with pytest.raises(TrainError, match=r"red must hold two .* it holds one that can be read"):
        images.without(red[1:])
