import re
import shutil

import pytest
import torch

from ggam_fast.training.cli import main
from ggam_fast.training.data.readers import READERS

from . import trees
from .conftest import TINY


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
        rf"the same file in more than one split: \S*{images[0].name}, \S*{images[1].name}", shown
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
        ((), "takes list, check or preview"),
        (("show",), "got show"),
        (("preview", "--split", "exam"), "--split exam: elpv has train, val, test"),
        (("preview", "--images", "0"), "--images must be 1 or more"),
        (("preview", "--out", "nowhere/at/all.png"), "--out nowhere/at/all.png cannot be written"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, words):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.fixture
def spoiled(photos):
    """Three of thirty files are no images: truncated, text, empty."""
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


def test_set_without_some_rows(photos, tmp_path):
    from ggam_fast.training.data.readers import read_images

    images = read_images("folder", photos, tmp_path)
    rest = images.without([0, 5, 29])
    assert len(rest.files) == 27
    for split, part in rest.splits.items():
        before = {images.files[row] for row in images.splits[split].tolist()}
        gone = {images.files[row] for row in (0, 5, 29)}
        assert {rest.files[row] for row in part.tolist()} == before - gone
    label = dict(zip(images.files, images.labels.tolist(), strict=True))
    assert [label[path] for path in rest.files] == rest.labels.tolist()
    assert rest.labels.dtype == torch.int64
