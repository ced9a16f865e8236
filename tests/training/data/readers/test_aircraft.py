"""FGVC-Aircraft on a tiny tree in the official layout."""

import numpy as np
import torch

from ggam_fast.training.data.image_set import ImageFiles
from ggam_fast.training.data.readers import aircraft, read_images
from tests.training import trees


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
