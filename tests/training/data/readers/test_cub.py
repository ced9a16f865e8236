"""CUB-200-2011 on a tiny tree in the official layout."""

import shutil
from pathlib import Path

import pytest

from ggam_fast.training.data.readers import read_images
from ggam_fast.training.errors import TrainError
from tests.training import trees


def rows(images, split):
    return [images.files[row].name for row in images.splits[split].tolist()]


def test_cub(tmp_path):
    images = read_images("cub", trees.cub(tmp_path), tmp_path)
    assert images.classes == ("001.Albatross", "002.Bunting", "003.Catbird")
    assert images.summary() == "12 images (6 train, 6 test), 3 classes"
    assert rows(images, "train")[:2] == ["Albatross_0000_1.jpg", "Albatross_0002_3.jpg"]
    assert images.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    found = images.annotations
    assert found.kinds() == ("boxes", "parts")
    assert found.boxes[1].tolist() == [1, 2, 12, 10]
    assert found.part_names == ("beak", "left eye")
    assert found.parts[5].tolist() == [[5, 6.5, 1], [0, 0, 0]]
    assert images.read(0).size == (28, 20)
    # --root may be the folder itself, and parts may be missing.
    shutil.rmtree(tmp_path / "CUB_200_2011" / "parts")
    assert read_images("cub", tmp_path / "CUB_200_2011", tmp_path).annotations.kinds() == ("boxes",)


def _cut(path: str, line: str):
    def spoil(base: Path) -> None:
        text = (base / path).read_text().splitlines()
        (base / path).write_text("\n".join([*text[:-1], line]) + "\n")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda base: (base / "images.txt").unlink(), r"images\.txt not found"),
        (_cut("images.txt", "twelve x.jpg"), "expected a number and a text"),
        (_cut("train_test_split.txt", "99 1"), r"train_test_split\.txt must have a line for each image"),
        (_cut("bounding_boxes.txt", "12 1.0 2.0"), "expected 5 numbers"),
        (_cut("bounding_boxes.txt", "12 1.0 2.0 x 4.0"), "expected 5 numbers"),
        (_cut("parts/part_locs.txt", "12 1 1.0 2.0"), "expected 5 numbers"),
        (_cut("image_class_labels.txt", "12 two"), "class two"),
        (_cut("parts/part_locs.txt", "12 9 1.0 2.0 1"), "unknown image or part"),
        (_cut("image_class_labels.txt", "12 77"), "class 77"),
    ],
)
def test_broken_cub_is_one_line(tmp_path, spoil, words):
    root = trees.cub(tmp_path)
    spoil(root / "CUB_200_2011")
    with pytest.raises(TrainError, match=words) as raised:
        read_images("cub", root, tmp_path)
    assert "\n" not in str(raised.value)


def test_byte_order_marks_and_tabs_are_read(tmp_path):
    root = trees.cub(tmp_path)
    before = read_images("cub", root, tmp_path)
    for path in (root / "CUB_200_2011").rglob("*.txt"):
        path.write_bytes("\ufeff".encode() + path.read_bytes().replace(b" ", b"\t").replace(b"\n", b"\r\n"))
    after = read_images("cub", root, tmp_path)
    assert (after.files, after.classes) == (before.files, before.classes)
    assert after.annotations.boxes.equal(before.annotations.boxes)
