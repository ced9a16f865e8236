"""`ggam-fast data` lists, checks and draws data sets."""

import json
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
    assert run("check", "--data", "cub", "--root", root, "--enlarge") == 0
    shown = capsys.readouterr().out
    assert "12 images (6 train, 6 test), 3 classes" in shown
    assert "annotations: boxes, parts" in shown
    assert "0 of 12 images cannot be read" in shown
    shutil.copy(images[0], images[1])  # a training image among the test images
    images[5].write_bytes(images[5].read_bytes()[:300])
    images[6].write_bytes(b"no image")
    assert run("check", "--data", "cub", "--root", root, "--enlarge") == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(
        rf"one file lies in more than one split: \S*{images[0].name}, \S*{images[1].name}", shown
    )
    assert "2 of 12 images cannot be read" in shown
    assert images[5].name in shown
    assert "not an image file" in shown


def checked(capsys, *arguments) -> tuple[int, dict]:
    """The exit code of `data check`, and its JSON, which is all that it prints."""
    capsys.readouterr()
    code = run("check", "--json", *arguments)
    shown = capsys.readouterr()
    assert shown.err == ""
    return code, json.loads(shown.out)


def test_check_as_json(tmp_path, capsys):
    root = trees.cub(tmp_path)
    options = ("--data", "cub", "--root", root)
    code, found = checked(capsys, *options, "--image-size", 16)
    assert (code, found["refused"]) == (0, [])
    assert found["classes"] == ["001.Albatross", "002.Bunting", "003.Catbird"]
    assert found["splits"]["test"] == {"images": 6, "classes": 3, "smallest_class": 2, "largest_class": 2}
    assert (found["smallest"], found["annotations"]) == ([28, 20], ["boxes", "parts"])
    code, found = checked(capsys, *options)
    assert (code, found["crop"], len(found["smaller_than_crop"])) == (2, 224, 12)
    assert "found 12 images smaller than the crop of 224 x 224" in found["refused"][0]
    images = sorted((root / "CUB_200_2011" / "images").rglob("*.jpg"))
    images[5].write_bytes(b"no image")
    shutil.copy(images[0], images[1])
    code, found = checked(capsys, *options, "--enlarge")
    assert code == 2
    assert found["unreadable"] == [{"file": str(images[5]), "problem": "not an image file"}]
    assert found["copies_across_splits"] == [[str(images[0]), str(images[1])]]
    assert "cannot read 1 image" in found["refused"][0]
    assert checked(capsys, *options, "--enlarge", "--skip-bad-images")[0] == 0


def test_list_as_json(capsys):
    assert run("list", "--json") == 0
    assert json.loads(capsys.readouterr().out)["cub"]["annotations"] == "boxes, parts"


def _link(photos):
    (photos / "red" / "again.png").symlink_to(photos / "blue" / "0.png")


def _only_bad(photos):
    for path in sorted((photos / "red").iterdir())[1:]:
        path.write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda photos: None, "smaller than the crop"),
        (lambda photos: (photos / "empty").mkdir(), "empty"),
        (lambda photos: (photos / "red" / "0.png").write_bytes(b""), "cannot read 1 image"),
        (_link, "are one file, so it would have two classes"),
        (_only_bad, "must hold two or more images"),
    ],
)
def test_check_refuses_what_train_refuses_in_the_same_words(photos, tmp_path, capsys, spoil, words):
    spoil(photos)
    options = ["--data", "folder", "--root", str(photos), "--backbone", "test_resnet"]
    options += [] if "smaller" in words else ["--enlarge"]
    options += ["--skip-bad-images"] if "two or more" in words else []
    code, found = checked(capsys, *options)
    assert code == 2
    [reason] = found["refused"]
    assert words in reason
    train = ["train", *options, "--no-pretrained", "--no-compile", "--device", "cpu", "--epochs", "1"]
    assert main([*train, "--out", str(tmp_path / "out"), "--cache-dir", str(tmp_path / "cache")]) == 2
    assert capsys.readouterr().err == f"ggam-fast: {reason}\n"
    assert run("check", *options) == 2


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
