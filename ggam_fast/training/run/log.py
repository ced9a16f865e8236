"""The log of a run: a file with one JSON object per line, and the loggers that the user chose."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ggam_fast.training.errors import TrainError, first_line
from ggam_fast.training.run.loggers import LOGGERS, WANDB, Logger, start_logger
from ggam_fast.training.system.files import write_atomically

logger = logging.getLogger(__name__)

LOG = "log.jsonl"
IDS = "log-ids.json"
"""Names that services gave to this run. A resumed run goes on under the same ones."""


class RunLog:
    """Writes to `folder`, and to the loggers called `names`, which record the `options` of the run.

    Services start at once, because they can fail. Files are opened in a `with` block. `steps`: steps before a
    run was resumed, or None for a new run. An interrupted run may have left records after them. Files lose
    these, and to a service they are not sent again.

    Raises:
        TrainError: a logger cannot start.
    """

    def __init__(
        self,
        folder: Path,
        steps: int | None = None,
        names: Sequence[str] = ("tensorboard",),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder, self._steps, self._options = folder, steps, options or {}
        self._loggers: dict[str, Logger] = {}
        self._sent: dict[str, dict[str, int]] = {}
        resumed = steps is not None
        self._before = _records(folder / LOG) if resumed else []
        self._ids = json.loads((folder / IDS).read_text()) if resumed and (folder / IDS).is_file() else {}
        self._files = [name for name in dict.fromkeys(names) if not LOGGERS[name].service]
        new = not (folder / WANDB).exists()
        try:
            for name in dict.fromkeys(names):
                if LOGGERS[name].service:
                    self._start(name)
        except TrainError:
            for one in self._loggers.values():
                one.close(finished=False)
            if new:
                shutil.rmtree(folder / WANDB, ignore_errors=True)
            raise

    def _start(self, name: str) -> None:
        self._loggers[name] = start_logger(
            name, self._folder, self._steps, self._options, self._ids.get(name)
        )
        if LOGGERS[name].service and name in self._ids:
            self._sent[name] = {record["part"]: record["step"] for record in self._before}

    def __enter__(self) -> RunLog:
        new = {name: one.id for name, one in self._loggers.items() if one.id is not None}
        if new:
            text = json.dumps({**self._ids, **new}) + "\n"
            write_atomically(self._folder / IDS, lambda part: part.write_text(text))
        for name in self._files:
            self._start(name)
        kept = [record for record in self._before if record["step"] <= (self._steps or 0)]
        text = "".join(f"{json.dumps(record)}\n" for record in kept)
        write_atomically(self._folder / LOG, lambda part: part.write_text(text))
        self._file = (self._folder / LOG).open("a", buffering=1)  # write each line as soon as it is whole
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        self._file.close()
        for name in list(self._loggers):
            self._call(name, lambda one: one.close(kind is None))

    def numbers(self, part: str, step: int, numbers: Mapping[str, float]) -> None:
        """Write the numbers of one `part` of the run after `step` steps.

        The parts are "train" (every few steps), "val" and "epoch" (every epoch) and "test" (the end).
        """
        record: dict[str, Any] = {"part": part, "step": step, **numbers}
        self._file.write(json.dumps(record) + "\n")
        for name in list(self._loggers):
            if step > self._sent.get(name, {}).get(part, -1):
                self._call(name, lambda one: one.numbers(part, step, numbers))

    def picture(self, name: str, step: int, path: Path) -> None:
        """Add an image file."""
        for one in list(self._loggers):
            self._call(one, lambda logger: logger.picture(name, step, path))

    def _call(self, name: str, call: Callable[[Logger], object]) -> None:
        """A service that fails is left out from then on. It must not end a long run."""
        one = self._loggers[name]
        try:
            call(one)
        except Exception as error:
            if not one.service:
                raise
            del self._loggers[name]
            logger.warning(f"--log-to {name} failed, and the run goes on without it: {first_line(error)}")


def _records(path: Path) -> list[dict[str, Any]]:
    """The records of a log, without a last line that a killed run did not finish."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
            found.append({**record, "part": str(record["part"]), "step": int(record["step"])})
        except (ValueError, KeyError, TypeError):
            continue
    return found
