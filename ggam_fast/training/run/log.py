"""The log of a run: TensorBoard scalars, and a file with one JSON object per line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from ggam_fast.training.system.files import write_atomically

LOG = "log.jsonl"
BOARD = "tensorboard"


class RunLog:
    """Writes to `folder`.

    An interrupted run may have left records after step `steps`. They are dropped first.
    """

    def __init__(self, folder: Path, steps: int = 0) -> None:
        self._path = folder / LOG
        kept = ""
        if steps and self._path.is_file():
            lines = [line for line in self._path.read_text().splitlines() if _steps(line) <= steps]
            kept = "".join(f"{line}\n" for line in lines)
        write_atomically(self._path, lambda part: part.write_text(kept))
        self._file = self._path.open("a", buffering=1)  # write each line as soon as it is whole
        self._board = SummaryWriter(str(folder / BOARD), purge_step=steps + 1 if steps else None)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *raised: object) -> None:
        self._file.close()
        self._board.close()

    def numbers(self, part: str, step: int, numbers: dict[str, float]) -> None:
        """Write the numbers of one `part` of the run, such as "train" or "val", after `step` steps."""
        record: dict[str, Any] = {"part": part, "step": step, **numbers}
        self._file.write(json.dumps(record) + "\n")
        for name, value in numbers.items():
            self._board.add_scalar(f"{part}/{name}", value, step)

    def picture(self, name: str, step: int, path: Path) -> None:
        """Add an image file to TensorBoard."""
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._board.add_image(name, pixels, step, dataformats="HWC")


def _steps(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a killed run was writing this line
        return float("inf")
