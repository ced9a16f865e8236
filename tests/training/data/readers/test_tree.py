"""Every image below a class folder is found once, and what is left out is counted."""

import os
from pathlib import Path

import pytest

from ggam_fast.training.data.readers import tree
from ggam_fast.training.data.readers.tree import LeftOut, images_below, images_of_classes, is_hidden, split_of
from ggam_fast.training.errors import TrainError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def found(root: Path) -> tuple[dict[str, list[str]], list[str]]:
    left_out = LeftOut()
    images = images_of_classes(root, left_out)
    return {name: [str(path.relative_to(root)) for path in paths] for name, paths in images.items()}, [
        note.removeprefix("left out ").split(", such as")[0] for note in left_out.notes()
    ]


def test_hidden_and_system_names_are_left_out_and_counted(tmp_path):
    touch(tmp_path, "cat/0.png", "cat/old/1.JPG", "dog/0.png")
    hidden = ("cat/.ipynb_checkpoints/0.png", "cat/@eaDir/0.png", "dog/old/.thumbnails/0.png", "cat/._0.png")
    touch(tmp_path, *hidden, "__MACOSX/cat/0.png", ".cache/0.png", "dog/Thumbs.db")
    images, notes = found(tmp_path)
    assert images == {"cat": ["cat/0.png", "cat/old/1.JPG"], "dog": ["dog/0.png"]}
    assert notes == ["hidden or system files and folders: 7"]
    assert not is_hidden("MACOSX")


def test_types_that_are_not_read_and_other_files_are_counted(tmp_path):
    touch(
        tmp_path, "cat/0.png", "cat/a.gif", "cat/b.GIF", "dog/c.heic", "dog/notes.txt", "dog/0.png", "x.png"
    )
    images, notes = found(tmp_path)
    assert images == {"cat": ["cat/0.png"], "dog": ["dog/0.png"]}
    assert notes == [
        "files whose names are not those of images: 1",
        "images beside the class folders: 1",
        "images of types that are not read: 3 (2 .gif, 1 .heic)",
    ]


def test_a_circle_of_links_reads_no_image_twice(tmp_path):
    touch(tmp_path, "cat/0.png", "cat/1.png", "dog/0.png", "dog/deep/1.png")
    (tmp_path / "cat" / "up").symlink_to(tmp_path)
    (tmp_path / "cat" / "other").symlink_to(tmp_path / "dog")
    (tmp_path / "dog" / "deep" / "here").symlink_to(".")
    (tmp_path / "cat" / "again.png").symlink_to("0.png")
    (tmp_path / "zoo").symlink_to("..")
    images, notes = found(tmp_path)
    assert images == {"cat": ["cat/0.png", "cat/1.png"], "dog": ["dog/0.png", "dog/deep/1.png"]}
    assert notes == ["links to what is read already, or to a folder above them: 5"]


def test_links_to_themselves_and_links_to_links(tmp_path):
    touch(tmp_path, "root/cat/0.png", "root/dog/0.png", "store/a/1.png", "store/2.png")
    (tmp_path / "root" / "cat" / "self").symlink_to("self")
    (tmp_path / "root" / "cat" / "self.png").symlink_to("self.png")  # refused when it is read
    (tmp_path / "root" / "cat" / "inner").symlink_to(tmp_path / "store" / "a")
    (tmp_path / "root" / "cat" / "outer").symlink_to(tmp_path / "store")
    images, notes = found(tmp_path / "root")
    assert images["cat"] == ["cat/0.png", "cat/self.png", "cat/inner/1.png", "cat/outer/2.png"]
    assert notes == [
        "files whose names are not those of images: 1",
        "links to what is read already, or to a folder above them: 1",
    ]
    (tmp_path / "root" / "dog" / "outer").symlink_to(tmp_path / "store")
    (tmp_path / "root" / "cat" / "outer").unlink()
    with pytest.raises(TrainError, match=r"store/a|outer/a are one folder, so it would have two classes"):
        found(tmp_path / "root")


def test_images_below_one_folder_follow_the_same_rule(tmp_path):
    touch(tmp_path, "b/1.png", "0.png", ".hidden/2.png", "b/._1.png", "b/notes.txt")
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    left_out = LeftOut()
    images = images_below(tmp_path, left_out)
    assert [str(path.relative_to(tmp_path)) for path in images] == ["0.png", "b/1.png"]
    assert len(left_out.notes()) == 3


def test_a_link_to_a_folder_above_the_root_is_not_followed(tmp_path):
    """Otherwise the test images beside train/ would be trained on."""
    touch(tmp_path, "train/cat/0.png", "train/dog/0.png", "test/cat/1.png")
    (tmp_path / "train" / "cat" / "all").symlink_to(tmp_path)
    images, notes = found(tmp_path / "train")
    assert images == {"cat": ["cat/0.png"], "dog": ["dog/0.png"]}
    assert notes == ["links to what is read already, or to a folder above them: 1"]


def test_links_to_other_places_are_followed(tmp_path):
    touch(tmp_path, "store/0.png", "store/more/1.png", "root/dog/0.png")
    (tmp_path / "root" / "cat").symlink_to(tmp_path / "store")
    (tmp_path / "root" / "dog" / "1.png").symlink_to(tmp_path / "nowhere.png")  # refused when it is read
    images, notes = found(tmp_path / "root")
    assert images == {"cat": ["cat/0.png", "cat/more/1.png"], "dog": ["dog/0.png", "dog/1.png"]}
    assert notes == []


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_one_file_with_two_classes_is_refused(tmp_path, link):
    touch(tmp_path, "cat/0.png", "dog/0.png")
    link(tmp_path / "cat" / "0.png", tmp_path / "dog" / "1.png")
    with pytest.raises(TrainError, match=r"cat/0\.png and \S*dog/1\.png are one file"):
        found(tmp_path)


def test_one_folder_with_two_classes_is_refused(tmp_path):
    touch(tmp_path, "cat/0.png")
    (tmp_path / "dog").symlink_to("cat")
    with pytest.raises(TrainError, match=r"cat and \S*dog are one folder"):
        found(tmp_path)


def test_folders_that_cannot_be_opened_are_counted(tmp_path, monkeypatch):
    touch(tmp_path, "cat/0.png", "cat/locked/1.png", "dog/0.png")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(tree.os, "scandir", refuse)
    images, notes = found(tmp_path)
    assert images["cat"] == ["cat/0.png"]
    assert notes == ["folders that cannot be opened: 1"]


def test_order_does_not_depend_on_links(tmp_path):
    """Images are in the order of their folders, then of their names, so splits drawn from them stay."""
    touch(tmp_path, "cat/b/0.png", "cat/a/1.png", "cat/z.png", "dog/0.png")
    assert found(tmp_path)[0]["cat"] == ["cat/z.png", "cat/a/1.png", "cat/b/0.png"]


@pytest.mark.parametrize(
    "names",
    [
        ("part1/cat/0.png", "part1/dog/0.png", "part2/cat/1.png", "part2/dog/1.png"),
        ("birds/train/0.png", "fish/train/0.png"),
        ("archive/train/cat/0.png", "archive/test/cat/0.png"),
    ],
)
def test_one_level_too_high_is_refused(tmp_path, names):
    touch(tmp_path, *names)
    with pytest.raises(TrainError, match=r"--root must (be|hold)"):
        found(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("cat/images/0.png", "dog/images/0.png"),
        ("cat/day1/0.png", "cat/day2/0.png", "dog/day1/0.png"),
        ("cat/day1/0.png", "cat/day2/0.png", "cat/0.png", "dog/day1/0.png", "dog/day2/0.png"),
    ],
)
def test_class_folders_may_hold_folders(tmp_path, names):
    touch(tmp_path, *names)
    assert found(tmp_path)[0].keys() == {"cat", "dog"}


def test_usual_names_of_splits():
    assert [split_of(name) for name in ("Train", "TRAINING", "training_set", "train")] == ["train"] * 4
    assert [split_of(name) for name in ("test", "Testing", "Test-Set")] == ["test"] * 3
    assert [split_of(name) for name in ("val", "valid", "Validation")] == ["val"] * 3
    assert [split_of(name) for name in ("trains", "invalid", "set", "")] == [None] * 4
