"""The composed birds: masks are exact, and no background is in two splits."""

import numpy as np
import pytest
import torch
from PIL import Image

from ggam_fast.training.data.annotations import box_of
from ggam_fast.training.data.readers import birds, read_images
from ggam_fast.training.errors import TrainError
from tests.training import trees


class TestBirds:
    @pytest.fixture
    def images(self, tmp_path, monkeypatch):
        monkeypatch.setattr(birds, "SCENES", {"train": 4, "val": 2, "test": 3})
        return read_images("birds", trees.birds(tmp_path / "root"), tmp_path / "cache")

    def test_counts_classes_and_notes(self, images):
        assert images.classes == ("crow", "duck")
        assert images.summary() == "18 images (8 train, 4 val, 6 test), 2 classes"
        assert "each class is one photograph" in images.notes[0]
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

    def test_files_of_an_archive_are_no_birds(self, tmp_path, images):
        root = tmp_path / "root"
        (root / birds.STAMPS / "._crow.png").write_bytes(b"resource fork")
        assert read_images("birds", root, tmp_path / "cache").classes == images.classes

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

    def test_damaged_scenes_are_composed_again(self, tmp_path, images, caplog):
        before = images.files[3].read_bytes()
        images.files[3].write_bytes(before[:-100] + bytes(100))
        assert read_images("birds", tmp_path / "root", tmp_path / "cache").files == images.files
        assert images.files[3].read_bytes() == before
        [message] = caplog.messages
        assert "are damaged and will be made again" in message

    def test_missing_packages_are_named(self, tmp_path):
        with pytest.raises(TrainError, match="tuxpaint-stamps-default"):
            read_images("birds", tmp_path, tmp_path)
        root = trees.birds(tmp_path / "root")
        (root / birds.BACKGROUNDS / "Storm.jpg").unlink()
        with pytest.raises(TrainError, match=r"Storm\.jpg .* mate-backgrounds"):
            read_images("birds", root, tmp_path)

    def test_wallpapers_are_backgrounds_of_another_kind(self, images, tmp_path):
        root = tmp_path / "root"
        with pytest.raises(TrainError, match=r"no abstract/Elephants\.jpg in usr/share/backgrounds/mate;"):
            birds.read_on_wallpapers(root, tmp_path / "cache")
        for number, name in enumerate(birds.WALLPAPERS):
            path = root / birds.BACKGROUNDS.parent / name
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (400, 300), (0, 200 + number, 250)).save(path)
        found = birds.read_on_wallpapers(root, tmp_path / "cache")
        assert found.classes == images.classes
        assert set(found.splits) == {"test"}
        assert len(found.files) == len(images.splits["test"])
        assert not set(found.files) & set(images.files)
        pixel = np.array(found.read(0))[0, 0].astype(int)
        assert pixel[2] > 180  # the wallpapers' blue, which no photograph here has
        assert found.annotations.masks(0).any()
