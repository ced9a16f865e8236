"""What all readers do: find a data set's folder, and read its text files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ggam_fast.training.errors import TrainError


def base_folder(root: Path, name: str, needed: Sequence[str]) -> Path:
    """`root / name` or `root` itself, whichever holds all needed files.

    Raises:
        TrainError: neither holds them. The message names the missing ones.
    """
    folder = root / name if (root / name).is_dir() else root
    missing = [entry for entry in needed if not (folder / entry).exists()]
    if missing:
        raise TrainError(f"--root {root} is incomplete: {', '.join(missing)} not found in {folder}")
    return folder


def lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8, with or without a byte order mark, without empty ones.

    Raises:
        TrainError: the file cannot be read.
    """
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise TrainError(f"cannot read {path}: {error}") from error


def numbered(path: Path) -> dict[int, str]:
    """A dictionary from lines that hold a number, spaces or tabs, and a text."""
    found = {}
    for line in lines(path):
        number, *text = line.split(None, 1)
        if not number.isdigit() or not text:
            raise TrainError(f"{path}: expected a number and a text; got {line!r}")
        found[int(number)] = text[0]
    return found


def rows_of(split_of_row: Sequence[str], name: str) -> Tensor:
    """The numbers (int64) of the rows of one split."""
    return torch.tensor([row for row, split in enumerate(split_of_row) if split == name], dtype=torch.int64)
