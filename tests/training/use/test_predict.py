"""`ggam-fast predict` writes what the classifier computes, and goes on where it was stopped."""

import csv
import json
import os

import pytest
import torch

from ggam_fast.training import load_checkpoint
from ggam_fast.training.cli import main
from ggam_fast.training.data.image_set import eval_transform, read_image
from ggam_fast.training.errors import Interrupted, TrainError
from ggam_fast.training.system.interrupts import InterruptGuard
from ggam_fast.training.use import predict as predicting
from ggam_fast.training.use.predict import PredictConfig, image_paths, predict
from tests.training.runs import said


def table(path):
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def config(trained, photos, tmp_path):
    """A function that returns a configuration for the run `trained`."""

    def made(*images, out="found.csv", **options):
        return PredictConfig(
            trained, images or (photos,), tmp_path / out, batch_size=7, device="cpu", **options
        )

    return made


def test_probabilities_of_an_image_and_its_mirror_image_are_averaged(config, trained, photos, report):
    path = predict(config(probabilities=True, tta="flip"), report)
    model, classes, _ = load_checkpoint(trained)
    look = eval_transform(*model.backbone.preprocessing)
    inputs = torch.stack([look(read_image(file)) for file in sorted(photos.rglob("*.png"))])
    with torch.no_grad():
        plain, mirrored = model(inputs).softmax(1), model(inputs.flip(-1)).softmax(1)
    found = torch.tensor([[float(row[f"p({name})"]) for name in classes] for row in table(path)])
    torch.testing.assert_close(found, (plain + mirrored) / 2, atol=1e-5, rtol=1e-4)
    assert not found.allclose(plain, atol=1e-4)


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_what_the_classifier_computes(config, trained, photos, report, workers):
    path = predict(config(top_k=2, probabilities=True, workers=workers), report)
    model, classes, _ = load_checkpoint(trained)
    rows = table(path)
    files = sorted(photos.rglob("*.png"))
    assert [row["path"] for row in rows] == list(map(str, files))
    inputs = torch.stack([eval_transform(*model.backbone.preprocessing)(read_image(file)) for file in files])
    with torch.no_grad():
        expected = model(inputs).softmax(1)
    found = torch.tensor([[float(row[f"p({name})"]) for name in classes] for row in rows])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    for row, values in zip(rows, expected, strict=True):
        order = values.argsort(descending=True).tolist()
        assert [row["class_1"], row["class_2"]] == [classes[index] for index in order[:2]]
        assert float(row["probability_2"]) == pytest.approx(values[order[1]].item(), abs=1e-5)
        assert row["error"] == ""
        assert "class_3" not in row
    assert not path.with_name("found.csv.unfinished").exists()


def test_json_lines_hold_the_same(config, report):
    rows = table(predict(config(), report))
    records = lines(predict(config(out="found.jsonl"), report))
    full = lines(predict(config(out="full.jsonl", probabilities=True), report))
    for row, record, more in zip(rows, records, full, strict=True):
        assert record["path"] == row["path"]
        assert [one["class"] for one in record["top"]] == [row[f"class_{place}"] for place in (1, 2, 3)]
        assert str(record["top"][0]["probability"]) == row["probability_1"]
        assert "probabilities" not in record
        assert sorted(more["probabilities"].values()) == sorted(one["probability"] for one in record["top"])


@pytest.mark.parametrize("out", ["found.csv", "found.jsonl"])
@pytest.mark.parametrize("torn", [b"", b'torn "ro'])
def test_a_stopped_prediction_goes_on_bit_for_bit(config, report, tmp_path, monkeypatch, out, torn):
    whole = predict(config(out=f"whole{out}", probabilities=True), report).read_bytes()
    stopped = config(out=out, probabilities=True)
    calls = []

    def check(guard):
        calls.append(1)
        if len(calls) == 3:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(InterruptGuard, "check", check)
        assert predict(stopped, report) is None
    assert "interrupted after 14 of 30 images" in said(report)
    assert not stopped.out.exists()
    with (tmp_path / f"{out}.unfinished" / "rows").open("ab") as file:
        file.write(torn)  # of a batch that was not whole
    decoded = []
    read = predicting.read_image
    monkeypatch.setattr(
        predicting, "read_image", lambda path, banner: decoded.append(path) or read(path, banner)
    )
    assert predict(stopped, report).read_bytes() == whole
    assert "going on after 14 of 30 images" in said(report)
    assert len(decoded) == 16
    assert not (tmp_path / f"{out}.unfinished").exists()


@pytest.mark.parametrize("change", ["options", "files"])
def test_a_stopped_prediction_of_something_else_is_kept(config, photos, report, monkeypatch, change):
    with monkeypatch.context() as patch:
        patch.setattr(predicting, "_probabilities", lambda *_: (_ for _ in ()).throw(Interrupted()))
        assert predict(config(), report) is None
    if change == "files":
        monkeypatch.setattr(predicting, "_probabilities", _once(predicting._probabilities))
        assert predict(config(), report) is None
        monkeypatch.undo()
        (photos / "blue" / "0.png").unlink()
        other = config()
    else:
        other = config(top_k=1)
    with pytest.raises(TrainError, match=r"holds a stopped prediction with other (files|top_k)"):
        predict(other, report)
    assert predict(config(top_k=1, overwrite=True), report) is not None


def _once(function):
    calls = []

    def called(*arguments):
        calls.append(1)
        if len(calls) > 1:
            raise Interrupted
        return function(*arguments)

    return called


def test_what_cannot_be_read_has_a_row_that_says_why(config, photos, report):
    (photos / "red" / "3.png").write_bytes(b"broken")
    rows = table(predict(config(), report))
    [bad] = [row for row in rows if row["error"]]
    assert bad["path"].endswith("red/3.png")
    assert "not an image file" in bad["error"]
    assert bad["class_1"] == bad["probability_3"] == ""
    assert sum(row["class_1"] != "" for row in rows) == 29
    assert "images without a prediction: 1, namely cannot read image" in said(report)
    [record] = [one for one in lines(predict(config(out="a.jsonl"), report)) if "error" in one]
    assert record == {"path": bad["path"], "error": bad["error"]}
    # A whole batch without an image.
    [row] = table(predict(config(photos / "red" / "3.png", out="one.csv"), report))
    assert row["error"] == bad["error"]


def test_images_of_a_folder(photos, tmp_path):
    (photos / ".hidden").mkdir()
    (photos / "red" / "deeper").mkdir()
    (photos / "red" / "deeper" / "A.JPG").touch()
    for name in (".hidden/1.png", "red/._0.png", "red/notes.txt"):
        (photos / name).touch()
    (photos / "red" / "again").symlink_to(photos)
    others = []
    found = list(image_paths([photos / "green" / "1.png", photos], others.append))
    assert found[0] == photos / "green" / "1.png"
    assert len(found[1:]) == len(set(found[1:])) == 31
    assert photos / "red" / "deeper" / "A.JPG" in found
    assert others == [photos / "red" / "notes.txt"]


def test_names_that_are_no_text(config, photos, report):
    name = b'\xff,\n".png'
    os.rename(photos / "red" / "0.png", os.fsencode(photos / "red") + b"/" + name)
    rows = table(predict(config(photos / "red"), report))
    assert os.fsencode(photos / "red") + b"/" + name in [os.fsencode(row["path"]) for row in rows]
    assert len(rows) == 10


def test_bad_input_is_one_line(config, trained, photos, tmp_path, capsys, report):
    def refused(*arguments):
        capsys.readouterr()
        assert main(["predict", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "needs a run, and then image files" in refused(trained)
    assert "nowhere must be an image file or a folder" in refused(trained, tmp_path / "nowhere")
    assert "--out must end in .csv or .jsonl" in refused(trained, photos, "--out", "a.txt")
    assert "--top-k must be 1 or more; got 0" in refused(trained, photos, "--top-k", 0)
    (tmp_path / "empty").mkdir()
    assert "there is no image in" in refused(trained, tmp_path / "empty")
    predict(config(), report)
    assert "exists; choose another file" in refused(trained, photos, "--out", tmp_path / "found.csv")
    assert predict(config(overwrite=True), report) is not None
    assert "no checkpoint at" in refused(tmp_path / "empty", photos)
