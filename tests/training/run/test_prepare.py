"""Images, classifier and batches are made as the options say."""

from dataclasses import replace

import pytest
import torch

from ggam_fast.training import load_checkpoint
from ggam_fast.training.errors import TrainError
from ggam_fast.training.run import loop
from ggam_fast.training.run.prepare import image_batches, load_images
from ggam_fast.training.run.train import train
from tests.training.runs import said


def test_crop_larger_than_the_resized_image(tiny_config, report):
    config = replace(tiny_config, data=replace(tiny_config.data, resize=32))
    with pytest.raises(TrainError, match="--resize"):
        train(config, report)


def test_half_precision_backbone_on_the_cpu(tiny_config, report):
    config = replace(tiny_config, run=replace(tiny_config.run, precision="bfloat16"))
    assert train(config, report).metrics is not None
    [maps] = {path.suffix for path in tiny_config.data.cache_dir.iterdir()}
    assert maps == ".maps"


def test_reported_accuracy_is_that_of_the_reloaded_checkpoint(tiny_config, report):
    outcome = train(tiny_config, report)
    model = load_checkpoint(tiny_config.run.out).model
    images = load_images(tiny_config.data)
    batches = image_batches(images, model, tiny_config, torch.device("cpu"))
    logits, labels = loop.evaluate(model, batches["test"], torch.device("cpu"))
    assert (logits.argmax(1) == labels).float().mean().item() == outcome.metrics.accuracy


def test_maps_that_were_enlarged_do_not_hide_small_images(tiny_config, report, elsewhere):
    larger = replace(tiny_config, data=replace(tiny_config.data, image_size=256))
    train(larger, report)
    strict = replace(elsewhere(larger, "strict"), data=replace(larger.data, enlarge=False))
    with pytest.raises(TrainError, match="smaller than the crop"):
        train(strict, report)


def test_damaged_maps_are_computed_again(tiny_config, report, elsewhere):
    """Zeroed maps would train a classifier that knows nothing."""
    before = train(tiny_config, report).metrics
    for path in tiny_config.data.cache_dir.glob("*.maps"):
        content = path.read_bytes()
        path.write_bytes(bytes(len(content) // 2) + content[len(content) // 2 :])
    dead = tiny_config.data.cache_dir / f"net-64-{'0' * 20}.maps.{2**22 + 1}.part"
    dead.touch()
    again = train(elsewhere(tiny_config, "again"), report).metrics
    assert again.as_dict() == before.as_dict()
    assert said(report).count("are damaged and will be computed again") == 2
    assert f"removed {dead}" in said(report).replace("\n", "")
    assert not dead.exists()
