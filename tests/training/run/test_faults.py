"""What goes wrong around a run gives one line, and with it mended the run goes on."""

import os
import pickle
import resource
import signal
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ggam_fast.training import load_checkpoint
from ggam_fast.training.cli import main
from ggam_fast.training.data import image_set
from ggam_fast.training.data.image_set import read_image
from ggam_fast.training.data.readers import folder
from ggam_fast.training.data.scan import scan
from ggam_fast.training.errors import TrainError
from ggam_fast.training.model.model_file import WEIGHTS
from ggam_fast.training.run import resume_state
from ggam_fast.training.run.loop import Trainer
from ggam_fast.training.run.train import train
from ggam_fast.training.system.files import write_together
from tests.training.conftest import TINY
from tests.training.run.stopped import same, weights

# ---- processes and data that go


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_worker_is_one_line(photos, tmp_path, monkeypatch, capsys, number):
    parent = os.getpid()

    def dies(*_):
        assert os.getpid() != parent
        os.kill(os.getpid(), number)

    monkeypatch.setattr(image_set, "read_image", dies)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = ("train", "--data", "folder", "--root", photos, *TINY, "--no-compile")
    options = (*options, "--finetune", "--workers", "1", "--out", tmp_path / "out")
    assert main([str(option) for option in options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("ggam-fast: DataLoader worker (pid")
    assert error.endswith("fewer --workers or a smaller --batch-size may help")


def test_a_data_set_that_vanishes(tiny_config, report, elsewhere, monkeypatch, photos):
    """The run says which image is gone. When the images are back, it goes on bit for bit."""
    config = replace(tiny_config, backbone=replace(tiny_config.backbone, finetune=True))
    config = replace(config, data=replace(config.data, workers=0), run=replace(config.run, save_every=2))
    train(config, report)
    gone, step = elsewhere(config, "gone"), Trainer._step

    def vanishing(fit):
        if fit.steps == 5:
            photos.rename(photos.with_name("elsewhere"))
        step(fit)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", vanishing)
        with pytest.raises(TrainError, match=r"^cannot read image \S+\.png: no such file$"):
            train(gone, report)
    photos.with_name("elsewhere").rename(photos)
    train(replace(gone, run=replace(gone.run, resume=gone.run.out)), report)
    assert same(weights(gone.run.out), weights(config.run.out))


# ---- full disks


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to write a file beyond `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", range(0, 100, 5))
def test_a_write_that_ends_anywhere(tmp_path, size):
    """The old files stay, and nothing else."""
    old = {"a.bin": b"1" * 50, "b.bin": b"2" * 50}
    for name, content in old.items():
        (tmp_path / name).write_bytes(content)
    new = {"a.bin": b"3" * 100, "b.bin": b"4" * 100}
    writers = {name: lambda part, new=content: part.write_bytes(new) for name, content in new.items()}
    with largest_file(size), pytest.raises(TrainError, match=r"a\.bin, .*: File too large"):
        write_together(tmp_path, writers)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old
    with largest_file(100):
        write_together(tmp_path, writers)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == new


@pytest.mark.slow
def test_a_run_on_a_disk_that_is_full_at_any_size(tiny_config, report, elsewhere):
    train(tiny_config, report)
    out = tiny_config.run.out
    largest, ended = max(path.stat().st_size for path in out.rglob("*") if path.is_file()), 0
    for i in range(20):
        config = elsewhere(tiny_config, f"full-{i}")
        with (
            largest_file(round(64 * (largest / 64) ** (i / 20))),
            pytest.raises((TrainError, OSError)) as error,
        ):
            train(config, report)
        assert "\n" not in str(error.value)
        full = config.run.out
        assert not (full.is_dir() and list(full.rglob(".*")))
        if list((full / resume_state.FOLDER).glob("step-*.pt")):
            train(replace(config, run=replace(config.run, resume=full)), report)
            assert same(weights(full), weights(out))
            ended += 1
    assert ended


# ---- files of an attacker


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_is_executed(trained, tmp_path, report):
    harm = tmp_path / "harm"
    pickle.loads(pickle.dumps(Payload(harm)))  # it does work
    harm.unlink()
    for path in (trained / resume_state.FOLDER).iterdir():
        path.unlink()
    for number, write in enumerate((torch.save, lambda x, path: path.write_bytes(pickle.dumps(x)))):
        write({"fit": Payload(harm)}, trained / resume_state.FOLDER / f"step-{number:09d}.pt")
    with pytest.raises(TrainError, match="cannot read snapshot"):
        resume_state.load_snapshot(trained)
    for write in (torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))):
        write({"weights": Payload(harm)}, trained / WEIGHTS)
        with pytest.raises(TrainError, match="cannot read checkpoint"):
            load_checkpoint(trained)
    (trained / "options.yaml").write_text(f"data: !!python/object/apply:pathlib.Path.touch [{harm}]\n")
    assert main(["train", "--config", str(trained / "options.yaml")]) == 2
    assert not harm.exists()


def bomb(width: int, height: int) -> bytes:
    """A small PNG that claims to be of this size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    zeros = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zeros) + chunk(b"IEND", b"")


HOSTILE = {
    "bomb": bomb(60_000, 60_000),
    "no pixels": bomb(0, 9),
    "too little data": bomb(4_000, 4_000),
    "TIFF with a circle of pages": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "GIF of a wrong size": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x08",
    "JPEG without a table": b"\xff\xd8\xff\xc0\0\x0b\x08\0\x10\0\x10\x01\x01\x11\0\xff\xd9",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_images_are_refused(photos, kind):
    path = photos / "red" / "0.png"
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(TrainError, match=r"cannot read image \S+0\.png: ") as raised:
        read_image(path)
    assert "\n" not in str(raised.value)
    images = folder.read(photos, photos)
    assert [images.files[one.row] for one in scan(images, range(30)) if one.problem] == [path]
