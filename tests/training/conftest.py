"""Fixtures of the training tests: tiny folders of images, and the command as a subprocess."""

import importlib.util
import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

# Without the `train` extra only the tests of the core run, and these are not collected.
if any(importlib.util.find_spec(name) is None for name in ("timm", "torchvision", "tyro")):
    collect_ignore_glob = ["*test_*.py"]

CHECKOUT = Path(__file__).parents[2]
TINY = (
    *("--backbone", "test_resnet", "--no-pretrained", "--image-size", "64"),
    *("--epochs", "2", "--batch-size", "8", "--hidden-size", "16", "--device", "cpu"),
    "--enlarge",
)


def write_image(path: Path, colour: int, seed: int) -> None:
    """Write noise with one brighter colour channel, a class that any backbone recognises."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 90, (20, 28, 3)).astype("uint8")
    pixels[..., colour] += 120
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of three class folders with ten images each."""
    root = tmp_path / "photos"
    for colour, name in enumerate(("red", "green", "blue")):
        for index in range(10):
            write_image(root / name / f"{index}.png", colour, seed=10 * colour + index)
    return root


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of `ggam-fast`, as a list."""
    return lambda *arguments: [
        *(sys.executable, "-m", "ggam_fast.training.cli"),
        *map(str, arguments),
    ]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Environment variables: one thread, this checkout first, and a cache for this test alone."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(CHECKOUT),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "COLUMNS": "100",
    }


@pytest.fixture
def run_command(
    tmp_path: Path, command: Callable[..., list[str]], environment: dict[str, str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `ggam-fast` in an empty folder and return its output."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments),
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return run


@pytest.fixture
def tiny_config(tmp_path: Path, photos: Path):
    """A `TrainConfig` for `photos` with a tiny backbone."""
    from ggam_fast.training.config.options import (
        BackboneConfig,
        DataConfig,
        HeadConfig,
        OptimConfig,
        RunConfig,
        TrainConfig,
    )

    return TrainConfig(
        data=DataConfig("folder", photos, 64, cache_dir=tmp_path / "cache", enlarge=True),
        backbone=BackboneConfig("test_resnet", pretrained=False),
        head=HeadConfig(hidden_size=16),
        optim=OptimConfig(epochs=4, batch_size=8),
        run=RunConfig(out=tmp_path / "out", compile=False, device="cpu"),
    )


@pytest.fixture
def report():
    """A `Report` that keeps its text and listens to the log."""
    from rich.console import Console

    from ggam_fast.training.show.console import Report

    kept = Report(Console(file=io.StringIO(), width=100))
    with kept.listening():
        yield kept


@pytest.fixture
def elsewhere(tmp_path: Path) -> Callable:
    """A function that returns a configuration with another output folder."""
    return lambda config, name: replace(config, run=replace(config.run, out=tmp_path / name))


@pytest.fixture
def trained(tiny_config, report):
    """A run on `photos` of one epoch."""
    from ggam_fast.training.run.train import train

    train(replace(tiny_config, optim=replace(tiny_config.optim, epochs=1)), report)
    return tiny_config.run.out
