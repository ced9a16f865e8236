"""A run from its options to its results."""

import shutil
from dataclasses import replace

import pytest
import torch

from ggam_fast.training import load_checkpoint
from ggam_fast.training.errors import TrainError
from ggam_fast.training.run import prepare
from ggam_fast.training.run.prepare import create_classifier
from ggam_fast.training.run.train import train
from tests.training.runs import numbers, said, with_

TUNED = [{}, {"finetune": True}, {"finetune_from": "layer4"}]


@pytest.mark.parametrize("tuned", TUNED)
def test_training_takes_the_fused_loss(tiny_config, report, monkeypatch, tuned):
    from ggam_fast import GGAMHead

    forward = GGAMHead.forward

    def without_target(head, features, target=None, pre_logits=False):
        assert target is None or not head.training
        return forward(head, features, target, pre_logits)

    monkeypatch.setattr(GGAMHead, "forward", without_target)
    config = replace(tiny_config, backbone=replace(tiny_config.backbone, **tuned))
    assert train(with_(config, mixup=0.5), report).metrics is not None


def test_run_learns_and_leaves_all_its_results(tiny_config, report):
    # At the default rate, 24 steps change little and the predictions stay random.
    tiny_config = with_(tiny_config, lr=3e-3)
    outcome = train(tiny_config, report)
    out = tiny_config.run.out
    names = {path.name for path in out.iterdir()}
    results = {"model.safetensors", "best.safetensors", "config.json", "metrics.json", "gallery.png"}
    results |= {"curves.png"}
    assert names == results | {"options.yaml", "log.jsonl", "tensorboard", "snapshots"}
    assert any((out / "tensorboard").iterdir())
    epochs = numbers(out)["epochs"]
    assert len(epochs) == 4
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    assert outcome.metrics.accuracy == 1.0
    assert f"accuracy {outcome.metrics.accuracy:.3f}" in said(report)
    assert outcome.checkpoint == out / "model.safetensors"


def test_same_seed_same_numbers_and_weights(tiny_config, report, elsewhere):
    train(tiny_config, report)
    cached = elsewhere(tiny_config, "again")
    train(cached, report)  # its maps come from the cache
    other = elsewhere(tiny_config, "other")
    train(with_(other, seed=1), report)
    assert numbers(tiny_config.run.out) == numbers(cached.run.out)
    assert said(report).count("feature maps, ") == 2  # random weights differ with the seed
    first, second, third = (
        load_checkpoint(config.run.out).model.state_dict() for config in (tiny_config, cached, other)
    )
    assert all(tensor.equal(second[name]) for name, tensor in first.items())
    assert not all(tensor.equal(third[name]) for name, tensor in first.items())


def test_frozen_backbone_stays_as_it_was_and_fine_tuning_moves_it(tiny_config, report, elsewhere):
    before = create_classifier(tiny_config, 3)
    torch.manual_seed(tiny_config.optim.seed)
    before = create_classifier(tiny_config, 3).backbone.state_dict()
    train(tiny_config, report)
    frozen = load_checkpoint(tiny_config.run.out).model.backbone.state_dict()
    assert all(tensor.equal(before[name]) for name, tensor in frozen.items())
    tuned = elsewhere(tiny_config, "tuned")
    tuned = replace(tuned, backbone=replace(tuned.backbone, finetune=True))
    train(tuned, report)
    moved = load_checkpoint(tuned.run.out).model.backbone.state_dict()
    assert not any(tensor.equal(before[name]) for name, tensor in moved.items() if name.endswith("weight"))


def test_last_layers_are_trained_on_what_enters_them(tiny_config, report):
    torch.manual_seed(tiny_config.optim.seed)
    before = create_classifier(tiny_config, 3).backbone.state_dict()
    tuned = replace(tiny_config, backbone=replace(tiny_config.backbone, finetune_from="layer4"))
    tuned = replace(tuned, data=replace(tuned.data, val_fraction=0.3), optim=replace(tuned.optim, lr=3e-3))
    train(tuned, report)
    assert "fine-tuned from layer4 on" in said(report)
    assert "maps that enter layer4" in said(report)
    after = load_checkpoint(tuned.run.out).model.backbone.state_dict()
    last = {name for name in before if name.startswith("model.layer4.")}
    # Statistics of batch norm follow in the last layers alone.
    assert {name for name, value in after.items() if not value.equal(before[name])} == last
    for name, rate in ("backbone", 1e-5), ("both", 0.0):
        slower = replace(tuned, optim=replace(tuned.optim, backbone_lr=rate, weight_decay=0.0))
        train(replace(slower, run=replace(tuned.run, out=tuned.run.out.with_name(name))), report)
        found = load_checkpoint(tuned.run.out.with_name(name)).model.backbone.state_dict()
        moved = {k: (found[k] - before[k]).abs().max() for k in last if k.endswith("weight")}
        assert 0 <= max(moved.values()) < (1e-7 if name == "both" else 3e-4)


def test_augmentation_of_images_reaches_the_run(tiny_config, report, monkeypatch):
    seen = []
    transform = prepare.train_transform
    monkeypatch.setattr(
        prepare, "train_transform", lambda *a, **options: seen.append(options) or transform(*a, **options)
    )
    options = {"rand_augment": 5, "color_jitter": 0.2, "random_erasing": 0.3}
    config = with_(replace(tiny_config, backbone=replace(tiny_config.backbone, finetune=True)), **options)
    assert train(with_(config, epochs=1), report).metrics is not None
    assert seen == [options]


def test_validation_split_is_followed(tiny_config, report, photos):
    for split, share in (("train", slice(0, 6)), ("val", slice(6, 8)), ("test", slice(8, 10))):
        for name in ("red", "green", "blue"):
            for path in sorted((photos / name).iterdir())[share] if (photos / name).is_dir() else ():
                target = photos.parent / "split" / split / name
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
    data = replace(tiny_config.data, root=photos.parent / "split")
    train(replace(tiny_config, data=data), report)
    epochs = numbers(tiny_config.run.out)["epochs"]
    assert all(0 <= epoch["val_accuracy"] <= 1 for epoch in epochs)
    # Random guesses among three classes have a cross entropy of log 3 = 1.1.
    assert 0.5 < epochs[0]["val_loss"] < 3
    assert f"validation loss {epochs[-1]['val_loss']:.4g}  validation accuracy" in said(report)


@pytest.mark.parametrize(
    ("part", "option", "words"),
    [
        ("optim", {"epochs": 0}, "--epochs"),
        ("optim", {"batch_size": 1}, "--batch-size"),
        ("optim", {"lr": float("nan")}, "--lr"),
        ("optim", {"guidance_weight": -1.0}, "--guidance-weight"),
        ("head", {"rd_ratio": 7.0}, "rd_ratio"),
        ("head", {"drop_rate": 1.5}, "drop_rate"),
        ("run", {"device": "abacus"}, "--device"),
        ("backbone", {"backbone": "nonesuch"}, "--backbone"),
        ("backbone", {"finetune_from": "nonesuch"}, "--finetune-from nonesuch cannot be used"),
        ("backbone", {"finetune_from": "layer4", "finetune": True}, "leave out one of them"),
    ],
)
def test_bad_option_leaves_nothing_behind(tiny_config, report, part, option, words):
    config = replace(tiny_config, **{part: replace(getattr(tiny_config, part), **option)})
    with pytest.raises(TrainError, match=words) as raised:
        train(config, report)
    assert "\n" not in str(raised.value)
    assert not config.run.out.exists()


def test_unreadable_image_leaves_nothing_behind(tiny_config, report, photos):
    (photos / "red" / "3.png").write_bytes(b"broken")
    with pytest.raises(TrainError, match=r"3\.png"):
        train(tiny_config, report)
    assert not tiny_config.run.out.exists()


def test_folder_of_an_earlier_run_is_not_overwritten(tiny_config, report):
    tiny_config.run.out.mkdir()
    (tiny_config.run.out / "notes.txt").write_text("mine")
    with pytest.raises(TrainError, match="--overwrite"):
        train(tiny_config, report)
    assert [path.name for path in tiny_config.run.out.iterdir()] == ["notes.txt"]


def test_dollar_signs_are_drawn(tiny_config, report, photos):
    (photos / "red").rename(photos / "$_$")
    (photos / "blue").rename(photos / "$5 #1")
    outcome = train(tiny_config, report)
    assert outcome.gallery is not None


def test_overwriting_removes_what_was_made_of_the_older_run(tiny_config, report):
    train(tiny_config, report)
    (tiny_config.run.out / "evaluation.json").write_text("{}")
    train(replace(tiny_config, run=replace(tiny_config.run, overwrite=True)), report)
    assert not (tiny_config.run.out / "evaluation.json").exists()
