"""A training run from its options to its results."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from ggam_fast.training.config.config_file import config_text
from ggam_fast.training.config.options import RunConfig, TrainConfig
from ggam_fast.training.data.image_set import ImageSet
from ggam_fast.training.errors import Interrupted, TrainError
from ggam_fast.training.measure.classification import Metrics, classification_metrics
from ggam_fast.training.model import model_file
from ggam_fast.training.run.artifacts import CURVES, GALLERY, METRICS, OPTIONS, RunArtifacts
from ggam_fast.training.run.history import best_epoch, best_text
from ggam_fast.training.run.log import RunLog
from ggam_fast.training.run.loggers import check_loggers
from ggam_fast.training.run.loop import Trainer, evaluate
from ggam_fast.training.run.optimizer import parameter_groups
from ggam_fast.training.run.prepare import (
    check_images,
    create_classifier,
    divided,
    image_batches,
    load_images,
    loss_weights,
    map_batches,
    take_weights,
)
from ggam_fast.training.show.console import Report
from ggam_fast.training.show.gallery import draw_gallery
from ggam_fast.training.system.devices import device_name, precision, resolve_device
from ggam_fast.training.system.distributed import World, joined, local_device
from ggam_fast.training.system.files import output_folder, write_atomically
from ggam_fast.training.system.interrupts import InterruptGuard
from ggam_fast.training.system.versions import versions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """The results of a run.

    If the run was interrupted, `metrics` and `gallery` are None. If that was before its first step,
    `checkpoint` is None too.
    """

    checkpoint: Path | None
    metrics: Metrics | None
    gallery: Path | None


def train(config: TrainConfig, report: Report) -> Outcome:
    """Train as `config` says and write checkpoints, metrics, gallery and log.

    The first Ctrl-C, or SIGTERM, ends training after the current step and still saves a snapshot and a
    checkpoint. Under torchrun every process calls this, but only the main process prints and writes.

    Raises:
        TrainError: an option or the data are unfit, or a file cannot be written.
    """
    config.check()
    check_loggers(config.run.log_to)
    with joined() as world:
        heard = report if world.is_main else Report.silent()
        with heard.listening():
            return _train(config, heard, world)


def _train(config: TrainConfig, report: Report, world: World) -> Outcome:
    started = time.monotonic()
    on_gpus = world.size > 1 and config.run.device == "auto" and torch.cuda.is_available()
    device = resolve_device(local_device() if on_gpus else config.run.device)
    dtype = precision(config.run.precision, device)
    images = load_images(config.data)
    images.log_notes(f"{images.name}: {images.summary()}")
    if config.optim.patience and "val" not in images.splits:
        raise TrainError(
            f"--patience {config.optim.patience} needs a validation split; {images.name} has none"
        )
    torch.manual_seed(config.optim.seed)
    model = create_classifier(config, len(images.classes))
    taken = take_weights(model, images.classes, config)
    model.to(device)
    backbone = model.backbone.to(memory_format=torch.channels_last)
    channels, (height, width) = backbone.num_features, backbone.feat_size
    logger.info(
        f"{backbone.name}, {config.backbone.tuned}, maps of "
        f"{channels} x {height} x {width}; GGAM head; {device_name(device)}"
        + (f"; {world.size} processes" if world.size > 1 else "")
    )
    frozen, trained = divided(model, config)
    if frozen is None or config.data.skip_bad_images:
        images = check_images(images, backbone, config.data)
    with run_folder(config.run, images.name, world) as out, InterruptGuard() as interrupt:
        trainer = Trainer(
            trained,
            parameter_groups(trained, config.optim, model.backbone.model),
            config.optim,
            len(images.classes),
            device,
            dtype=dtype,
            compile=config.run.compile,
            world=world,
            check=interrupt.check,
            class_weights=loss_weights(images, config.optim),
        )
        description = model_file.describe(model, images, config)
        description["init_from"] = taken
        artifacts = RunArtifacts(out, trainer, model, description, world)
        under_way = False
        try:
            batches = (
                image_batches(images, model, config, device, world)
                if frozen is None
                else map_batches(images, frozen, config, device, dtype, report, interrupt, world)
            )
            if config.run.resume is not None:
                artifacts.restore()
                logger.info(f"resumed after {trainer.steps} steps")
            steps = None if config.run.resume is None else trainer.steps
            log = RunLog(out, steps, config.run.log_to, config.values()) if world.is_main else None
            if log is not None and steps is None:
                artifacts.clear()
                given = {
                    "root": config.data.root,
                    "split_by": config.data.split_by,
                    "init_from": config.run.init_from,
                }
                places = {name: path and path.absolute() for name, path in given.items()}
                options = {**config.values(), **places, "resume": None, "overwrite": None}
                text = config_text(options)
                write_atomically(out / OPTIONS, lambda part: part.write_text(text))
            under_way = True
            with log or nullcontext():
                epochs = trainer.run(
                    batches["train"],
                    batches.get("val"),
                    report=report,
                    log=log,
                    save=artifacts.save_snapshot,
                    save_every=config.run.save_every,
                )
                logits, labels = evaluate(
                    trainer.result, batches["test"], device, dtype, world, interrupt.check
                )
                metrics = classification_metrics(logits, labels)
                last = None
                if trainer.averages:
                    last = classification_metrics(
                        *evaluate(trainer.last, batches["test"], device, dtype, world, interrupt.check)
                    )
                path = artifacts.save_result()
                artifacts.save_curves()
                if log is None:
                    return Outcome(path, metrics, None)
                report.table(metrics, images.classes, "test")
                if last is not None:
                    _compare(metrics, last, config.optim.ema)
                logger.info(f"{best_text(epochs, config.optim.best_by)}: {model_file.BEST}")
                seconds = time.monotonic() - started
                best = best_epoch(epochs, config.optim.best_by) + 1
                write_metrics(out / METRICS, metrics, last, images, epochs, best, seconds, device)
                gallery = draw_gallery(out / GALLERY, artifacts.classifier(), images, "test", logits)
                log.numbers(
                    "test", trainer.steps, {"accuracy": metrics.accuracy, "macro_f1": metrics.macro_f1}
                )
                log.picture("gallery", trainer.steps, gallery)
        except Interrupted:
            if not under_way:
                logger.info("interrupted before the first step; nothing was changed")
                return Outcome(None, None, None)
            artifacts.save_snapshot()  # first, because a batch system may soon kill the process
            path = artifacts.save_result()
            artifacts.save_curves()
            logger.info(
                f"interrupted after {trainer.steps} steps; checkpoint: {path}; "
                f"ggam-fast train --resume {out} goes on"
            )
            return Outcome(path, None, None)
        logger.info(f"{seconds:.0f} s; results in {out}: {path.name}, {gallery.name}, {CURVES}, {METRICS}")
        return Outcome(path, metrics, gallery)


def write_metrics(
    path: Path,
    metrics: Metrics,
    last: Metrics | None,
    images: ImageSet,
    epochs: list[dict[str, float]],
    best: int,
    seconds: float,
    device: torch.device,
) -> None:
    """Write the results of a run as JSON.

    `last`: those of the last weights, beside averaged ones. `best`: the best epoch, from 1 on.
    """
    results = {
        "test": metrics.as_dict(),
        **({} if last is None else {"test_last": last.as_dict()}),
        "classes": images.classes,
        "epochs": epochs,
        "best_epoch": best,
        "seconds": round(seconds, 1),
        "device": device_name(device),
        "notes": images.notes,
        "versions": versions(),
    }
    write_atomically(path, lambda part: part.write_text(json.dumps(results, indent=2) + "\n"))


def _compare(averaged: Metrics, last: Metrics, decay: float) -> None:
    text = f"test accuracy of the averaged weights {averaged.accuracy:.3f}, of the last {last.accuracy:.3f}"
    # Two standard errors of the difference of two accuracies near 1 / 2, where they are largest.
    if averaged.accuracy < last.accuracy - 2 * math.sqrt(0.5 / last.images):
        logger.warning(f"{text}; the average is saved, and a lower --ema than {decay:g} may help")
    else:
        logger.info(text)


@contextmanager
def run_folder(config: RunConfig, name: str, world: World) -> Iterator[Path]:
    """The `output_folder`. The main process makes it, and all processes learn its path."""
    made_here = output_folder(config.out, name, overwrite=config.overwrite, resume=config.resume)
    with made_here if world.is_main else nullcontext(None) as made:
        folder = world.broadcast(made)
        yield folder
