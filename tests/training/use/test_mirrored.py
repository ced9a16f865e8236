"""Mirror images count in the probabilities, and not in the maps."""

import json
from dataclasses import replace

import pytest
import torch

from ggam_fast.training import load_checkpoint
from ggam_fast.training.config.options import DataConfig
from ggam_fast.training.data.image_set import eval_transform
from ggam_fast.training.data.readers import read_images
from ggam_fast.training.run.train import train
from ggam_fast.training.use.evaluate import EvaluateConfig, evaluate_run, more_metrics
from ggam_fast.training.use.mirrored import with_mirrored
from tests.training import trees


def test_probabilities_are_averaged():
    logits, mirrored = torch.randn(2, 5, 7) * 100
    found = with_mirrored(logits, mirrored).softmax(1)
    torch.testing.assert_close(found, (logits.softmax(1) + mirrored.softmax(1)) / 2)


def test_mirror_images_count_in_the_classification_alone(tiny_config, report, tmp_path):
    data = DataConfig("cub", trees.cub(tmp_path / "cub"), 64, cache_dir=tmp_path / "cache", enlarge=True)
    tiny_config = replace(tiny_config, data=data)
    train(tiny_config, report)
    found = {}
    for tta in ("none", "flip"):
        out = tmp_path / tta
        config = EvaluateConfig(tiny_config.run.out, out=out, device="cpu", tta=tta, thresholds=5)
        evaluate_run(replace(config, faithfulness=2), report)
        found[tta] = json.loads((out / "evaluation.json").read_text())
        page = (out / "evaluation.html").read_text()
        assert ("averaged over each image and its mirror image" in page) == (tta == "flip")
    assert found["flip"]["localisation"] == found["none"]["localisation"]
    assert found["flip"]["faithfulness"] == found["none"]["faithfulness"]
    model = load_checkpoint(tiny_config.run.out).model
    images = read_images("cub", tmp_path / "cub", tmp_path / "cache")
    rows = images.splits["test"]
    look = eval_transform(*model.backbone.preprocessing)
    inputs = torch.stack([look(images.read(int(row))) for row in rows])
    with torch.no_grad():
        averaged = (model(inputs).softmax(1) + model(inputs.flip(-1)).softmax(1)) / 2
    expected = more_metrics(averaged.log(), images.labels[rows])["calibration_error"]
    assert found["flip"]["classification"]["calibration_error"] == pytest.approx(expected, abs=1e-5)
    assert expected != pytest.approx(found["none"]["classification"]["calibration_error"], abs=1e-5)
