"""Stanford Cars on a tiny tree in the official layout."""

from ggam_fast.training.data.readers import read_images
from tests.training import trees


def test_cars(tmp_path):
    images = read_images("cars", trees.cars(tmp_path), tmp_path)
    assert images.classes == trees.CLASSES
    assert images.summary() == "12 images (6 train, 6 test), 3 classes"
    assert images.labels.tolist() == [0, 1, 2] * 4
    assert images.annotations.boxes[1].tolist() == [2, 3, 21, 15]
    assert images.files[6].parent.name == "cars_test"
