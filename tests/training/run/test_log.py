"""A stopped and resumed run has the log of a run without a stop."""

import json
import time
from dataclasses import replace

import pytest

from ggam_fast.training.run import loop
from ggam_fast.training.run.train import train
from tests.training.run.stopped import Stopped, stop_after


def test_logs_of_a_run_that_was_stopped_are_those_of_one_that_was_not(tiny_config, report, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(loop, "_READ_EVERY", 1)
    config = replace(tiny_config, run=replace(tiny_config.run, save_every=5))
    out = config.run.out
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        with pytest.raises(Stopped):
            train(config, report)
    time.sleep(1.1)  # TensorBoard orders the files of a run by the second in which they began
    train(replace(config, run=replace(config.run, resume=out)), report)
    steps = list(range(1, 25))
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in logged if record["part"] == "train"] == steps
    weight = config.optim.guidance_weight
    for record in logged:
        if record["part"] == "train":
            parts = record["cross_entropy"] + weight * record["guidance"]
            assert record["loss"] == pytest.approx(parts, rel=1e-5)
            assert record["cross_entropy"] > 0.5
    board = EventAccumulator(str(out / "tensorboard"))
    board.Reload()
    for name in ("loss", "cross_entropy", "guidance", "accuracy", "lr", "images_per_second"):
        assert [point.step for point in board.Scalars(f"train/{name}")] == steps
    assert board.Scalars("test/accuracy")
    assert len(board.Images("gallery")) == 1
