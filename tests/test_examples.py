"""Every example runs as written, and its training lowers the loss."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
RUNS = {  # what is typed: the libraries it needs beyond torch
    "plain_loop.py": [],
    "timm_finetune.py --images 48 --epochs 3": ["timm"],
    "torchvision_backbones.py --network resnet50 --images 24 --batch-size 8 --epochs 4": ["torchvision"],
    "torchvision_backbones.py --network vgg16 --images 24 --batch-size 8 --epochs 4": ["torchvision"],
    "lightning_module.py": ["pytorch_lightning"],
    "hf_trainer.py": ["transformers", "accelerate"],
    "hf_model.py": ["transformers", "accelerate"],
    "own_classifier.py --on vector": [],
    "own_classifier.py --on map": [],
}

pytestmark = pytest.mark.slow


def run(command: str, folder: Path) -> str:
    """What an example prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / command.split()[0]), *command.split()[1:]],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^epoch \d+: loss ([0-9.]+)", printed, re.MULTILINE)]


@pytest.mark.parametrize("command", RUNS)
def test_the_loss_falls(command: str, tmp_path: Path) -> None:
    for name in RUNS[command]:
        pytest.importorskip(name)
    printed = run(command, tmp_path)
    found = losses(printed)
    assert len(found) >= 3
    assert found[-1] < found[0]
    assert "loaded again: True" in printed or command != "hf_model.py"


def test_every_example_is_run() -> None:
    run_here = {command.split()[0] for command in RUNS} | {"data.py", "explain_photo.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == run_here


def class_folders(root: Path) -> Path:
    """Three photographs of one colour in each of two class folders; the first one's path."""
    image = pytest.importorskip("PIL.Image")
    for name, colour in (("blue", (20, 40, 200)), ("red", (210, 30, 30))):
        (root / name).mkdir(parents=True)
        for index in range(3):
            image.new("RGB", (90 + index, 70), colour).save(root / name / f"{index}.png")
    return root / "blue" / "0.png"


def test_a_folder_of_images_is_read(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    class_folders(tmp_path / "photos")
    assert losses(run("plain_loop.py --data photos --batch-size 3 --epochs 1", tmp_path))


@pytest.mark.parametrize("own_photo", [False, True])
def test_a_photo_is_explained(own_photo: bool, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    command, names = "explain_photo.py --epochs 2", {"disc", "square", "diamond"}
    if own_photo:
        pytest.importorskip("torchvision")
        photo, names = class_folders(tmp_path / "photos"), {"blue", "red"}
        command += f" --data photos --batch-size 3 --photo {photo.relative_to(tmp_path)}"
    name = run(command, tmp_path).splitlines()[-1].split(",")[0]
    assert name in names
    with image.open(tmp_path / "explained.png") as picture:
        assert picture.width > 2 * picture.height  # three panels
