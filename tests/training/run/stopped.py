"""Stop runs on purpose, and compare their results."""

from functools import partialmethod
from pathlib import Path

from safetensors.torch import load_file

from ggam_fast.training.run.loop import Trainer


class Stopped(BaseException):
    """A test raises this at the point where a run would be killed."""


def stop_after(monkeypatch, steps: int) -> None:
    step = Trainer._step

    def counted(fit):
        if fit.steps == steps:
            raise Stopped
        step(fit)

    monkeypatch.setattr(Trainer, "_step", counted)


def weights(folder, name="model.safetensors"):
    return load_file(folder / name)


def same(ours, theirs) -> bool:
    return ours.keys() == theirs.keys() and all(t.equal(theirs[name]) for name, t in ours.items())


def full_disk(monkeypatch, name: str) -> None:
    """Make the disk full for files called `name`."""
    write, write_text = Path.write_bytes, Path.write_text

    def half(path, content, *rest, whole):
        if path.name != name:
            return whole(path, content, *rest)
        whole(path, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", partialmethod(half, whole=write))
    monkeypatch.setattr(Path, "write_text", partialmethod(half, whole=write_text))
