"""`ggam-fast predict`: the likeliest classes of any number of images, as CSV or JSON lines.

Rows are written batch by batch into the folder OUT.unfinished, and the whole file is moved to OUT at the end.
A stopped prediction goes on after its last whole batch.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ggam_fast.training.config.options import DataConfig
from ggam_fast.training.data.batches import leave_interrupts_to_parent
from ggam_fast.training.data.image_set import eval_transform, read_image, workers
from ggam_fast.training.data.readers.tree import is_hidden, is_image
from ggam_fast.training.errors import Interrupted, TrainError
from ggam_fast.training.model.model_file import Checkpoint
from ggam_fast.training.show.console import Report
from ggam_fast.training.system.devices import device_name, resolve_device
from ggam_fast.training.system.files import locked, writable_folder, write_atomically
from ggam_fast.training.system.interrupts import InterruptGuard
from ggam_fast.training.use.mirrored import with_mirrored
from ggam_fast.training.use.open_run import open_run, weights_file

logger = logging.getLogger(__name__)

_FORMATS = (".csv", ".jsonl")
_ROWS, _PROGRESS, _LOCK = "rows", "progress.json", ".lock"
_NAMED = 5


@dataclass(frozen=True)
class PredictConfig:
    run: tyro.conf.Positional[Path] = tyro.MISSING
    """Folder of a run, or a checkpoint in it."""
    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Image files, and folders of images. Subfolders count too."""
    out: Path = Path("predictions.csv")
    """File of the predictions, .csv or .jsonl. The same command continues a stopped prediction."""
    overwrite: bool = False
    """Replace an older file, and give up a stopped prediction with other options."""
    top_k: int = 5
    """Number of likeliest classes in each row."""
    probabilities: bool = False
    """Write the probability of every class too."""
    weights: Literal["last", "best"] = "last"
    """Classifier of the run. best is that of the best epoch, as --best-by of the training chose it."""
    tta: Literal["none", "flip"] = "none"
    """flip averages the probabilities of each image and of its mirror image. It takes twice the time."""
    batch_size: int = 32
    """Images in a batch."""
    workers: int | None = None
    """Number of processes that decode images. By default 0 on the CPU and up to 8 on a GPU."""
    enlarge: bool = False
    """Allow images that are smaller than the network's input. A run that was trained with this option
    always allows them."""
    device: str = "auto"
    """Device, such as cpu or cuda:1. auto is the first GPU, or the CPU if there is none."""

    def check(self) -> None:
        """Raise a `TrainError` for an option out of range."""
        if not self.images:
            raise TrainError("ggam-fast predict needs a run, and then image files or folders; got none")
        if self.out.suffix not in _FORMATS:
            raise TrainError(f"--out must end in .csv or .jsonl; got {self.out}")
        for name, value, least in (
            ("--top-k", self.top_k, 1),
            ("--batch-size", self.batch_size, 1),
            ("--workers", self.workers, 0),
        ):
            if value is not None and value < least:
                raise TrainError(f"{name} must be {least} or more; got {value}")
        for path in self.images:
            if not path.exists():
                raise TrainError(f"{path} must be an image file or a folder of images; there is no such path")


class Batch(NamedTuple):
    """Some paths, the images (n, 3, size, size) that can be read, and the problems of the others by row."""

    paths: list[Path]
    images: Tensor
    problems: dict[int, str]


def predict(config: PredictConfig, report: Report) -> Path | None:
    """Predict as `config` says, and return the path of the file. After an interruption it is None.

    Raises:
        TrainError: an option is unfit, there are no images, the file exists, a stopped prediction had other
            options or files, or a file cannot be read or written.
    """
    config.check()
    device = resolve_device(config.device)
    checkpoint = open_run(config.run, config.weights)
    checkpoint.model.to(device)
    others: list[Path] = []
    count = sum(1 for _ in image_paths(config.images, others.append))
    if others:
        logger.info(f"files left out because their names are not those of images: {len(others)}, "
                    f"such as {others[0]}")  # fmt: skip
    if not count:
        raise TrainError(f"there is no image in {', '.join(map(str, config.images))}")
    if config.out.exists() and not config.overwrite:
        raise TrainError(f"--out {config.out} exists; choose another file or add --overwrite")
    folder = config.out.with_name(f"{config.out.name}.unfinished")

    def busy() -> None:
        raise TrainError(f"--out {config.out} is in use: another prediction is writing to it")

    with writable_folder(folder), locked(folder / _LOCK, busy), InterruptGuard() as interrupt:
        rows = Rows(folder, config, checkpoint)
        if rows.count:
            logger.info(f"going on after {rows.count} of {count} images")
        try:
            with rows, report.bar("images", count, rows.count) as bar:
                for batch in _batches(config, checkpoint, device, rows.count):
                    interrupt.check()
                    rows.add(batch, _probabilities(checkpoint, batch.images, device, config.tta))
                    bar.advance(len(batch.paths))
        except Interrupted:
            logger.info(f"interrupted after {rows.count} of {count} images; the same command goes on")
            return None
        rows.finish()
    with suppress(OSError):  # another process has begun anew
        folder.rmdir()
    if rows.problems:
        named = ", ".join(rows.named)
        more = f" and {rows.problems - len(rows.named)} more" if rows.problems > len(rows.named) else ""
        logger.warning(f"images without a prediction: {rows.problems}, namely {named}{more}")
    logger.info(f"{config.out}: {rows.count} images; {device_name(device)}")
    return config.out


def image_paths(
    given: Iterable[Path], left_out: Callable[[Path], None] = lambda path: None
) -> Iterator[Path]:
    """Files as they are given, and in their place the images below each folder, in order of their names.

    Hidden files and folders do not count. A folder is read once, also if links lead to it again. `left_out`
    is told the other files.

    Raises:
        TrainError: a folder cannot be read.
    """
    for path in given:
        if not path.is_dir():
            yield path
            continue
        seen: set[str] = set()
        for root, folders, files in os.walk(path, onerror=_refuse, followlinks=True):
            identity = os.path.realpath(root)
            if identity in seen:
                folders.clear()
                continue
            seen.add(identity)
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            for name in sorted(name for name in files if not is_hidden(name)):
                if is_image(name):
                    yield Path(root, name)
                else:
                    left_out(Path(root, name))


def _refuse(error: OSError) -> None:
    raise TrainError(f"cannot read folder {error.filename}: {error.strerror}") from error


class _Decoded(IterableDataset[Batch]):
    """Batches of decoded images in the order of the paths. Each of n workers decodes every n-th batch."""

    def __init__(
        self,
        given: Sequence[Path],
        start: int,
        batch_size: int,
        transform: Callable[[Image.Image], Tensor],
        shape: tuple[int, ...],
        banner: int,
        least: int,
    ) -> None:
        self._given = given
        self._start = start
        self._batch_size = batch_size
        self._transform = transform
        self._shape = shape
        self._banner = banner
        self._least = least

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, size = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        paths = islice(image_paths(self._given), self._start, None)
        index = 0
        while chosen := list(islice(paths, self._batch_size)):
            if index % size == number:
                yield self._decoded(chosen)
            index += 1

    def _decoded(self, paths: list[Path]) -> Batch:
        images, problems = [], {}
        for row, path in enumerate(paths):
            try:
                image = read_image(path, self._banner)
                if min(image.size) < self._least:
                    raise TrainError(
                        f"{path} ({image.width} x {image.height}) is smaller than the crop of "
                        f"{self._least} x {self._least}; enlarge it with --enlarge"
                    )
                images.append(self._transform(image))
            except TrainError as error:
                problems[row] = str(error)
        return Batch(paths, torch.stack(images) if images else torch.empty(0, *self._shape), problems)


def _batches(
    config: PredictConfig, checkpoint: Checkpoint, device: torch.device, start: int
) -> Iterable[Batch]:
    backbone, data = checkpoint.model.backbone, checkpoint.description["data"]
    side = backbone.image_size
    decoded = _Decoded(
        config.images,
        start,
        config.batch_size,
        eval_transform(*backbone.preprocessing),
        (3, side, side),
        int(data.get("banner", 0)),
        0 if config.enlarge or data.get("enlarge", False) else side,
    )
    count = workers(DataConfig(workers=config.workers), device)
    return DataLoader(decoded, batch_size=None, num_workers=count, worker_init_fn=leave_interrupts_to_parent)


@torch.no_grad()
def _probabilities(checkpoint: Checkpoint, images: Tensor, device: torch.device, tta: str) -> Tensor:
    """(n, K) float32 on the CPU."""
    if not len(images):
        return torch.empty(0, len(checkpoint.classes))
    batch = images.to(device).contiguous(memory_format=torch.channels_last)
    logits = checkpoint.model(batch)
    assert isinstance(logits, Tensor)
    if tta == "flip":
        logits = with_mirrored(logits, checkpoint.model(batch.flip(-1)))
    return logits.float().softmax(1).cpu()


class Rows:
    """The rows of a prediction in `folder`, and how far they are.

    `progress.json` counts the whole batches in the file `rows`. What a killed process wrote after them is cut
    off. `count`: images so far. `problems`: how many of them have no prediction.

    Raises:
        TrainError: the rows in the folder were made with other options or of other files.
    """

    def __init__(self, folder: Path, config: PredictConfig, checkpoint: Checkpoint) -> None:
        self._folder = folder
        self._out = config.out
        self._classes = checkpoint.classes
        self._top = min(config.top_k, len(checkpoint.classes))
        self._all = config.probabilities
        self._csv = config.out.suffix == ".csv"
        self._digest = hashlib.sha256()  # of all paths so far
        self.count = self.problems = 0
        self.named: list[str] = []
        self._options = {
            "weights": hashlib.sha256(weights_file(config.run, config.weights).read_bytes()).hexdigest(),
            "images": [os.path.abspath(path) for path in config.images],
            "top_k": self._top,
            "probabilities": config.probabilities,
            "batch_size": config.batch_size,
            "enlarge": config.enlarge,
            "tta": config.tta,
        }
        held = self._stopped(config)
        # Names of files may be no UTF-8. They are written with the bytes that they have.
        self._file = (folder / _ROWS).open("r+b" if held else "w+b")
        if held:
            self._file.truncate(held)
            self._file.seek(held)
        elif self._csv:
            self._write([self._header()])

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *raised: object) -> None:
        self._file.close()

    def add(self, batch: Batch, probabilities: Tensor) -> None:
        """Write the rows of a batch. `probabilities` (n, K) are those of its images without a problem."""
        found = iter(probabilities)
        rows: list[Any] = []
        for row, path in enumerate(batch.paths):
            problem = batch.problems.get(row)
            rows.append(self._row(path, None if problem is not None else next(found), problem))
            self._digest.update(os.fsencode(path) + b"\0")
        self.count += len(rows)
        self.problems += len(batch.problems)
        self.named = (self.named + list(batch.problems.values()))[:_NAMED]
        self._write(rows)

    def finish(self) -> None:
        """Move the file to its place."""
        (self._folder / _ROWS).replace(self._out)
        for path in self._folder.iterdir():
            if path.name != _LOCK:
                path.unlink()

    def _stopped(self, config: PredictConfig) -> int:
        """Bytes of whole batches that a stopped prediction wrote, 0 if there is none."""
        path = self._folder / _PROGRESS
        if not (path.is_file() and (self._folder / _ROWS).is_file()):
            return 0
        try:
            known = json.loads(path.read_text())
            other = next(
                (name for name in self._options if known["options"][name] != self._options[name]), ""
            )
            for one in islice(image_paths(config.images), known["rows"]):
                self._digest.update(os.fsencode(one) + b"\0")
            if not other and self._digest.hexdigest() != known["paths"]:
                other = "files"
            if not other:
                self.count, self.problems, self.named = known["rows"], known["problems"], known["named"]
                return known["bytes"]
        except (ValueError, KeyError, TypeError):
            other = "progress"
        if not config.overwrite:
            raise TrainError(
                f"{self._folder} holds a stopped prediction with other {other}; add --overwrite to start "
                "anew, or repeat its command to go on"
            )
        self._digest = hashlib.sha256()
        return 0

    def _header(self) -> list[str]:
        best = [f"{name}_{place}" for place in range(1, self._top + 1) for name in ("class", "probability")]
        return ["path", *best, *([f"p({name})" for name in self._classes] if self._all else []), "error"]

    def _row(self, path: Path, probabilities: Tensor | None, problem: str | None) -> Any:
        """A list for CSV, a dictionary for JSON."""
        if probabilities is None:
            if self._csv:
                return [path, *[""] * (len(self._header()) - 2), problem]
            return {"path": str(path), "error": problem}
        values = [float(f"{value:.6g}") for value in probabilities.tolist()]
        best = [
            (self._classes[index], values[index]) for index in probabilities.topk(self._top).indices.tolist()
        ]
        if self._csv:
            return [path, *[cell for pair in best for cell in pair], *(values if self._all else []), ""]
        row: dict[str, Any] = {
            "path": str(path),
            "top": [{"class": name, "probability": value} for name, value in best],
        }
        if self._all:
            row["probabilities"] = dict(zip(self._classes, values, strict=True))
        return row

    def _write(self, rows: list[Any]) -> None:
        text = io.StringIO(newline="")
        if self._csv:
            csv.writer(text, lineterminator="\n").writerows(rows)
        else:
            text.writelines(f"{json.dumps(row)}\n" for row in rows)
        try:
            self._file.write(text.getvalue().encode(errors="surrogateescape"))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise TrainError(f"cannot write {self._folder / _ROWS}: {error.strerror}") from error
        progress = {
            "options": self._options,
            "rows": self.count,
            "bytes": self._file.tell(),
            "paths": self._digest.hexdigest(),
            "problems": self.problems,
            "named": self.named,
        }
        write_atomically(self._folder / _PROGRESS, lambda part: part.write_text(json.dumps(progress)))
