"""The best epoch, and when a run has waited long enough for a better one."""

import json
import shutil
from dataclasses import replace

import pytest

from ggam_fast.training.errors import TrainError
from ggam_fast.training.run import resume_state
from ggam_fast.training.run.history import best_epoch, best_text, exhausted
from ggam_fast.training.run.loop import Trainer
from ggam_fast.training.run.train import train
from tests.training.run.stopped import Stopped, same, stop_after, weights
from tests.training.runs import numbers, said, with_

EPOCHS = [
    {"epoch": 1, "loss": 3.0, "val_accuracy": 0.5, "val_loss": 0.9},
    {"epoch": 2, "loss": 2.0, "val_accuracy": 0.7, "val_loss": 0.8},
    {"epoch": 3, "loss": 1.0, "val_accuracy": 0.7, "val_loss": 0.6},
    {"epoch": 4, "loss": 0.5, "val_accuracy": 0.6, "val_loss": float("nan")},
]


def test_the_best_is_the_first_with_the_best_validation():
    assert best_epoch(EPOCHS, "accuracy") == 1
    assert best_epoch(EPOCHS, "loss") == 2
    assert best_epoch([{"epoch": n, "loss": n} for n in (3, 1, 2)], "accuracy") == 1
    assert best_text(EPOCHS, "accuracy") == "best of 4 epochs by validation accuracy: epoch 2, 0.7"
    assert best_text(EPOCHS, "loss") == "best of 4 epochs by validation loss: epoch 3, 0.6"
    assert best_text([{"epoch": 1, "loss": 2}], "loss") == "best of 1 epochs by training loss: epoch 1, 2"


def test_patience_counts_epochs_since_the_best():
    assert not exhausted(EPOCHS, "accuracy", 0)
    assert exhausted(EPOCHS, "accuracy", 2)
    assert not exhausted(EPOCHS, "accuracy", 3)
    assert exhausted(EPOCHS, "loss", 1)
    assert not exhausted(EPOCHS[:3], "loss", 1)
    assert not exhausted([], "loss", 1)


@pytest.fixture
def split_config(tiny_config, photos):
    """`tiny_config` on images with a validation split."""
    root = photos.parent / "split"
    for split, share in (("train", slice(0, 6)), ("val", slice(6, 8)), ("test", slice(8, 10))):
        for folder in photos.iterdir():
            target = root / split / folder.name
            target.mkdir(parents=True)
            for path in sorted(folder.iterdir())[share]:
                shutil.copy(path, target)
    return replace(tiny_config, data=replace(tiny_config.data, root=root))


def validations(monkeypatch, losses, accuracies):
    """Give validation these results instead of its own, one for each epoch."""

    def validated(trainer, val):
        number = len(trainer.history)
        return {"loss": losses[number], "accuracy": accuracies[number]}

    monkeypatch.setattr(Trainer, "_validated", validated)


def test_a_run_stops_early_and_keeps_its_best_by_loss(split_config, report, elsewhere, monkeypatch):
    validations(monkeypatch, [0.9, 0.5, 0.6, 0.7, 0.1, 0.1], [0.5, 0.5, 0.9, 0.5, 0.5, 0.5])
    config = with_(split_config, epochs=6, patience=2, best_by="loss")
    train(config, report)
    out = config.run.out
    assert [epoch["epoch"] for epoch in numbers(out)["epochs"]] == [1, 2, 3, 4]
    assert json.loads((out / "metrics.json").read_text())["best_epoch"] == 2
    assert "no better validation loss for 2 epochs: stopped after epoch 4 of 6" in said(report)
    assert "best of 4 epochs by validation loss: epoch 2, 0.5" in said(report)
    shorter = with_(elsewhere(split_config, "two"), epochs=6, patience=2, best_by="loss")
    with monkeypatch.context() as patch:
        stop_after(patch, 2 * 4)  # two epochs of four steps
        with pytest.raises(Stopped):
            train(shorter, report)
    two = shorter.run.out
    assert same(weights(out, "best.safetensors"), weights(two, "best.safetensors"))
    # A run that has stopped early has nothing left to do.
    train(replace(shorter, run=replace(shorter.run, resume=two)), report)
    train(replace(shorter, run=replace(shorter.run, resume=two)), report)
    assert same(weights(out), weights(two))
    assert max((two / resume_state.FOLDER).iterdir()).name == "step-000000016.pt"
    by_accuracy = with_(elsewhere(split_config, "accuracy"), epochs=6, patience=2)
    train(by_accuracy, report)
    assert len(numbers(by_accuracy.run.out)["epochs"]) == 5


def test_patience_needs_a_validation_split(tiny_config, report):
    with pytest.raises(TrainError, match="--patience 2 needs a validation split; photos has none"):
        train(with_(tiny_config, patience=2), report)
    assert not tiny_config.run.out.exists()
    with pytest.raises(TrainError, match="--patience must be 0 or more; got -1"):
        train(with_(tiny_config, patience=-1), report)
