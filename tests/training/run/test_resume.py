"""A run that was stopped in any way resumes as if it had not been stopped."""

import json
import random
import signal
import subprocess
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from ggam_fast.training.cli import main
from ggam_fast.training.errors import Interrupted, TrainError
from ggam_fast.training.run import resume_state
from ggam_fast.training.run.train import train
from ggam_fast.training.system.interrupts import InterruptGuard
from tests.training.conftest import TINY
from tests.training.run.stopped import Stopped, full_disk, same, stop_after, weights
from tests.training.runs import numbers, with_

VARIANTS = {
    "frozen, averaged, mixed": {"optim": {"ema": 0.9, "mixup": 0.4}},
    "dropout, accumulated": {"optim": {"accumulate": 2, "clip_grad": 0.5}, "head": {"drop_rate": 0.5}},
    "last layers, averaged": {"optim": {"ema": 0.9}, "backbone": {"finetune_from": "layer4"}},
    "fine-tuned, sgd": {
        "backbone": {"finetune": True},
        "optim": {"optimizer": "sgd", "schedule": "cosine", "cutmix": 1.0, "mixup": 1.0},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
# The kill comes before the first snapshot, after one between epochs, and after one within an epoch.
@pytest.mark.parametrize("killed_after", [1, 7, 9])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    tiny_config, report, elsewhere, monkeypatch, variant, killed_after
):
    config = tiny_config
    for part, options in VARIANTS[variant].items():
        config = replace(config, **{part: replace(getattr(config, part), **options)})
    train(config, report)
    stopped = elsewhere(config, "stopped")
    stopped = replace(stopped, run=replace(stopped.run, save_every=2))
    with monkeypatch.context() as patch:
        stop_after(patch, killed_after)
        with pytest.raises(Stopped):
            train(stopped, report)
    out = stopped.run.out
    if not (out / resume_state.FOLDER).is_dir():  # killed before its first snapshot
        assert killed_after == 1
        with pytest.raises(TrainError, match="no snapshot"):
            train(replace(stopped, run=replace(stopped.run, resume=out)), report)
        return
    torch.rand(7), np.random.rand(3), random.random()  # noqa: NPY002
    train(replace(stopped, run=replace(stopped.run, resume=out)), report)
    assert same(weights(out), weights(config.run.out))
    assert same(weights(out, "best.safetensors"), weights(config.run.out, "best.safetensors"))
    assert numbers(out) == numbers(config.run.out)


@pytest.mark.slow
@pytest.mark.parametrize("most", [2, pytest.param(50, marks=pytest.mark.fuzz)])
def test_kill_9_at_a_random_moment(command, environment, photos, tmp_path, most):
    """The run is killed again and again from outside, until it is done."""
    options = ("train", "--data", "folder", "--root", photos, *TINY, "--no-compile", "--save-every", "1")
    options = (
        *options,
        "--finetune",
        "--workers",
        "0",
        "--drop-rate",
        "0.3",
        "--ema",
        "0.9",
        "--mixup",
        "0.4",
    )
    options = (*options, "--epochs", "4" if most == 2 else "40")
    run = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    subprocess.run(command(*options, "--out", "whole"), **run, check=True, timeout=240)
    arguments, kills = (*options, "--out", "killed"), 0

    def written():
        return set((tmp_path / "killed" / resume_state.FOLDER).glob("step-*"))

    while True:
        process = subprocess.Popen(command(*arguments), **run)
        before = written()
        if kills < most:
            deadline = time.monotonic() + 120
            while written() <= before and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(random.random() * 0.1)
            process.send_signal(signal.SIGKILL)
        _, error = process.communicate(timeout=240)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, error
        kills += 1
        arguments = ("train", "--resume", "killed")
    assert kills == most
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(steps)
    assert not list((tmp_path / "killed").rglob(".*"))


@pytest.mark.parametrize(
    "name", ["options.yaml", "step-000000012.pt", "best.safetensors", "model.safetensors", "metrics.json"]
)
def test_after_a_full_disk_a_run_goes_on(tiny_config, report, elsewhere, monkeypatch, name):
    """A full disk gives one line and no partial file. With room again, the run gives the usual bits."""
    train(tiny_config, report)
    config = elsewhere(tiny_config, "full")
    with monkeypatch.context() as patch:
        full_disk(patch, name)
        with pytest.raises(TrainError, match=rf"^cannot write .*{name}: No space left on device") as raised:
            train(config, report)
    assert "\n" not in str(raised.value)
    out = config.run.out
    assert not (out.is_dir() and list(out.rglob(".*")))
    if not (out / resume_state.FOLDER).is_dir():
        return
    train(replace(config, run=replace(config.run, resume=out)), report)
    for file in ("model.safetensors", "best.safetensors"):
        assert same(weights(out, file), weights(tiny_config.run.out, file))


def test_run_from_before_the_scale_and_eps_could_be_chosen_goes_on(
    tiny_config, report, elsewhere, monkeypatch
):
    config = replace(tiny_config, head=replace(tiny_config.head, attention_scale="printed", norm_eps=1e-5))
    config = replace(config, optim=replace(config.optim, ema=0.9))
    train(config, report)
    stopped = elsewhere(config, "stopped")
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        with pytest.raises(Stopped):
            train(stopped, report)
    out = stopped.run.out
    lines = (out / "options.yaml").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("attention_scale:", "norm_eps:"))]
    assert len(kept) == len(lines) - 2
    (out / "options.yaml").write_text("\n".join(kept) + "\n")
    for path in (out / resume_state.FOLDER).iterdir():
        state = torch.load(path, weights_only=True)
        del state["run"]["optim"]["patience"], state["run"]["optim"]["best_by"]
        del state["run"]["head"]["attention_scale"], state["run"]["head"]["norm_eps"]
        del state["fit"]["trained"]["unit_mean"], state["fit"]["average"]["module.unit_mean"]
        torch.save(state, path)
    assert main(["train", "--resume", str(out)]) == 0
    ours, theirs = weights(out), weights(config.run.out)
    assert same(ours, theirs)
    assert not ours["head.unit_mean"]


@pytest.mark.parametrize("finetune", [False, True])
def test_a_finished_run_gets_more_epochs(tiny_config, report, elsewhere, monkeypatch, finetune):
    """The schedule begins anew, and weights and the optimizer's state go on. A kill changes nothing."""
    config = replace(tiny_config, backbone=replace(tiny_config.backbone, finetune=finetune))
    config = with_(config, ema=0.9, epochs=2)
    stopped = elsewhere(config, "stopped")
    for one in (config, stopped):
        train(one, report)
    before = weights(config.run.out)
    longer = with_(replace(config, run=replace(config.run, resume=config.run.out)), epochs=5)
    train(longer, report)
    epochs = numbers(config.run.out)["epochs"]
    assert [epoch["epoch"] for epoch in epochs] == [1, 2, 3, 4, 5]
    assert "epochs: 5" in (config.run.out / "options.yaml").read_text().splitlines()
    assert not same(weights(config.run.out), before)
    records = [json.loads(line) for line in (config.run.out / "log.jsonl").read_text().splitlines()]
    rates = [record["lr"] for record in records if record["part"] == "train"]
    lr = config.optim.lr
    assert rates[1] < 0.2 * lr  # it falls to nothing, rises again, and falls
    assert max(rates[2:]) > 0.5 * lr
    assert rates[-1] < 0.2 * lr
    longer = with_(replace(stopped, run=replace(stopped.run, resume=stopped.run.out, save_every=1)), epochs=5)
    with monkeypatch.context() as patch:
        steps = 2 * (3 if finetune else 6)
        stop_after(patch, steps + 4)
        with pytest.raises(Stopped):
            train(longer, report)
    train(longer, report)
    for file in ("model.safetensors", "best.safetensors"):
        assert same(weights(stopped.run.out, file), weights(config.run.out, file))


def test_a_run_that_is_not_finished_gets_no_more_epochs(tiny_config, report, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        with pytest.raises(Stopped):
            train(tiny_config, report)
    longer = with_(replace(tiny_config, run=replace(tiny_config.run, resume=tiny_config.run.out)), epochs=5)
    with pytest.raises(TrainError, match=r"--epochs 5 extends a finished run; \S+ has 1 of its 4 epochs"):
        train(longer, report)
    assert "epochs: 4" in (tiny_config.run.out / "options.yaml").read_text().splitlines()


def test_killed_in_its_first_epoch(tiny_config, report, elsewhere, monkeypatch):
    train(tiny_config, report)
    config = elsewhere(tiny_config, "killed")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            train(config, report)
    train(replace(config, run=replace(config.run, resume=config.run.out)), report)
    assert same(weights(config.run.out), weights(tiny_config.run.out))


def test_stopped_while_maps_are_computed_changes_nothing(tiny_config, report, tmp_path, monkeypatch):
    train(tiny_config, report)
    out = tiny_config.run.out
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr(InterruptGuard, "check", lambda guard: (_ for _ in ()).throw(Interrupted()))
    fresh = replace(tiny_config, data=replace(tiny_config.data, cache_dir=tmp_path / "other"))
    for change in ({"overwrite": True}, {"resume": out}):
        outcome = train(replace(fresh, run=replace(fresh.run, **change)), report)
        assert outcome.checkpoint is None
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
