"""Where the numbers of a run go besides log.jsonl: CSV files, TensorBoard, Weights & Biases, MLflow.

A package is imported when its logger starts. Servers, projects and offline modes are set as these packages
document it, by WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and the like.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ggam_fast.training.errors import TrainError, first_line
from ggam_fast.training.system.files import write_atomically

PROJECT = "ggam-fast"
CSV, BOARD, WANDB = "csv", "tensorboard", "wandb"
"""Folders that loggers make in the folder of a run."""


class Logger:
    """One place for the numbers of a run.

    `folder`: that of the run. `steps`: steps before a run was resumed, or None for a new run. `options`:
    every option of the run. `id`: the name that the service gave to the run before it was stopped, if it did.
    """

    package: str | None = None
    service = False
    """Whether what was written stays, as in a service. Files lose their numbers after step `steps`."""
    id: str | None = None

    def __init__(self, folder: Path, steps: int | None, options: Mapping[str, Any], id: str | None) -> None:
        raise NotImplementedError

    def numbers(self, part: str, step: int, numbers: Mapping[str, float]) -> None:
        """Write the numbers of one `part` of the run after `step` steps."""
        raise NotImplementedError

    def picture(self, name: str, step: int, path: Path) -> None:
        """Add an image file."""

    def close(self, finished: bool) -> None:
        """End. A run that is not `finished` may be resumed."""


class CsvLogger(Logger):
    """A file csv/PART.csv for each part, with a column for each number."""

    def __init__(self, folder: Path, steps: int | None, options: Mapping[str, Any], id: str | None) -> None:
        self._folder = folder / CSV
        if steps is None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(exist_ok=True)
        self._columns: dict[str, list[str]] = {}
        for path in self._folder.glob("*.csv"):
            with path.open(newline="") as file:
                found = csv.DictReader(file)
                # A killed run may have left a line without an end.
                kept = [row for row in found if None not in row.values() and int(row["step"]) <= (steps or 0)]
                self._write(path.stem, list(found.fieldnames or ()), kept)

    def numbers(self, part: str, step: int, numbers: Mapping[str, float]) -> None:
        row = {"step": step, **numbers}
        known = self._columns.get(part, [])
        path = self._folder / f"{part}.csv"
        if not row.keys() <= set(known):
            before = []
            if path.is_file():
                with path.open(newline="") as file:
                    before = list(csv.DictReader(file))
            self._write(part, list(dict.fromkeys([*known, *row])), before)
        with path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns[part]).writerow(row)

    def _write(self, part: str, columns: list[str], rows: Sequence[Mapping[str, Any]]) -> None:
        self._columns[part] = columns

        def write(path: Path) -> None:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(rows)

        write_atomically(self._folder / f"{part}.csv", write)


class TensorBoardLogger(Logger):
    package = "tensorboard"

    def __init__(self, folder: Path, steps: int | None, options: Mapping[str, Any], id: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._board = SummaryWriter(str(folder / BOARD), purge_step=None if steps is None else steps + 1)
        if steps is None:
            plain = {name: value for name, value in _plain(options).items() if value is not None}
            for summary in hparams(plain, {"test/accuracy": 0.0}):
                self._board._get_file_writer().add_summary(summary)

    def numbers(self, part: str, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._board.add_scalar(f"{part}/{name}", value, step)

    def picture(self, name: str, step: int, path: Path) -> None:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._board.add_image(name, pixels, step, dataformats="HWC")

    def close(self, finished: bool) -> None:
        self._board.close()


class WandbLogger(Logger):
    package = "wandb"
    service = True

    def __init__(self, folder: Path, steps: int | None, options: Mapping[str, Any], id: str | None) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.absolute().name,
            dir=str(folder),
            id=id,
            resume="allow" if id else None,
            config=None if id else _plain(options),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.id = self._run.id

    def numbers(self, part: str, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({f"{part}/{name}": value for name, value in numbers.items()}, step=step)

    def picture(self, name: str, step: int, path: Path) -> None:
        self._run.log({name: self._wandb.Image(str(path))}, step=step)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MlflowLogger(Logger):
    package = "mlflow"
    service = True

    def __init__(self, folder: Path, steps: int | None, options: Mapping[str, Any], id: str | None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = client = MlflowClient()
        if id is not None:
            client.update_run(id, status="RUNNING")
            self.id = id
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = client.get_experiment_by_name(name)
        number = client.create_experiment(name) if experiment is None else experiment.experiment_id
        self.id = client.create_run(number, run_name=folder.absolute().name).info.run_id
        client.log_batch(self.id, params=[Param(key, str(value)) for key, value in _plain(options).items()])

    def numbers(self, part: str, step: int, numbers: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(f"{part}/{name}", value, now, step) for name, value in numbers.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def picture(self, name: str, step: int, path: Path) -> None:
        self._client.log_artifact(self.id, str(path))

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


LOGGERS: dict[str, type[Logger]] = {
    "csv": CsvLogger,
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
}


def check_loggers(names: Sequence[str]) -> None:
    """Raise a `TrainError` if a package that `--log-to` needs is not installed."""
    for name in names:
        package = LOGGERS[name].package
        if package is not None and importlib.util.find_spec(package) is None:
            raise TrainError(f"--log-to {name} needs the package {package}: pip install {package}")


def start_logger(
    name: str, folder: Path, steps: int | None, options: Mapping[str, Any], id: str | None
) -> Logger:
    """The logger called `name`.

    Raises:
        TrainError: it cannot start, for example without a key of its service.
    """
    try:
        return LOGGERS[name](folder, steps, options, id)
    except Exception as error:  # each package has its own
        raise TrainError(f"--log-to {name} cannot start: {first_line(error).strip()}") from error


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Paths and tuples as text. All other options are numbers, text or None."""

    def plain(value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float):
            return value
        return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)

    return {name: plain(value) for name, value in options.items()}
