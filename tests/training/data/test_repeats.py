"""A file in two splits is refused, and copies of one content in two splits are counted."""

import os
import shutil

import pytest

from ggam_fast.training.data.readers import READERS, read_images
from ggam_fast.training.data.repeats import copies, warn_of_same_content
from ggam_fast.training.errors import TrainError
from tests.training import trees
from tests.training.conftest import write_image


@pytest.fixture
def parted(tmp_path):
    """Two classes in train/ and test/, two images each."""
    for number, split in enumerate(("train", "test")):
        for colour, name in enumerate("ab"):
            for index in range(2):
                write_image(
                    tmp_path / split / name / f"{index}.png", colour, 10 * number + 2 * colour + index
                )
    return tmp_path


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_file_in_two_splits_is_refused(parted, link):
    link(parted / "train" / "a" / "0.png", parted / "test" / "a" / "again.png")
    with pytest.raises(TrainError, match=r"test/a/again\.png are one file, which is in the train split"):
        read_images("folder", parted, parted)


def test_a_folder_in_two_splits_is_refused(parted):
    shutil.rmtree(parted / "test")
    (parted / "test").symlink_to("train")
    with pytest.raises(TrainError, match="are one file, which is in the train split and in the test split"):
        read_images("folder", parted, parted)


@pytest.mark.parametrize("name", ["cub", "pets", "aircraft"])
def test_readers_of_lists_refuse_it_too(tmp_path, name):
    root = getattr(trees, name)(tmp_path)
    images = READERS[name].read(root, tmp_path)
    train, test = (images.files[int(images.splits[split][0])] for split in ("train", "test"))
    test.unlink()
    test.symlink_to(train)
    with pytest.raises(TrainError, match="are one file"):
        read_images(name, root, tmp_path)


def test_copies_in_two_splits_and_two_classes_are_counted(parted, caplog):
    shutil.copy(parted / "train" / "a" / "0.png", parted / "test" / "a" / "2.png")
    shutil.copy(parted / "train" / "a" / "1.png", parted / "train" / "b" / "2.png")
    images = read_images("folder", parted, parted)
    [rows] = copies(images).across_splits
    assert [images.files[row].relative_to(parted).as_posix() for row in rows] == [
        "train/a/0.png",
        "test/a/2.png",
    ]
    warn_of_same_content(images)
    first, second = caplog.messages
    assert first.startswith("images of the same content in several splits: 1, such as ")
    assert second.startswith("images of the same content in several classes: 1, such as ")
