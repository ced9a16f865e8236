"""Snapshots, from which a run resumes exactly. Each is written in one step. The last three are kept.

A snapshot is a zip file, as torch.save writes it. The CRC-32 of its records are compared when it is read.
"""

from __future__ import annotations

import io
import logging
import random
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ggam_fast.training.errors import TrainError, first_line
from ggam_fast.training.system.files import write_atomically

logger = logging.getLogger(__name__)

FOLDER = "snapshots"
_KEPT = 3
_NAME = re.compile(r"step-(\d+)\.pt")


def save_snapshot(folder: Path, steps: int, state: dict[str, Any]) -> Path:
    """Write `state` (tensors and plain values) as the newest snapshot, and keep the last three.

    Snapshots of later steps were damaged, or this run would have resumed from them. They are removed.

    Raises:
        TrainError: the snapshot cannot be written. Older snapshots are then unchanged.
    """
    path = folder / FOLDER / f"step-{steps:09d}.pt"
    # It is saved in memory first, because torch reports a full disk only as "unexpected pos".
    whole = io.BytesIO()
    torch.save(state, whole)
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, lambda part: part.write_bytes(whole.getbuffer()))
    except (OSError, TrainError) as error:
        kept = _paths(folder)
        held = f"; the last whole snapshot is {kept[-1]}" if kept else ""
        raise TrainError(f"{error}{held}") from error
    kept = _paths(folder)
    later = kept[kept.index(path) + 1 :]
    for old in (*later, *kept[: -_KEPT - len(later)]):
        old.unlink(missing_ok=True)
    return path


def load_snapshot(folder: Path) -> dict[str, Any]:
    """The newest snapshot of the run in `folder` that is not damaged. Damaged ones are logged.

    Raises:
        TrainError: there is no snapshot, or none can be read.
    """
    paths = _paths(folder)
    if not paths:
        raise TrainError(f"--resume {folder} cannot go on: there is no snapshot in {folder / FOLDER}")
    for path in reversed(paths):
        try:
            state = _read(path)
        except Exception as error:  # for a damaged file zipfile and torch raise errors of many kinds
            text = f"cannot read snapshot {path}: {first_line(error)}"
            if path == paths[0]:
                raise TrainError(f"{text}; there is no other snapshot to go on from") from error
            logger.warning(f"{text}; going on from an older one")
        else:
            return state
    raise AssertionError


def _read(path: Path) -> dict[str, Any]:
    # torch.load compares no checksums.
    with zipfile.ZipFile(path) as records:
        damaged = records.testzip()
    if damaged is not None:
        raise ValueError(f"its record {damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def _paths(folder: Path) -> list[Path]:
    if not (folder / FOLDER).is_dir():
        return []
    return sorted(path for path in (folder / FOLDER).iterdir() if _NAME.fullmatch(path.name))


def random_state() -> dict[str, Any]:
    """The state of every random generator that a run draws from."""
    # Libraries share NumPy's legacy generator.
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore a state that `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])
