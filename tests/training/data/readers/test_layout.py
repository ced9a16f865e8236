"""What all readers do: find a data set's folder, and read its text files."""

import pytest

from ggam_fast.training.data.readers.layout import base_folder, lines, numbered, rows_of
from ggam_fast.training.errors import TrainError


def test_the_root_is_the_folder_or_holds_it(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "images.txt").touch()
    assert base_folder(tmp_path, "set", ["images.txt"]) == tmp_path / "set"
    assert base_folder(tmp_path / "set", "set", ["images.txt"]) == tmp_path / "set"
    with pytest.raises(TrainError, match=r"labels\.txt, boxes\.txt not found in"):
        base_folder(tmp_path, "set", ["images.txt", "labels.txt", "boxes.txt"])


def test_text_files(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("1 one\n\n  2 two words \n")
    assert lines(path) == ["1 one", "2 two words"]
    assert numbered(path) == {1: "one", 2: "two words"}
    path.write_bytes("\ufeff1\tone\r\n2 \ttwo words\r\n".encode())
    assert numbered(path) == {1: "one", 2: "two words"}
    path.write_text("one 1\n")
    with pytest.raises(TrainError, match="expected a number and a text; got 'one 1'"):
        numbered(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TrainError, match="cannot read"):
        lines(path)


def test_rows_of_a_split():
    assert rows_of(["train", "test", "train"], "train").tolist() == [0, 2]
    assert rows_of(["train"], "test").numel() == 0
