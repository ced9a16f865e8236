"""`ggam-fast evaluate` measures what it says, against a plain loop, and its page needs nothing else."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from torch.nn import functional as F

from ggam_fast.training import load_checkpoint
from ggam_fast.training.cli import main
from ggam_fast.training.config.options import DataConfig
from ggam_fast.training.data.image_set import eval_transform
from ggam_fast.training.data.readers import read_images
from ggam_fast.training.errors import TrainError
from ggam_fast.training.measure.geometry import placed
from ggam_fast.training.measure.localization import energy, enlarged
from ggam_fast.training.model.heatmaps import heat_maps
from ggam_fast.training.run.train import train
from ggam_fast.training.use.evaluate import EvaluateConfig, evaluate_run, more_metrics, spread

from . import trees


@pytest.fixture
def trained(tiny_config, report):
    """A run on `photos` of one epoch."""
    train(replace(tiny_config, optim=replace(tiny_config.optim, epochs=1)), report)
    return tiny_config.run.out


@pytest.fixture
def trained_cub(tiny_config, report, tmp_path):
    found = DataConfig("cub", trees.cub(tmp_path / "cub"), 64, cache_dir=tmp_path / "cache", enlarge=True)
    train(replace(tiny_config, data=found), report)
    return tiny_config.run.out


class Page(HTMLParser):
    """What an HTML page shows and refers to."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.references, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def test_numbers_are_those_of_a_plain_loop(trained_cub, report, tmp_path):
    out = tmp_path / "looked"
    config = EvaluateConfig(run=trained_cub, out=out, device="cpu", steps=3, batch_size=4, thresholds=5)
    evaluate_run(config, report)
    found = json.loads((out / "evaluation.json").read_text())
    model, classes, _ = load_checkpoint(trained_cub)
    images = read_images("cub", tmp_path / "cub", tmp_path / "cache")
    rows = images.splits["test"]
    transform = eval_transform(*model.backbone.preprocessing)
    with torch.no_grad():
        logits = model(torch.stack([transform(images.read(int(row))) for row in rows]))
    labels = images.labels[rows]
    right = (logits.argmax(1) == labels).double().mean().item()
    assert found["classification"]["accuracy"] == pytest.approx(right)
    assert found["classes"] == list(classes)
    assert found["classification"]["images"] == len(rows)
    assert set(found["localisation"]) == {
        *("attention", "Grad-CAM, label", "Grad-CAM, guess"),
        *("centre Gaussian", "uniform map"),
    }
    # The shares inside boxes, of maps made one image at a time, of the class that the name says.
    for name, classes_of in (("Grad-CAM, label", labels), ("Grad-CAM, guess", logits.argmax(1))):
        shares = []
        for row, of in zip(rows.tolist(), classes_of, strict=True):
            inputs = transform(images.read(row))[None]
            heat = heat_maps(model.head, model.backbone(inputs).detach(), of[None]).grad_cam
            area = placed(images, [row], transform, 64).areas
            shares.append(energy(enlarged(heat, (64, 64)), area).item())
        assert found["localisation"][name]["energy"] == pytest.approx(sum(shares) / len(shares), rel=1e-3)
    assert not labels.equal(logits.argmax(1))  # else the two could not be told apart
    for name in ("attention", "Grad-CAM, label", "centre Gaussian"):
        assert set(found["localisation"][name]) == {
            *("pointing", "pointing_15px", "energy", "max_box_acc_v2", "parts"),
        }
    assert found["localised_against"] == "boxes and parts"
    maps = found["faithfulness"]["maps"]
    assert set(maps) == {"Grad-CAM, guess", "attention", "random order"}
    whole = logits.softmax(1).amax(1).mean().item()
    for both in maps.values():
        # The whole image is where insertion ends and deletion begins.
        assert both["insertion"]["curve"][-1] == pytest.approx(whole, abs=1e-5)
        assert both["deletion"]["curve"][0] == pytest.approx(whole, abs=1e-5)
        for kind in ("insertion", "deletion"):
            curve = torch.tensor(both[kind]["curve"])
            assert both[kind]["area"] == pytest.approx(torch.trapezoid(curve).item() / 3, abs=1e-5)
    assert "localisation against boxes and parts" in report.console.file.getvalue()


def test_the_page_needs_nothing_else_and_escapes_names(trained, photos, report, tmp_path):
    out = tmp_path / "looked"
    evaluate_run(EvaluateConfig(run=trained, out=out, device="cpu", faithfulness=2, steps=1), report)
    text = (out / "evaluation.html").read_text()
    page = Page(text)
    assert page.references
    assert all(reference.startswith("data:image/jpeg;base64,") for reference in page.references)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"https?:|url\(|@import", text)
    # One picture of the curves, and every test image.
    assert page.tags.count("img") == 1 + 6
    found = json.loads((out / "evaluation.json").read_text())
    assert found["localisation"] == {}
    assert "says nothing of where objects are" in report.console.file.getvalue()
    assert f"{100 * found['classification']['accuracy']:.1f} %" in page.text
    assert {path.name for path in out.iterdir()} == {"evaluation.json", "evaluation.html"}


def test_names_are_text(photos, tiny_config, report, tmp_path):
    strange = "<img src=x>&amp;'"
    (photos / "red").rename(photos / strange)
    train(tiny_config, report)
    evaluate_run(EvaluateConfig(run=tiny_config.run.out, device="cpu", faithfulness=0), report)
    page = Page((tiny_config.run.out / "evaluation.html").read_text())
    assert "x" not in page.references
    assert strange in page.text


def test_many_classes_have_a_list_of_mistakes():
    from ggam_fast.training.show.page import _confusion

    names = [f"class {index}" for index in range(50)]
    matrix = [[0] * 50 for _ in names]
    matrix[3][7], matrix[8][2], matrix[5][5] = 4, 9, 20
    text = Page(_confusion(matrix, names)).text
    cells = [word for word in text if word.startswith("class ") or word.isdigit()]
    assert cells == ["class 8", "class 2", "9", "class 3", "class 7", "4"]


def test_best_weights_are_the_other_file(trained, report, tmp_path):
    config = EvaluateConfig(run=trained, out=tmp_path / "best", device="cpu", faithfulness=0, weights="best")
    evaluate_run(config, report)
    assert json.loads((tmp_path / "best" / "evaluation.json").read_text())["weights"] == "best"
    (trained / "best.safetensors").unlink()
    with pytest.raises(TrainError, match=r"no checkpoint at .*best\.safetensors"):
        evaluate_run(config, report)


def test_top5_and_calibration_of_known_logits():
    logits = torch.log(torch.tensor([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.6, 0.3, 0.1]]))
    found = more_metrics(logits, torch.tensor([0, 0, 0, 1]))
    assert found == pytest.approx({"top5": 1.0, "calibration_error": 0.15})
    ten = F.one_hot(torch.arange(10), 10) + torch.linspace(0, 0.5, 10)
    assert more_metrics(ten.float(), torch.zeros(10, dtype=torch.long))["top5"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("count", "wanted", "places"), [(10, 4, [0, 2, 5, 7]), (3, 5, [0, 1, 2]), (4, 0, [])]
)
def test_spread(count, wanted, places):
    assert spread(count, wanted) == places


def test_bad_input_is_one_line_and_leaves_nothing(trained, photos, tmp_path, capsys):
    out = tmp_path / "looked"

    def refused(*arguments):
        capsys.readouterr()
        assert main(["evaluate", *map(str, arguments), "--out", str(out), "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("ggam-fast: ")
        assert error.count("\n") == 1
        assert not out.exists()
        return error

    assert "--split holdout: photos has train, test" in refused(trained, "--split", "holdout")
    assert "--examples must be 0 or more; got -1" in refused(trained, "--examples", "-1")
    assert "no checkpoint at" in refused(tmp_path / "nowhere")
    assert "find any class folder" in refused(trained, "--data", "folder", "--root", tmp_path / "cache")
    for image in (photos / "red").iterdir():
        image.write_bytes(image.read_bytes()[:60])
    assert re.search(r"photos/red/\d\.png", refused(trained))
    (photos / "red").rename(photos / "rouge")
    error = refused(trained)
    assert "--data folder has 3 classes and the checkpoint 3" in error
    assert "the checkpoint has no class rouge; the data has no class red" in error


def test_images_that_changed_their_split_are_refused(trained, photos, report, tmp_path):
    (photos / "red" / "0.png").unlink()
    config = EvaluateConfig(trained, out=tmp_path / "looked", faithfulness=0, examples=0, device="cpu")
    with pytest.raises(TrainError, match="not those it was trained on"):
        evaluate_run(config, report)
    evaluate_run(replace(config, data="folder", root=photos, enlarge=True), report)


def test_weights_of_a_file_are_named(trained, report, tmp_path):
    config = EvaluateConfig(
        trained / "best.safetensors", out=tmp_path, faithfulness=0, examples=0, device="cpu"
    )
    evaluate_run(config, report)
    assert json.loads((tmp_path / "evaluation.json").read_text())["weights"] == "best.safetensors"
    with pytest.raises(TrainError, match="is a file"):
        evaluate_run(replace(config, weights="best"), report)
