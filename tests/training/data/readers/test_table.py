"""A CSV file says which images there are, their classes, splits and groups."""

import csv
import json

import pytest

from ggam_fast.training.cli import main
from ggam_fast.training.data.readers import read_images
from ggam_fast.training.errors import TrainError
from tests.training.conftest import TINY

COLOURS = ("red", "green", "blue")


@pytest.fixture
def write(photos, tmp_path):
    """Write the table of `photos`: a function of columns, each a function of class and number."""

    def write(*lines, **columns):
        rows = [("path", *columns), *lines]
        if not lines:
            for name in COLOURS:
                for index in range(10):
                    values = (value(name, index) for value in columns.values())
                    rows.append((f"{name}/{index}.png", *values))
        path = tmp_path / "split.csv"
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows(rows)
        return path

    return write


def read(photos, table, **options):
    return read_images("folder", photos, photos, split_by=table, **options)


def names(images, split):
    return sorted(images.files[row].relative_to(images.files[0].parents[1]).as_posix()
                  for row in images.splits[split].tolist())  # fmt: skip


def test_splits_and_classes_are_those_of_the_table(photos, write):
    table = write(
        label=lambda name, index: "warm" if name == "red" else "cold",
        split=lambda name, index: ("Train", "validation", "TEST")[min(index // 4, 2)],
    )
    images = read(photos, table)
    assert images.classes == ("cold", "warm")
    assert {split: len(rows) for split, rows in images.splits.items()} == {"train": 12, "test": 6, "val": 12}
    assert names(images, "test") == sorted(
        f"{name}/{i}.png" for name in ("red", "green", "blue") for i in (8, 9)
    )
    assert images.labels.sum() == 10


def test_without_more_columns_folders_are_classes_and_splits_are_drawn(photos, write):
    (photos / "red" / "more").mkdir()
    (photos / "red" / "3.png").rename(photos / "red" / "more" / "x.png")
    images = read(photos, write(("red/more/x.png",), ("red/1.png",), ("blue/0.png",), ("blue/1.png",)))
    assert images.classes == ("blue", "red")
    assert len(images.splits["test"]) == 2
    assert "images that split.csv does not name: 26" in images.notes


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_no_group_is_in_two_splits(photos, write, share):
    images = read(photos, write(group=lambda name, index: f"scene {index // 2}"), val_fraction=share)
    scenes = [{int(name.split("/")[1][0]) // 2 for name in names(images, split)} for split in images.splits]
    assert len(scenes) == (3 if share else 2)
    assert sum(map(len, scenes)) == len(set.union(*scenes)) == 5


@pytest.mark.parametrize(
    ("columns", "lines", "words"),
    [
        (("label",), [("red/0.png", "a"), ("red/1.png", "")], "row 3 has no label"),
        (("split",), [("red/0.png", "exam")], "row 2 has the split exam; it must be train, val or test"),
        (("split",), [("red/0.png", "train"), ("blue/0.png", "train")], "none is for test"),
        (("split",), [("red/0.png",)], "row 2 has 1 columns and not 2"),
        ((), [("red/0.png",), ("red/../red/0.png",)], r"row 3 names red/../red/0.png again, after row 2"),
        ((), [("0.png",)], "is in no class folder of --root"),
        (
            ("split", "group"),
            [("red/0.png", "train", "g"), ("blue/0.png", "test", "g")],
            "has images of group g for train and for test",
        ),
    ],
)
def test_bad_tables_are_one_line(photos, write, columns, lines, words):
    with pytest.raises(TrainError, match=words) as raised:
        read(photos, write(*lines, **dict.fromkeys(columns)))
    assert "\n" not in str(raised.value)


def test_what_is_no_table(photos, tmp_path):
    path = tmp_path / "a.csv"
    for text, words in (
        ("", "must be a CSV file"),
        ("file\nx\n", "must have a column path"),
        ("path\n", "no image"),
    ):
        path.write_text(text)
        with pytest.raises(TrainError, match=words):
            read(photos, path)
    with pytest.raises(TrainError, match="cannot read"):
        read(photos, tmp_path / "gone.csv")
    with pytest.raises(TrainError, match="--split-by is for --data folder"):
        read_images("cub", photos, photos, split_by=path)


def test_train_evaluate_and_resume_use_the_same_splits(photos, write, tmp_path, capsys):
    table = write(group=lambda name, index: f"scene {index // 2}")
    options = ["--data", "folder", "--root", str(photos), "--split-by", str(table), "--val-fraction", "0.25"]
    assert main(["data", "check", *options, "--enlarge", "--json"]) == 0
    splits = json.loads(capsys.readouterr().out)["splits"]
    out = str(tmp_path / "out")
    options += [*TINY, "--no-compile", "--cache-dir", str(tmp_path / "cache"), "--out", out]
    assert main(["train", *options]) == 0
    assert main(["train", "--resume", out]) == 0
    for split in ("test", "val"):
        assert main(["evaluate", out, "--split", split, "--device", "cpu", "--faithfulness", "0"]) == 0
        found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
        assert sum(found["classification"]["support"]) == splits[split]["images"]
    table.write_text(
        "path\n" + "".join(f"{name}/{i}.png\n" for name in ("red", "green", "blue") for i in range(9))
    )
    capsys.readouterr()
    assert main(["evaluate", out, "--device", "cpu", "--faithfulness", "0"]) == 2
    assert "not those it was trained on" in capsys.readouterr().err
