"""Files that are not images are found, counted and named."""

import logging

import pytest

from ggam_fast.training.cli import main
from ggam_fast.training.errors import TrainError
from tests.training.conftest import TINY


@pytest.fixture
def spoiled(photos):
    """Three of thirty files are not images: one is truncated, one is text, one is empty."""
    whole = (photos / "red" / "1.png").read_bytes()
    (photos / "red" / "1.png").write_bytes(whole[:200])
    (photos / "green" / "2.png").write_bytes(b"text")
    (photos / "blue" / "3.png").write_bytes(b"")
    return photos


@pytest.mark.parametrize("finetune", [(), ("--finetune",)])
def test_bad_images_are_counted_and_named(spoiled, tmp_path, capsys, finetune):
    options = ("--data", "folder", "--root", str(spoiled), "--no-compile", "--out", str(tmp_path / "out"))
    options = ("train", *options, "--cache-dir", str(tmp_path / "cache"), *TINY, *finetune)
    assert main(options) == 2
    error = capsys.readouterr().err
    assert "cannot read 3 images" in error
    assert all(name in error for name in ("red/1.png", "green/2.png", "blue/3.png", "--skip-bad-images"))
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert main([*options, "--skip-bad-images"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "left out 3 images that cannot be read" in shown
    assert (tmp_path / "out" / "metrics.json").is_file()


def test_images_smaller_than_the_crop(photos, tmp_path, capsys):
    options = [option for option in TINY if option != "--enlarge"]
    options = ["train", "--data", "folder", "--root", str(photos), "--out", str(tmp_path / "out"), *options]
    assert main([*options, "--cache-dir", str(tmp_path / "cache")]) == 2
    error = capsys.readouterr().err
    assert "30 images smaller than the crop of 64 x 64" in error
    assert "(28 x 20)" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_file_that_is_gone(photos, tmp_path, capsys, monkeypatch):
    from ggam_fast.training.data.readers import read_images

    images = read_images("folder", photos, tmp_path)
    (photos / "red" / "1.png").unlink()
    monkeypatch.setattr("ggam_fast.training.run.train.load_images", lambda config: images)
    options = ("train", "--data", "folder", "--root", str(photos), *TINY, "--no-compile")
    assert main([*options, "--out", str(tmp_path / "out"), "--cache-dir", str(tmp_path)]) == 2
    assert "1.png" in capsys.readouterr().err


def test_scanning_says_what_is_wrong_and_how_large_the_rest_is(spoiled, tmp_path, caplog):
    from ggam_fast.training.data.readers import read_images
    from ggam_fast.training.data.scan import readable, scan

    images, seen = read_images("folder", spoiled, tmp_path), []
    found = scan(images, range(len(images.files)), lambda: seen.append(1))
    assert len(seen) == len(found) == 30
    assert {images.files[one.row].name for one in found if one.problem} == {"1.png", "2.png", "3.png"}
    assert {one.size for one in found if one.problem is None} == {(28, 20)}
    with caplog.at_level(logging.INFO, "ggam_fast.training"):
        rest = readable(images, 20, skip_bad=True, enlarge=False)
    assert len(rest.files) == 27
    (note,) = caplog.messages
    assert note.startswith("left out 3 images that cannot be read: ")
    assert note.endswith("; left: 27 images (24 train, 3 test), 3 classes")
    with pytest.raises(TrainError, match=r"smaller than the crop of 21 x 21, such as \S+ \(28 x 20\)"):
        readable(rest, 21, skip_bad=True, enlarge=False)


def test_splits_are_made_after_bad_files_are_out(spoiled, tmp_path):
    """Twenty of thirty files are bad. Otherwise the test split could be left with almost nothing."""
    from ggam_fast.training.data.readers import read_images
    from ggam_fast.training.data.scan import readable

    images = read_images("folder", spoiled, tmp_path)
    for row in images.splits["test"].tolist():
        images.files[row].write_bytes(b"text")
    rest = readable(images, 20, skip_bad=True, enlarge=False)
    left = len(rest.files)
    assert 21 <= left <= 24
    assert len(rest.splits["test"]) == 3  # a fifth of seven or eight images of each class
    assert len(rest.splits["train"]) == left - 3
