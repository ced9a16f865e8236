"""Snapshots are written whole, and the last three are kept."""

from dataclasses import replace

import pytest
import torch

from ggam_fast.training.errors import TrainError
from ggam_fast.training.run import resume_state
from ggam_fast.training.run.train import train
from tests.training.run.stopped import full_disk


def test_last_three_snapshots_stay(tiny_config, report):
    config = replace(tiny_config, optim=replace(tiny_config.optim, epochs=6))
    train(config, report)
    names = sorted(path.name for path in (config.run.out / resume_state.FOLDER).iterdir())
    assert names == ["step-000000024.pt", "step-000000030.pt", "step-000000036.pt"]


def test_full_disk_leaves_the_snapshot_before(tmp_path, monkeypatch):
    resume_state.save_snapshot(tmp_path, 1, {"x": torch.ones(3)})
    full_disk(monkeypatch, "step-000000002.pt")
    with pytest.raises(
        TrainError,
        match=r"cannot write .*snapshots/step-000000002.pt: No space left on device; the last whole snapshot "
        r"is .*0001",
    ):
        resume_state.save_snapshot(tmp_path, 2, {"x": torch.zeros(3)})
    assert [path.name for path in (tmp_path / resume_state.FOLDER).iterdir()] == ["step-000000001.pt"]
    assert resume_state.load_snapshot(tmp_path)["x"].equal(torch.ones(3))


def test_damaged_snapshot_is_one_line(tiny_config, report):
    train(tiny_config, report)
    newest = max((tiny_config.run.out / resume_state.FOLDER).iterdir())
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.raises(TrainError, match="cannot read snapshot") as raised:
        train(replace(tiny_config, run=replace(tiny_config.run, resume=tiny_config.run.out)), report)
    assert "\n" not in str(raised.value)
