from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ggam_fast.training.data.image_set import ImageFiles, ImageSet, eval_transform, read_image
from ggam_fast.training.data.readers import elpv as elpv_reader
from ggam_fast.training.data.readers import folder, read_images
from ggam_fast.training.data.scan import scan
from ggam_fast.training.errors import TrainError

from .conftest import write_image


@pytest.fixture(scope="module")
def elpv() -> ImageSet:
    return elpv_reader.read(Path(), Path())


def test_elpv_is_the_published_set(elpv):
    assert len(elpv.files) == 2624
    assert all(path.is_file() for path in elpv.files)
    # Counts of (cell type, defect probability) in labels.csv.
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
        (_one_class, "one class"),
        (_empty_class, "empty"),
        (_no_test, "none of test/"),
        (_stranger, "zebra"),
        (_single_image, "one image"),
    ],
)
def test_bad_folder_is_one_line(tmp_path, make, words):
    with pytest.raises(TrainError, match=words) as raised:
        read_images("folder", make(tmp_path), tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_unreadable_image_is_named(photos, content):
    path = photos / "red" / "0.png"
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    with pytest.raises(TrainError, match=r"0\.png") as raised:
        read_image(path)
    assert "\n" not in str(raised.value)


def test_transform_resizes_the_shorter_side_and_crops_the_centre(photos):
    image = read_image(photos / "red" / "0.png")
    tensor = eval_transform(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))(image)
    assert tensor.shape == (3, 32, 32)
    assert tensor.abs().max() <= 1
    assert tensor[0].mean() > tensor[1].mean() + 0.5


def test_flips_come_after_all_plain_images(photos):
    images = folder.read(photos, photos)
    look = eval_transform(32, (0.0,) * 3, (1.0,) * 3)
    files = ImageFiles(images, "train", look, images.flips)
    count = len(images.splits["train"])
    assert len(files) == 2 * count
    plain, label = files[3]
    flipped, same_label = files[count + 3]
    assert label == same_label == int(files.labels[count + 3])
    assert flipped.equal(plain.flip(-1))
    assert not flipped.equal(plain)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_become_eight(tmp_path, mode, suffix):
    if (mode, suffix) == ("I;16B", "png"):
        pytest.skip("PNG has one order of bytes")
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    path = tmp_path / f"ramp.{suffix}"
    Image.frombytes(mode, (16, 16), ramp.astype(">u2" if mode == "I;16B" else "<u2").tobytes()).save(path)
    found = np.asarray(read_image(path))
    assert np.array_equal(found, np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, 2))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_unknown_range_are_refused(tmp_path, photos, mode):
    path = photos / "red" / "deep.tif"
    Image.new(mode, (8, 8), 1).save(path)
    with pytest.raises(TrainError, match="32 bits a pixel"):
        read_image(path)
    images = folder.read(photos, tmp_path)
    problems = [one.problem for one in scan(images, range(len(images.files))) if one.problem]
    assert len(problems) == 1
    assert "32 bits a pixel" in problems[0]


def test_digest_tells_other_splits_and_not_another_place(tmp_path, photos):
    before = folder.read(photos, tmp_path).digest()
    moved = photos.rename(tmp_path / "moved")
    assert folder.read(moved, tmp_path).digest() == before
    (moved / "red" / "3.png").unlink()
    assert folder.read(moved, tmp_path).digest() != before


def test_folders_of_splits_are_not_classes(tmp_path):
    for split in ("Train", "Test"):
        write_image(tmp_path / split / "a" / "0.png", 0, seed=0)
    with pytest.raises(TrainError, match="look like splits"):
        folder.read(tmp_path, tmp_path)


def test_hidden_folders_and_other_files_are_left_out(tmp_path, photos):
    (photos / ".ipynb_checkpoints").mkdir()
    (photos / "red" / "moving.gif").write_bytes(b"GIF")
    images = folder.read(photos, tmp_path)
    assert images.classes == ("blue", "green", "red")
    assert any("of images: 1, such as" in note and "moving.gif" in note for note in images.notes)
