"""A run keeps its best and last classifier and its snapshots, and no file of an older run."""

import os
from dataclasses import replace

import pytest
import torch

from ggam_fast.training.errors import TrainError
from ggam_fast.training.run import resume_state
from ggam_fast.training.run.train import train
from tests.training.run.stopped import Stopped, same, weights


def test_killed_between_its_best_and_its_snapshot(tiny_config, report, elsewhere, monkeypatch):
    train(tiny_config, report)
    config = elsewhere(tiny_config, "killed")
    save = resume_state.save_snapshot
    with monkeypatch.context() as patch:

        def killed(folder, steps, state):
            if steps:
                assert (folder / "best.safetensors").read_bytes()
            if steps == 12:
                raise Stopped
            return save(folder, steps, state)

        patch.setattr(resume_state, "save_snapshot", killed)
        with pytest.raises(Stopped):
            train(config, report)
    train(replace(config, run=replace(config.run, resume=config.run.out)), report)
    for file in ("model.safetensors", "best.safetensors"):
        assert same(weights(config.run.out, file), weights(tiny_config.run.out, file))


def test_overwriting_leaves_nothing_to_go_on_with_of_the_older_run(tiny_config, report, elsewhere):
    longer = replace(tiny_config, optim=replace(tiny_config.optim, epochs=6))
    train(longer, report)
    out = longer.run.out
    train(replace(tiny_config, run=replace(tiny_config.run, overwrite=True)), report)
    names = sorted(path.name for path in (out / resume_state.FOLDER).iterdir())
    assert names == ["step-000000012.pt", "step-000000018.pt", "step-000000024.pt"]
    assert len(list((out / "tensorboard").iterdir())) == 1
    first = weights(out)
    train(replace(tiny_config, run=replace(tiny_config.run, resume=out)), report)
    assert same(weights(out), first)


def test_another_architecture_or_data_set_is_refused(tiny_config, report, photos):
    train(tiny_config, report)
    resumed = replace(tiny_config, run=replace(tiny_config.run, resume=tiny_config.run.out))
    with pytest.raises(TrainError, match="another head"):
        train(replace(resumed, head=replace(resumed.head, hidden_size=0)), report)
    os.rename(photos / "red", photos / "rouge")
    with pytest.raises(TrainError, match="another classes"):
        train(resumed, report)


def test_another_number_of_processes_is_refused(tiny_config, report, monkeypatch):
    """Other batches would follow, and a schedule of another length."""
    train(tiny_config, report)
    before = weights(tiny_config.run.out)
    resumed = replace(tiny_config, run=replace(tiny_config.run, resume=tiny_config.run.out))
    path = max((tiny_config.run.out / resume_state.FOLDER).iterdir())
    state = torch.load(path, weights_only=True)
    state["fit"]["random"] *= 3
    torch.save(state, path)
    with pytest.raises(
        TrainError, match=r"this run has 1 process and the stopped one had 3\. .*with torchrun --n"
    ):
        train(resumed, report)
    assert same(weights(tiny_config.run.out), before)


def test_images_that_changed_their_split_are_refused(tiny_config, report, photos):
    train(tiny_config, report)
    before = weights(tiny_config.run.out)
    for name in ("red", "green", "blue"):
        (photos / name / "9.png").unlink()
    with pytest.raises(TrainError, match="images were added or removed"):
        train(replace(tiny_config, run=replace(tiny_config.run, resume=tiny_config.run.out)), report)
    assert same(weights(tiny_config.run.out), before)
