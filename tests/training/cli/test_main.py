"""The command as a process: its exit codes, its one-line errors and Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ggam_fast
from ggam_fast.training import load_checkpoint
from ggam_fast.training.cli import main
from ggam_fast.training.cli.commands import COMMANDS
from tests.training.conftest import TINY


def test_train_on_a_folder_end_to_end(run_command, photos, tmp_path):
    done = run_command("train", "--data", "folder", "--root", photos, *TINY, "--no-compile", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert "30 images (24 train, 6 test), 3 classes" in done.stdout
    assert re.search(r"│ green\s+│\s+2 │", done.stdout)
    assert "always the commonest class: 0.333" in done.stdout
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert results["test"]["images"] == 6
    assert len(results["epochs"]) == 2
    assert (tmp_path / "out" / "gallery.png").stat().st_size > 10_000
    checkpoint = load_checkpoint(tmp_path / "out")
    assert checkpoint.classes == ("blue", "green", "red")
    assert checkpoint.model(torch.zeros(2, 3, 64, 64)).shape == (2, 3)
    # The folder holds only the results and the cache that the test asked for.
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "out", "cache"}
    assert not list((tmp_path / "cache").rglob("*.part"))


@pytest.mark.parametrize(
    ("number", "options"), [(signal.SIGINT, ()), (signal.SIGTERM, ("--finetune", "--workers", "1"))]
)
def test_first_interrupt_leaves_a_checkpoint(command, environment, photos, tmp_path, number, options):
    """A terminal and a batch system send the signal to all processes of the run, and this one twice."""
    arguments = command(
        *("train", "--data", "folder", "--root", photos, *TINY, "--no-compile", "--out", "out"),
        *("--epochs", "100000", *options),
    )
    process = subprocess.Popen(
        arguments, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                break
        os.killpg(process.pid, number)
        if number == signal.SIGTERM:
            process.send_signal(number)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    steps = re.search(r"interrupted after (\d+) steps; checkpoint: out/model\.safetensors", out)
    assert steps is not None
    assert load_checkpoint(tmp_path / "out").model(torch.zeros(1, 3, 64, 64)).isfinite().all()
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert (tmp_path / "out" / "snapshots" / f"step-{int(steps[1]):09d}.pt").exists()
    assert not list((tmp_path / "out").rglob(".*"))


def _break_image(photos: Path) -> None:
    (photos / "red" / "5.png").write_bytes(b"broken")


def _empty_class(photos: Path) -> None:
    (photos / "yellow").mkdir()


@pytest.mark.parametrize(
    ("spoil", "arguments", "words"),
    [
        (None, ("--root", "nowhere"), "nowhere is not a folder"),
        (_empty_class, (), "yellow"),
        (_break_image, (), "5.png"),
        (None, ("--backbone", "test_resnt"), "test_resnet"),
        (None, ("--out", "photos/red/0.png/out"), "--out"),
        (None, ("--data", "elpv"), "--root"),
    ],
)
def test_bad_input_is_one_line_and_code_2(photos, tmp_path, monkeypatch, capsys, spoil, arguments, words):
    monkeypatch.chdir(tmp_path)
    if spoil is not None:
        spoil(photos)
    before = sorted(tmp_path.rglob("*"))
    folder = ("--data", "folder", "--root", str(photos), "--cache-dir", "cache", "--out", "out")
    assert main(["train", *folder, *TINY, "--no-compile", *arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert error.startswith("ggam-fast: ")
    assert words in error
    assert {path for path in tmp_path.rglob("*") if path.name != "cache"} == set(before)


def test_bad_input_has_no_traceback_in_a_shell_either(run_command):
    done = run_command("train", "--data", "folder", "--root", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ggam-fast: --root nowhere is not a folder\n"


def test_unknown_option_is_code_2(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["train", "--nonesuch"])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert "--nonesuch" in error
    assert "ggam-fast train --help" in error


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ggam-fast {ggam_fast.__version__}\n"


def test_missing_extra_says_what_to_install(tmp_path, environment):
    """The test hides timm, as on a machine that has only the core."""
    code = (
        "import importlib.util as u, sys; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'timm' else find(name, *a)\n"
        "from ggam_fast.training.cli import main; sys.exit(main(['train']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "timm" in done.stderr
    assert "[train]" in done.stderr


def test_importing_the_core_imports_no_training(environment):
    code = "import sys, ggam_fast; print([m for m in sys.modules if 'training' in m or m == 'timm'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.slow
def test_without_a_compiler_it_says_so_and_goes_on(run_command, photos, environment, tmp_path):
    environment["CXX"] = "no-such-compiler"
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "inductor")
    environment["PATH"] = os.path.dirname(sys.executable)
    started = time.monotonic()
    done = run_command("train", "--data", "folder", "--root", photos, *TINY, "--out", "out")
    assert done.returncode == 0, (done.stderr, time.monotonic() - started)
    assert "running eagerly because torch.compile failed" in done.stdout
    assert "Traceback" not in done.stderr


def test_system_errors_are_one_line_too(monkeypatch, capsys):
    def full(arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(COMMANDS, "train", full)
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "ggam-fast: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory\nand more"), MemoryError("CUDA out of memory")],
)
def test_too_little_memory_is_one_line_too(monkeypatch, capsys, error):
    def fails(arguments):
        raise error

    monkeypatch.setitem(COMMANDS, "train", fails)
    assert main(["train"]) == 2
    error = capsys.readouterr().err
    assert (
        error
        == "ggam-fast: out of memory (CUDA out of memory); a smaller --batch-size or --image-size may help\n"
    )
    monkeypatch.setitem(COMMANDS, "train", lambda _: [][0])
    with pytest.raises(IndexError):
        main(["train"])
