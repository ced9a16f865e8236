"""Snapshots are written whole, and the last three are kept."""

from dataclasses import replace

import pytest
import torch

from ggam_fast.training.errors import TrainError
from ggam_fast.training.run import resume_state
from ggam_fast.training.run.train import train
from tests.training.run.stopped import full_disk, same, weights
from tests.training.runs import said


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


def flip(path, position) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_never_read(tmp_path, report):
    """A flipped bit is found, or it lies where nothing is read from."""
    state = {"x": torch.arange(3.0), "steps": 5}
    resume_state.save_snapshot(tmp_path, 1, state)
    path = resume_state.save_snapshot(tmp_path, 2, state)
    whole, found = path.read_bytes(), 0
    for position in range(0, len(whole), 3):
        flip(path, position)
        read = resume_state.load_snapshot(tmp_path)
        assert read["x"].equal(state["x"])
        assert read["steps"] == 5
        path.write_bytes(whole)
        found = said(report).count("cannot read snapshot")
    assert found > 40


@pytest.mark.parametrize("damage", ["flipped", "cut off", "empty"])
def test_a_run_goes_on_from_the_newest_good_snapshot(tiny_config, report, damage):
    train(tiny_config, report)
    out = tiny_config.run.out
    first = weights(out)
    *_, middle, newest = sorted((out / resume_state.FOLDER).iterdir())
    for path in (middle, newest):
        content = path.read_bytes()
        if damage == "flipped":
            flip(path, len(content) // 2)
        else:
            path.write_bytes(content[:100] if damage == "cut off" else b"")
    train(replace(tiny_config, run=replace(tiny_config.run, resume=out)), report)
    for path in (middle, newest):
        assert f"cannot read snapshot {path}: " in said(report)
    assert "resumed after 12 steps" in said(report)
    assert same(weights(out), first)
    names = sorted(path.name for path in (out / resume_state.FOLDER).iterdir())
    assert names == ["step-000000012.pt", "step-000000018.pt", "step-000000024.pt"]


def test_damaged_later_snapshots_do_not_push_good_ones_out(tmp_path):
    for steps in (1, 2, 3):
        resume_state.save_snapshot(tmp_path, 10 * steps, {"steps": 10 * steps})
    for steps in (20, 30):
        (tmp_path / resume_state.FOLDER / f"step-{steps:09d}.pt").write_bytes(b"damaged")
    assert resume_state.load_snapshot(tmp_path)["steps"] == 10
    resume_state.save_snapshot(tmp_path, 15, {"steps": 15})
    names = sorted(path.name for path in (tmp_path / resume_state.FOLDER).iterdir())
    assert names == ["step-000000010.pt", "step-000000015.pt"]


def test_without_a_good_snapshot_it_is_one_line(tiny_config, report):
    train(tiny_config, report)
    for path in (tiny_config.run.out / resume_state.FOLDER).iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TrainError, match=r"cannot read snapshot \S+12\.pt: .*no other snapshot") as raised:
        train(replace(tiny_config, run=replace(tiny_config.run, resume=tiny_config.run.out)), report)
    assert "\n" not in str(raised.value)
