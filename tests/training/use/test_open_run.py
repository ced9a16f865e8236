"""A finished run is opened with its own weights and images."""

import json
from dataclasses import replace

import pytest

from ggam_fast.training.errors import TrainError
from ggam_fast.training.run.train import train
from ggam_fast.training.use.evaluate import EvaluateConfig, evaluate_run


def test_best_weights_are_the_other_file(trained, report, tmp_path):
    config = EvaluateConfig(run=trained, out=tmp_path / "best", device="cpu", faithfulness=0, weights="best")
    evaluate_run(config, report)
    assert json.loads((tmp_path / "best" / "evaluation.json").read_text())["weights"] == "best"
    (trained / "best.safetensors").unlink()
    with pytest.raises(TrainError, match=r"no checkpoint at .*best\.safetensors"):
        evaluate_run(config, report)


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


def test_images_left_out_of_training_decide_the_splits_of_evaluation(tiny_config, photos, report, tmp_path):
    bad = photos / "red" / "0.png"
    whole = bad.read_bytes()
    bad.write_bytes(b"text")
    config = replace(tiny_config, data=replace(tiny_config.data, skip_bad_images=True))
    metrics = train(replace(config, optim=replace(config.optim, epochs=1)), report).metrics
    look = EvaluateConfig(config.run.out, out=tmp_path / "looked", faithfulness=0, examples=0, device="cpu")
    evaluate_run(look, report)
    found = json.loads((tmp_path / "looked" / "evaluation.json").read_text())
    assert found["classification"]["support"] == metrics.support
    bad.write_bytes(whole)  # the splits drawn with this image are others
    with pytest.raises(TrainError, match="not those it was trained on"):
        evaluate_run(look, report)
