"""Images, classifier and batches are made as the options say."""

from dataclasses import replace

import pytest
import torch

from ggam_fast.training import load_checkpoint
from ggam_fast.training.errors import TrainError
from ggam_fast.training.run import loop
from ggam_fast.training.run import train as training
from ggam_fast.training.run.prepare import image_batches, load_images
from ggam_fast.training.run.train import train
from tests.training.runs import said

TUNED = [{}, {"finetune": True}, {"finetune_from": "layer4"}]


@pytest.mark.parametrize("tuned", TUNED)
def test_a_run_starts_from_the_weights_of_another(tiny_config, report, elsewhere, tuned):
    config = replace(tiny_config, backbone=replace(tiny_config.backbone, **tuned))
    train(config, report)
    first = load_checkpoint(config.run.out).model.state_dict()
    second = elsewhere(config, "second")
    run = replace(second.run, init_from=config.run.out)
    second = replace(second, run=run, optim=replace(second.optim, lr=0.0, backbone_lr=0.0, weight_decay=0.0))
    train(second, report)
    assert "backbone and head start from" in said(report)
    found = load_checkpoint(run.out).model
    assert all(value.equal(first[name]) for name, value in found.named_parameters())
    # The frozen backbone is in no snapshot, so the run may go on only from the same weights.
    train(replace(second, run=replace(run, resume=run.out)), report)
    train(
        replace(config, run=replace(config.run, overwrite=True), optim=replace(config.optim, seed=5)), report
    )
    with pytest.raises(TrainError, match="its snapshot has another init_from than this run"):
        train(replace(second, run=replace(run, resume=run.out)), report)


def test_another_head_starts_anew_and_another_backbone_is_refused(tiny_config, report, elsewhere, photos):
    train(tiny_config, report)
    first = load_checkpoint(tiny_config.run.out).model.state_dict()
    second = elsewhere(tiny_config, "second")
    second = replace(second, run=replace(second.run, init_from=tiny_config.run.out / "best.safetensors"))
    train(replace(second, head=replace(second.head, hidden_size=8)), report)
    assert "the head starts anew, because head options differ" in said(report)
    found = load_checkpoint(second.run.out).model.backbone.state_dict()
    assert all(value.equal(first[f"backbone.{name}"]) for name, value in found.items())
    (photos / "red").rename(photos / "rouge")
    train(replace(second, run=replace(second.run, overwrite=True)), report)
    assert "the head starts anew, because classes differ" in said(report)
    other = replace(second.backbone, backbone="test_efficientnet")
    with pytest.raises(TrainError, match="has the backbone test_resnet, and --backbone is test_efficientnet"):
        train(replace(second, backbone=other, run=replace(second.run, overwrite=True)), report)


def test_crop_larger_than_the_resized_image(tiny_config, report):
    config = replace(tiny_config, data=replace(tiny_config.data, resize=32))
    with pytest.raises(TrainError, match="--resize"):
        train(config, report)


def test_half_precision_backbone_on_the_cpu(tiny_config, report):
    config = replace(tiny_config, run=replace(tiny_config.run, precision="bfloat16"))
    assert train(config, report).metrics is not None
    [maps] = {path.suffix for path in tiny_config.data.cache_dir.iterdir()}
    assert maps == ".maps"


@pytest.mark.parametrize(
    ("backbone", "tuned", "optim"),
    [
        ("test_resnet", {}, {}),
        ("test_resnet", {"finetune_from": "layer4"}, {}),
        ("test_efficientnet", {"finetune_from": "blocks.3"}, {"ema": 0.9, "mixup": 0.3}),
        ("test_vit", {"finetune_from": "blocks.3"}, {"mixup": 0.3}),
    ],
    ids=str,
)
def test_what_was_tested_on_cached_maps_is_what_images_give(
    tiny_config, report, monkeypatch, backbone, tuned, optim
):
    config = replace(tiny_config, backbone=replace(tiny_config.backbone, backbone=backbone, **tuned))
    config = replace(config, optim=replace(config.optim, lr=3e-3, **optim))
    cached = []
    found = loop.evaluate
    monkeypatch.setattr(training, "evaluate", lambda *args: cached.append(found(*args)) or cached[-1])
    outcome = train(config, report)
    model = load_checkpoint(config.run.out).model
    images = load_images(config.data)
    batches = image_batches(images, model, config, torch.device("cpu"))
    logits, labels = loop.evaluate(model, batches["test"], torch.device("cpu"))
    torch.testing.assert_close(logits, cached[0][0], rtol=1e-3, atol=1e-4)
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
