"""Two processes under torchrun learn the same as one process with batches of twice the size."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from ggam_fast.training.system.distributed import ALONE, joined, local_device
from tests.training.conftest import TINY

# In each process, batch norm would see half of each batch. The compared heads therefore have none.
OPTIONS = ("--no-compile", "--hidden-size", "0", "--clip-grad", "1")


@pytest.mark.slow
def test_two_processes_follow_one(environment, photos, tmp_path):
    folder = ("train", "--data", "folder", "--root", photos, *TINY, *OPTIONS)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    for name, prefix, size in (("one", (sys.executable,), "8"), ("two", launcher, "4")):
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
