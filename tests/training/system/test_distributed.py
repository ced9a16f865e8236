"""Two processes under torchrun learn the same as one process with batches of twice the size."""

import json
import re
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from ggam_fast.training.system.distributed import ALONE, joined, local_device
from tests.training.conftest import TINY

# In each process, batch norm would see half of each batch. The compared heads therefore have none.
OPTIONS = ("--no-compile", "--hidden-size", "0", "--clip-grad", "1")
LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
def test_two_processes_follow_one(environment, photos, tmp_path):
    folder = ("train", "--data", "folder", "--root", photos, *TINY, *OPTIONS)
    for name, prefix, size in (("one", (sys.executable,), "8"), ("two", LAUNCHER, "4")):
        done = subprocess.run(
            [*prefix, "-m", "ggam_fast.training.cli", *map(str, folder), "--batch-size", size, "--out", name],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("images (") == 1  # only one process prints
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)
    results = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert results[0]["test"]["confusion"] == results[1]["test"]["confusion"]
    assert results[1]["epochs"][-1]["loss"] == pytest.approx(results[0]["epochs"][-1]["loss"], rel=1e-3)


@pytest.mark.slow
def test_two_processes_stop_after_the_same_step_and_go_on_as_two(command, environment, photos, tmp_path):
    """torchrun passes SIGTERM on. One process alone must not take the run over."""
    folder = ("train", "--data", "folder", "--root", photos, *TINY, *OPTIONS, "--batch-size", "4")
    options = (*map(str, folder), "--epochs", "4000", "--out", "out")
    process = subprocess.Popen(
        [*LAUNCHER, "-m", "ggam_fast.training.cli", *options],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                break
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate(timeout=120)
    finally:
        process.kill()
    steps = re.search(r"interrupted after (\d+) steps; checkpoint: out/model\.safetensors", out)
    assert steps is not None, error
    assert int(steps[1]) % 10 == 0
    assert (tmp_path / "out" / "snapshots" / f"step-{int(steps[1]):09d}.pt").exists()
    assert not list((tmp_path / "out").rglob(".part-*"))
    done = subprocess.run(
        command("train", "--resume", "out"),
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert re.fullmatch(
        r"ggam-fast: --resume out: this run has 1 process and the stopped one had 2\. .*\n", done.stderr
    )


def test_one_process_waits_for_nobody():
    with joined() as world:
        assert world is ALONE
    assert world.is_main
    world.barrier()
    assert world.gather("mine") == ["mine"]
    assert world.broadcast("mine") == "mine"
    module = torch.nn.Linear(2, 2)
    assert world.wrap(module, torch.device("cpu")) is module


def test_the_gpu_of_a_process_is_its_local_rank(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device() == "cuda:3"
