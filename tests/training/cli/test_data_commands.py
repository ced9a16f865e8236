"""`ggam-fast data` lists, checks and draws data sets."""

import re
import shutil

import pytest

from ggam_fast.training.cli import main
from ggam_fast.training.data.readers import READERS
from tests.training import trees


def run(*arguments) -> int:
    return main(["data", *map(str, arguments)])


def test_list_names_every_data_set(capsys):
    assert run("list") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in READERS)


def test_check_counts_and_finds_what_is_wrong(tmp_path, capsys):
    root = trees.cub(tmp_path)
    images = sorted((root / "CUB_200_2011" / "images").rglob("*.jpg"))
    assert run("check", "--data", "cub", "--root", root) == 0
    shown = capsys.readouterr().out
    assert "12 images (6 train, 6 test), 3 classes" in shown
    assert "annotations: boxes, parts" in shown
    assert "0 of 12 images cannot be read" in shown
    shutil.copy(images[0], images[1])  # a training image among the test images
    images[5].write_bytes(images[5].read_bytes()[:300])
    images[6].write_bytes(b"no image")
    assert run("check", "--data", "cub", "--root", root) == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(
        rf"one file lies in more than one split: \S*{images[0].name}, \S*{images[1].name}", shown
    )
    assert "2 of 12 images cannot be read" in shown
    assert images[5].name in shown
    assert "not an image file" in shown


@pytest.mark.parametrize("name", ["cub", "birds", "pets"])
def test_preview_draws_annotations(tmp_path, capsys, monkeypatch, name):
    from PIL import Image

    monkeypatch.setattr("ggam_fast.training.data.readers.birds.SCENES", {"train": 4, "val": 1, "test": 1})
    root = getattr(trees, name)(tmp_path / "root")
    out = tmp_path / "picture.png"
    options = ("--data", name, "--root", root, "--cache-dir", tmp_path / "cache", "--images", 7, "--out", out)
    assert run("preview", *options) == 0
    with Image.open(out) as image:
        assert image.width > 1000
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert ((0, 114, 178) in colours) == (name != "pets")  # boxes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "must be followed by list, check or preview"),
        (("show",), "got show"),
        (("preview", "--split", "exam"), "--split must be one of train, val, test for elpv; got exam"),
        (("preview", "--images", "0"), "--images must be 1 or more"),
        (("preview", "--out", "nowhere/at/all.png"), "--out nowhere/at/all.png cannot be written"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, words):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
