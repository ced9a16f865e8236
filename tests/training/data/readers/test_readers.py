"""What all readers have in common."""

import pytest

from ggam_fast.training.data.readers import READERS, aircraft, read_images
from ggam_fast.training.errors import TrainError
from tests.training import trees


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
