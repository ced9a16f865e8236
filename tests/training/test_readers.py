"""Every reader on a tiny tree in the official layout."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ggam_fast.training.data.annotations import Annotations, box_of
from ggam_fast.training.data.image_set import ImageFiles
from ggam_fast.training.data.readers import READERS, aircraft, birds, read_images
from ggam_fast.training.errors import TrainError

from . import trees


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
    # The root may be the folder itself, and parts may be missing.
    shutil.rmtree(tmp_path / "CUB_200_2011" / "parts")
    assert read_images("cub", tmp_path / "CUB_200_2011", tmp_path).annotations.kinds() == ("boxes",)


def test_cars(tmp_path):
    images = read_images("cars", trees.cars(tmp_path), tmp_path)
    assert images.classes == trees.CLASSES
    assert images.summary() == "12 images (6 train, 6 test), 3 classes"
    assert images.labels.tolist() == [0, 1, 2] * 4
    assert images.annotations.boxes[1].tolist() == [2, 3, 21, 15]
    assert images.files[6].parent.name == "cars_test"


def test_aircraft_without_its_banner(tmp_path):
    images = read_images("aircraft", trees.aircraft(tmp_path), tmp_path)
    assert images.classes == ("Albatross/9", "Bunting/9", "Catbird/9")
    assert images.summary() == "18 images (6 train, 6 val, 6 test), 3 classes"
    assert images.annotations.boxes[0].tolist() == [1, 2, 30, 9]
    image = images.read(0)
    assert image.size == (40, 30 - aircraft.BANNER)
    assert np.asarray(image).max() < 100
    item, _ = ImageFiles(images, "train", lambda image: torch.tensor(image.size))[0]
    assert item.tolist() == [40, 10]


def test_pets_with_masks(tmp_path):
    images = read_images("pets", trees.pets(tmp_path), tmp_path)
    assert images.summary() == "12 images (6 train, 6 test), 3 classes"
    mask = images.annotations.masks(3)
    assert mask.shape == (20, 28)
    assert box_of(mask) == (6, 5, 12, 10)
    assert mask.sum() == 30


def test_flowers(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda *_: True)
    images = read_images("flowers", trees.flowers(tmp_path), tmp_path)
    assert images.summary() == "9 images (3 train, 3 val, 3 test), 3 classes"
    assert images.labels.tolist() == [0, 1, 2] * 3


@pytest.mark.parametrize("name", ["cub", "cars", "aircraft"])
def test_train_and_test_folders_of_class_folders(tmp_path, name):
    for split in ("train", "test"):
        for number, bird in enumerate(trees.CLASSES):
            for index in range(2):
                trees.write_image(tmp_path / split / f"{number:03d}.{bird}" / f"{index}.jpg", number, index)
    images = read_images(name, tmp_path, tmp_path)
    assert images.classes == tuple(f"{number:03d}.{bird}" for number, bird in enumerate(trees.CLASSES))
    assert images.summary() == "12 images (6 train, 6 test), 3 classes"
    assert images.banner == (aircraft.BANNER if name == "aircraft" else 0)


class TestBirds:
    @pytest.fixture
    def images(self, tmp_path, monkeypatch):
        monkeypatch.setattr(birds, "SCENES", {"train": 4, "val": 2, "test": 3})
        return read_images("birds", trees.birds(tmp_path / "root"), tmp_path / "cache")

    def test_counts_classes_and_notes(self, images):
        assert images.classes == ("crow", "duck")
        assert images.summary() == "18 images (8 train, 4 val, 6 test), 2 classes"
        assert "one photograph a class" in images.notes[0]
        assert "GPL-2" in images.notes[1]

    def test_mask_and_box_are_where_the_bird_is(self, images):
        for row in range(len(images.files)):
            pixels = torch.from_numpy(np.array(images.read(row))).int()
            mask = images.annotations.masks(row)
            assert pixels.shape == (birds.SIZE, birds.SIZE, 3)
            red = (pixels[..., 0] > 128) & (pixels[..., 2] < 100)
            assert (red & mask).sum() > 0.95 * mask.sum()
            assert (red & mask).sum() > 0.95 * red.sum()
            assert tuple(images.annotations.boxes[row].tolist()) == box_of(mask)
            height, width = mask.any(1).sum(), mask.any(0).sum()
            assert 0.3 * birds.SIZE < max(height, width) < 0.85 * birds.SIZE

    def test_no_background_is_in_two_splits(self, images):
        colours = {
            split: {int(np.array(images.read(row))[0, 0, 1]) // 20 for row in part.tolist()}
            for split, part in images.splits.items()
        }
        names = [set(names) for names in birds.SPLIT_OF_BACKGROUND.values()]
        assert len(set.union(*names)) == sum(map(len, names))
        assert colours["train"]

    def test_same_bits_again_and_none_twice(self, images, tmp_path):
        again = read_images("birds", tmp_path / "root", tmp_path / "other")
        bits = [path.read_bytes() for path in images.files]
        assert bits == [path.read_bytes() for path in again.files]
        assert len(set(bits)) == len(bits)

    def test_what_was_interrupted_is_not_used(self, tmp_path, monkeypatch):
        monkeypatch.setattr(birds, "SCENES", {"train": 2, "val": 1, "test": 1})
        root, cache = trees.birds(tmp_path / "root"), tmp_path / "cache"
        compose, calls = birds.compose, []

        def interrupted(*arguments):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return compose(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(birds, "compose", interrupted)
            with pytest.raises(KeyboardInterrupt):
                read_images("birds", root, cache)
        assert list(cache.iterdir()) == []
        assert len(read_images("birds", root, cache).files) == 8

    def test_missing_packages_are_named(self, tmp_path):
        with pytest.raises(TrainError, match="tuxpaint-stamps-default"):
            read_images("birds", tmp_path, tmp_path)
        root = trees.birds(tmp_path / "root")
        (root / birds.BACKGROUNDS / "Storm.jpg").unlink()
        with pytest.raises(TrainError, match=r"Storm\.jpg .* mate-backgrounds"):
            read_images("birds", root, tmp_path)


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
        (_cut("train_test_split.txt", "99 1"), r"train_test_split\.txt is not about the images"),
        (_cut("bounding_boxes.txt", "12 1.0 2.0"), "expected 5 numbers"),
        (_cut("bounding_boxes.txt", "12 1.0 2.0 x 4.0"), "expected 5 numbers"),
        (_cut("parts/part_locs.txt", "12 1 1.0 2.0"), "expected 5 numbers"),
        (_cut("image_class_labels.txt", "12 two"), "class two"),
        (_cut("parts/part_locs.txt", "12 9 1.0 2.0 1"), "no such image or part"),
        (_cut("image_class_labels.txt", "12 77"), "class 77"),
    ],
)
def test_broken_cub_is_one_line(tmp_path, spoil, words):
    root = trees.cub(tmp_path)
    spoil(root / "CUB_200_2011")
    with pytest.raises(TrainError, match=words) as raised:
        read_images("cub", root, tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", [name for name in READERS if name != "elpv"])
def test_empty_and_missing_roots_are_one_line(tmp_path, name):
    (tmp_path / "empty").mkdir()
    for root, words in (
        (None, "needs --root"),
        (tmp_path / "no", "is not a folder"),
        (tmp_path / "empty", "."),
    ):
        with pytest.raises(TrainError, match=words) as raised:
            read_images(name, root, tmp_path)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["cars", "aircraft", "pets"])
def test_damaged_files_of_other_sets_are_one_line(tmp_path, name):
    root = getattr(trees, name)(tmp_path)
    for path in [*root.rglob("*annos*.mat"), *root.rglob("images_box.txt"), *root.rglob("trainval.txt")]:
        path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(TrainError) as raised:
        read_images(name, root, tmp_path)
    assert "\n" not in str(raised.value)


def test_annotations_of_some_rows():
    found = Annotations(
        boxes=torch.arange(12.0).view(3, 4), masks=lambda row: torch.full((2, 2), row == 2)
    ).of([2, 0])
    assert found.boxes.tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert found.masks(0).all()
    assert not found.masks(1).any()
    assert box_of(torch.zeros(3, 3, dtype=torch.bool)) == (0, 0, 0, 0)
