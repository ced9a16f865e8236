"""Open a finished run: its classifier, and the images it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ggam_fast.training.config.options import DataName
from ggam_fast.training.data.image_set import ImageSet
from ggam_fast.training.data.readers import read_images
from ggam_fast.training.errors import TrainError
from ggam_fast.training.model.feature_cache import default_cache_dir
from ggam_fast.training.model.model_file import BEST, WEIGHTS, Checkpoint, load_checkpoint


def open_run(run: Path, weights: str = "last") -> Checkpoint:
    """The checkpoint in a run's folder, or `run` itself if it is a file.

    Raises:
        TrainError: there is no checkpoint, or `run` is a file and the best one was asked for.
    """
    if weights == "best" and run.is_file():
        raise TrainError(f"--weights best needs the folder of a run; {run} is a file")
    return load_checkpoint(run / BEST if weights == "best" else run)


def weights_file(run: Path, weights: str = "last") -> Path:
    """The file that `open_run` opens."""
    return run / (BEST if weights == "best" else WEIGHTS) if run.is_dir() else run


def weights_name(run: Path, weights: str) -> str:
    """The name of the opened checkpoint: "last" or "best" in a folder, or else the file's name."""
    return weights if run.is_dir() else run.name


def run_images(
    checkpoint: Checkpoint, name: DataName | None, root: Path | None, cache_dir: Path | None
) -> ImageSet:
    """The images called `name`, by default those of the run. Their classes must be the checkpoint's.

    Raises:
        TrainError: the classes differ.
    """
    theirs = checkpoint.description["data"]
    splits: dict[str, Any] = {}
    if name is None:
        name = theirs["data"]
        # Older checkpoints do not have these.
        table = theirs.get("split_by")
        splits = {"split_by": table and Path(table), "val_fraction": theirs.get("val_fraction", 0.0)}
        root = root or (Path(theirs["root"]) if theirs["root"] else None)
    assert name is not None
    images = read_images(name, root, cache_dir or default_cache_dir(), **splits)
    if images.classes != checkpoint.classes:
        strangers = sorted(set(images.classes) - set(checkpoint.classes))
        missing = sorted(set(checkpoint.classes) - set(images.classes))
        detail = "; ".join(
            f"{side} has no class {absent[0]}" + (f" nor {len(absent) - 1} more" if absent[1:] else "")
            for side, absent in (("the checkpoint", strangers), ("the data", missing))
            if absent
        )
        raise TrainError(
            f"--data {name} has {len(images.classes)} classes and the checkpoint {len(checkpoint.classes)}. "
            f"They must be the same: {detail or 'their order differs'}"
        )
    return images


def check_splits(checkpoint: Checkpoint, images: ImageSet, root: Path | None) -> None:
    """Raise a `TrainError` if the run's own images, without those that cannot be read, have other splits."""
    theirs = checkpoint.description["data"]
    trained_on = theirs.get("images")  # older checkpoints do not record them
    if trained_on in (None, images.digest()):
        return
    root = root or theirs["root"]
    where = f" --root {root}" if root else ""
    raise TrainError(
        "the run's images are not those it was trained on. Some were added or removed, so training images "
        f"may now be in another split. --data {theirs['data']}{where} uses the present images"
    )
