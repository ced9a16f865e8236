"""The numbers of `ggam-fast evaluate` equal those of a plain loop."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

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
from ggam_fast.training.measure.intervals import wilson
from ggam_fast.training.measure.localization import energy, enlarged
from ggam_fast.training.model.heatmaps import heat_maps
from ggam_fast.training.run.train import train
from ggam_fast.training.use.evaluate import (
    EvaluateConfig,
    evaluate_run,
    more_metrics,
    passes,
    spread,
    training_of,
    worst_errors,
)
from tests.training import trees
from tests.training.runs import said


@pytest.fixture
def trained_cub(tiny_config, report, tmp_path):
    found = DataConfig("cub", trees.cub(tmp_path / "cub"), 64, cache_dir=tmp_path / "cache", enlarge=True)
    train(replace(tiny_config, data=found), report)
    return tiny_config.run.out


def test_numbers_are_those_of_a_plain_loop(trained_cub, report, tmp_path):
    out = tmp_path / "looked"
    config = EvaluateConfig(
        run=trained_cub, out=out, device="cpu", insertion_steps=3, batch_size=4, thresholds=5
    )
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
    # The shares inside boxes are those of maps made for one image at a time, for the class in the name.
    for name, classes_of in (("Grad-CAM, label", labels), ("Grad-CAM, guess", logits.argmax(1))):
        shares = []
        for row, of in zip(rows.tolist(), classes_of, strict=True):
            inputs = transform(images.read(row))[None]
            heat = heat_maps(model.head, model.backbone(inputs).detach(), of[None]).grad_cam
            area = placed(images, [row], transform, 64).areas
            shares.append(energy(enlarged(heat, (64, 64)), area).item())
        assert found["localisation"][name]["energy"] == pytest.approx(sum(shares) / len(shares), rel=1e-3)
    assert not labels.equal(logits.argmax(1))  # otherwise the test could not tell the two apart
    for name in ("attention", "Grad-CAM, label", "centre Gaussian"):
        assert set(found["localisation"][name]) == {
            *("pointing", "pointing_15px", "energy", "max_box_acc_v2", "parts"),
        }
    assert found["localised_against"] == "boxes and parts"
    maps = found["faithfulness"]["maps"]
    assert set(maps) == {"Grad-CAM, guess", "attention", "random order"}
    whole = logits.softmax(1).amax(1).mean().item()
    for both in maps.values():
        # Insertion ends and deletion begins with the whole image.
        assert both["insertion"]["curve"][-1] == pytest.approx(whole, abs=1e-5)
        assert both["deletion"]["curve"][0] == pytest.approx(whole, abs=1e-5)
        for kind in ("insertion", "deletion"):
            curve = torch.tensor(both[kind]["curve"])
            assert both[kind]["area"] == pytest.approx(torch.trapezoid(curve).item() / 3, abs=1e-5)
    assert "localisation against boxes and parts" in said(report)
    # 6 images, 3 orders, insertion and deletion, and 3 steps behind the first point.
    assert found["classification"]["images"] == 6
    assert "insertion and deletion: 144 forward passes" in said(report)
    assert re.search(
        r"they will take about \d+ s: \S+ ms for each pass, measured on the first batch", said(report)
    )


def test_more_metrics_of_known_logits():
    logits = torch.log(torch.tensor([[0.61, 0.29, 0.1]] * 4))
    found = more_metrics(logits, torch.tensor([0, 0, 0, 1]))
    assert (found["top5"], found["calibration_error"]) == (1.0, pytest.approx(0.14))
    assert [one and one["images"] for one in found["reliability"]] == [*[None] * 9, 4, *[None] * 5]
    assert found["intervals"]["accuracy"] == wilson(3, 4)
    assert found["intervals"]["top5"] == wilson(4, 4)
    assert set(found["intervals"]) == {"accuracy", "top5", "balanced_accuracy", "macro_f1"}
    ten = F.one_hot(torch.arange(10), 10) + torch.linspace(0, 0.5, 10)
    assert more_metrics(ten.float(), torch.zeros(10, dtype=torch.long))["top5"] == pytest.approx(0.1)


def test_the_worst_errors_come_first():
    logits = torch.log(torch.tensor([[0.5, 0.5], [0.6, 0.4], [0.9, 0.1], [0.2, 0.8], [0.3, 0.7]]))
    labels = torch.tensor([0, 1, 1, 1, 0])
    assert worst_errors(logits, labels, 9) == [2, 4, 1]
    assert worst_errors(logits, labels, 2) == [2, 4]
    assert worst_errors(logits, labels, 0) == []


def test_epochs_are_those_of_the_run_that_a_file_belongs_to(tmp_path):
    assert training_of(tmp_path) is None
    epochs = [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0}]
    (tmp_path / "metrics.json").write_text(json.dumps({"epochs": epochs, "best_epoch": 1}))
    assert training_of(tmp_path) == training_of(tmp_path / "best.safetensors") == (epochs, 0)
    assert training_of(tmp_path / "of-another-run.safetensors") is None
    (tmp_path / "metrics.json").write_text(json.dumps({"epochs": epochs}))
    assert training_of(tmp_path) == (epochs, 1)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(TrainError, match=r"metrics\.json cannot be read"):
        training_of(tmp_path)


def test_a_part_of_the_split(trained, report, tmp_path):
    """The option has its old name too, on the command line and in a file."""
    (tmp_path / "some.yaml").write_text(
        "max_images: 4\nsteps: 1\nfaithfulness: 2\nexamples: 0\ndevice: cpu\n"
    )
    out = tmp_path / "looked"
    assert main(["evaluate", str(trained), "--config", str(tmp_path / "some.yaml"), "--out", str(out)]) == 0
    found = json.loads((out / "evaluation.json").read_text())
    assert found["classification"]["images"] == sum(found["classification"]["support"]) == 4
    assert found["classification"]["support"] == [2, 1, 1]
    assert found["faithfulness"]["steps"] == 1
    note = "4 of the 6 images of split test, spread over it (--max-images)"
    assert note in found["notes"]
    assert note in (out / "evaluation.html").read_text()
    assert main(["evaluate", str(trained), "--steps", "0"]) == 2


def test_forward_passes_of_a_head_with_and_without_a_map():
    config = EvaluateConfig(faithfulness=4, insertion_steps=1)
    for attention, orders in (("channel", 2), ("none", 2), ("spatial", 3), ("channel_spatial", 3)):
        model = SimpleNamespace(head=SimpleNamespace(attention=attention))
        assert passes(model, 10, config) == 4 * orders * 2 * 2
        assert passes(model, 3, config) == 3 * orders * 2 * 2


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

    assert "--split must be one of train, test for photos; got holdout" in refused(
        trained, "--split", "holdout"
    )
    assert "--examples must be 0 or more; got -1" in refused(trained, "--examples", "-1")
    assert "no checkpoint at" in refused(tmp_path / "nowhere")
    assert "has no class folders" in refused(trained, "--data", "folder", "--root", tmp_path / "cache")
    for image in (photos / "red").iterdir():
        image.write_bytes(image.read_bytes()[:60])
    assert re.search(r"photos/red/\d\.png", refused(trained))
    (photos / "red").rename(photos / "rouge")
    error = refused(trained)
    assert "--data folder has 3 classes and the checkpoint 3" in error
    assert "the checkpoint has no class rouge; the data has no class red" in error
