"""Pets and flowers on tiny trees in the official layouts."""

from ggam_fast.training.data.annotations import box_of
from ggam_fast.training.data.readers import read_images
from tests.training import trees


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
