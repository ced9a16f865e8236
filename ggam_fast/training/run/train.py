"""A training run from configuration to results."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ggam_fast import GGAMHead
from ggam_fast.training.config.config_file import config_text
from ggam_fast.training.config.options import DataConfig, HeadConfig, RunConfig, TrainConfig
from ggam_fast.training.data.batches import Batches, ImageBatches, MapBatches
from ggam_fast.training.data.image_set import ImageFiles, ImageSet, eval_transform, train_transform, workers
from ggam_fast.training.data.readers import read_images
from ggam_fast.training.data.scan import readable
from ggam_fast.training.errors import Interrupted, TrainError
from ggam_fast.training.measure.classification import Metrics, classification_metrics
from ggam_fast.training.model import model_file
from ggam_fast.training.model.backbones import Backbone, create_backbone
from ggam_fast.training.model.classifier import GGAMClassifier, create_head
from ggam_fast.training.model.feature_cache import MapFile, default_cache_dir, encoded
from ggam_fast.training.run import resume_state
from ggam_fast.training.run.log import BOARD, RunLog
from ggam_fast.training.run.loop import Fit, Groups, evaluate
from ggam_fast.training.show.console import Report
from ggam_fast.training.show.gallery import draw_gallery
from ggam_fast.training.system.compiling import compile_or_eager
from ggam_fast.training.system.devices import autocast, device_name, precision, resolve_device
from ggam_fast.training.system.distributed import ALONE, World, joined, local_device
from ggam_fast.training.system.files import output_folder, write_atomically
from ggam_fast.training.system.interrupts import InterruptGuard
from ggam_fast.training.system.versions import versions
from ggam_fast.training.use import evaluate as evaluation
from ggam_fast.training.use import export

METRICS = "metrics.json"
OPTIONS = "options.yaml"
GALLERY = "gallery.png"
# What `evaluate` and `export` put beside them.
_MADE_OF_A_RUN = (evaluation.NUMBERS, evaluation.PAGE, export.DESCRIPTION, *export.NAMES.values())
# On two cores, compiling the frozen backbone costs the time it saves on about this many images.
_COMPILE_BACKBONE_FROM = 1500


@dataclass(frozen=True)
class Outcome:
    """The results of a run; `metrics` and `gallery` are None if it was interrupted, and so is `checkpoint`
    if that was before the first step."""

    checkpoint: Path | None
    metrics: Metrics | None
    gallery: Path | None


def train(config: TrainConfig, report: Report) -> Outcome:
    """Train as `config` says and write checkpoints, metrics, gallery, log and TensorBoard scalars.

    The first Ctrl-C ends training after the step it is in and still saves a checkpoint. Under torchrun
    every process calls this; the first one speaks and writes.

    Raises:
        TrainError: something the user can put right.
    """
    config.check()
    with joined() as world:
        return _train(config, report if world.speaks else Report.silent(), world)


def _train(config: TrainConfig, report: Report, world: World) -> Outcome:
    started = time.monotonic()
    on_gpus = world.size > 1 and config.run.device == "auto" and torch.cuda.is_available()
    device = resolve_device(local_device() if on_gpus else config.run.device)
    dtype = precision(config.run.precision, device)
    images = loaded = load_images(config.data)
    report.note(f"{images.name}: {images.summary()}")
    for line in images.notes:
        report.note(f"  {line}")
    torch.manual_seed(config.optim.seed)
    model = create_classifier(config, len(images.classes)).to(device)
    backbone = model.backbone.to(memory_format=torch.channels_last)
    channels, (height, width) = backbone.num_features, backbone.feat_size
    report.note(
        f"{backbone.name}, {'fine-tuned' if config.backbone.finetune else 'frozen'}, maps of "
        f"{channels} x {height} x {width}; GGAM head; {device_name(device)}"
        + (f"; {world.size} processes" if world.size > 1 else "")
    )
    if config.backbone.finetune or config.data.skip_bad_images:
        images = check_images(images, backbone, config.data, report)
    with run_folder(config.run, images.name, world) as out, InterruptGuard() as interrupt:
        model.backbone.requires_grad_(config.backbone.finetune)
        fit = Fit(
            model if config.backbone.finetune else model.head,
            parameter_groups(model, config),
            config.optim,
            len(images.classes),
            device,
            dtype=dtype,
            compile=config.run.compile,
            world=world,
            check=interrupt.check,
        )
        kept = Kept(out, fit, model, model_file.describe(model, loaded, config), world)
        under_way = False
        try:
            batches = (
                image_batches(images, model, config, device, world)
                if config.backbone.finetune
                else map_batches(images, model, config, device, dtype, report, interrupt, world)
            )
            if config.run.resume is not None:
                kept.go_on()
                report.note(f"going on after {fit.steps} steps")
            elif world.speaks:
                kept.start()
                root = config.data.root and config.data.root.absolute()
                options = {**config.values(), "root": root, "resume": None, "overwrite": None}
                text = config_text(options)
                write_atomically(out / OPTIONS, lambda part: part.write_text(text))
            under_way = True
            log = RunLog(out, fit.steps) if world.speaks else None
            with log or nullcontext():
                epochs = fit.run(
                    batches["train"],
                    batches.get("val"),
                    report=report,
                    log=log,
                    save=kept.save_snapshot,
                    save_every=config.run.save_every,
                )
                logits, labels = evaluate(fit.result, batches["test"], device, dtype, world, interrupt.check)
                metrics = classification_metrics(logits, labels)
                path = kept.save_result()
                if log is None:
                    return Outcome(path, metrics, None)
                report.table(metrics, images.classes, "test")
                seconds = time.monotonic() - started
                write_metrics(out / METRICS, metrics, images, epochs, seconds, device)
                gallery = draw_gallery(out / GALLERY, kept.classifier(), images, "test", logits)
                log.numbers("test", fit.steps, {"accuracy": metrics.accuracy, "macro_f1": metrics.macro_f1})
                log.picture("gallery", fit.steps, gallery)
        except Interrupted:
            if not under_way:
                report.note("interrupted before the first step; nothing was changed")
                return Outcome(None, None, None)
            path = kept.save_result()
            kept.save_snapshot()
            report.note(
                f"interrupted after {fit.steps} steps; checkpoint: {path}; "
                f"ggam-fast train --resume {out} goes on"
            )
            return Outcome(path, None, None)
        report.note(f"{seconds:.0f} s; results in {out}: {path.name}, {gallery.name}, {METRICS}")
        return Outcome(path, metrics, gallery)


def write_metrics(
    path: Path,
    metrics: Metrics,
    images: ImageSet,
    epochs: list[dict[str, float]],
    seconds: float,
    device: torch.device,
) -> None:
    """The results of a run as JSON."""
    results = {
        "test": metrics.as_dict(),
        "classes": images.classes,
        "epochs": epochs,
        "seconds": round(seconds, 1),
        "device": device_name(device),
        "notes": images.notes,
        "versions": versions(),
    }
    write_atomically(path, lambda part: part.write_text(json.dumps(results, indent=2) + "\n"))


@contextmanager
def run_folder(config: RunConfig, name: str, world: World) -> Iterator[Path]:
    """`output_folder`, made by the process that speaks and known to all."""
    made_here = output_folder(config.out, name, overwrite=config.overwrite, resume=config.resume)
    with made_here if world.speaks else nullcontext(None) as made:
        folder = world.tell(made)
        yield folder


class Kept:
    """What a run keeps in its folder `out`: snapshots to go on from, the classifier of the best epoch (by
    validation accuracy; without that split by training loss), and the last one, which is the result."""

    def __init__(
        self, out: Path, fit: Fit, model: GGAMClassifier, description: dict[str, Any], world: World
    ) -> None:
        self._out = out
        self._fit = fit
        self._model = model
        self._description = description
        self._world = world
        self._epochs = 0
        # What all parts of one run have in common.
        self._run = {name: description[name] for name in ("backbone", "head", "classes", "optim", "finetune")}
        self._run["images"] = description["data"]["images"]

    def start(self) -> None:
        """Remove what an older run (--overwrite) left: --resume would go on with its resume_state."""
        for name in (resume_state.FOLDER, BOARD):
            shutil.rmtree(self._out / name, ignore_errors=True)
        for name in (model_file.WEIGHTS, model_file.BEST, METRICS, GALLERY, *_MADE_OF_A_RUN):
            (self._out / name).unlink(missing_ok=True)

    def go_on(self) -> None:
        """Put the fit where the newest snapshot in the folder is.

        Raises:
            TrainError: no snapshot, or one of another model or data set.
        """
        state = resume_state.load_snapshot(self._out)
        state["run"]["head"] = HeadConfig.from_saved(state["run"]["head"]).keywords()
        for name, value in self._run.items():
            if state["run"].get(name, value) != value:  # older snapshots do not know their images
                raise TrainError(
                    f"--resume {self._out}: its snapshot has another {name}"
                    if name != "images"
                    else f"--resume {self._out}: images were added or removed since its snapshot"
                )
        self._fit.load_state_dict(state["fit"])
        self._epochs = len(self._fit.history)

    def classifier(self) -> GGAMClassifier:
        """The classifier as it is now; of averaged weights, if they are averaged."""
        result = self._fit.result
        if isinstance(result, GGAMClassifier):
            return result
        return GGAMClassifier(self._model.backbone, cast(GGAMHead, result))

    def save_snapshot(self) -> None:
        state = {"run": self._run, "fit": self._fit.state_dict()}  # in every process: each has its own part
        if not self._world.speaks:
            return
        # The best first: a run killed between the two goes on from before this epoch, and saves it again.
        history = self._fit.history
        if len(history) > self._epochs:
            self._epochs = len(history)
            scores = [epoch.get("val_accuracy", -epoch["loss"]) for epoch in history]
            if scores[-1] > max(scores[:-1], default=-math.inf):
                self._save(model_file.BEST)
        resume_state.save_snapshot(self._out, self._fit.steps, state)

    def save_result(self) -> Path:
        if self._world.speaks:
            self._save(model_file.WEIGHTS)
        return self._out / model_file.WEIGHTS

    def _save(self, name: str) -> None:
        model_file.save_checkpoint(self._out, self.classifier(), self._description, name)


def parameter_groups(model: GGAMClassifier, config: TrainConfig) -> Groups:
    """The head at `lr` and, fine-tuned, the backbone at `backbone_lr`."""
    groups: Groups = [{"params": list(model.head.parameters()), "lr": config.optim.lr}]
    if config.backbone.finetune:
        groups.append({"params": list(model.backbone.parameters()), "lr": config.optim.backbone_lr})
    return groups


def load_images(config: DataConfig) -> ImageSet:
    """The data set that `config` names."""
    return read_images(config.data, config.root, config.cache_dir or default_cache_dir())


def check_images(images: ImageSet, backbone: Backbone, config: DataConfig, report: Report) -> ImageSet:
    """`scan.readable` as configured."""
    return readable(
        images,
        backbone.image_size,
        skip_bad=config.skip_bad_images,
        enlarge=config.enlarge,
        note=report.note,
    )


def create_classifier(config: TrainConfig, num_classes: int) -> GGAMClassifier:
    """Backbone and head as configured.

    Raises:
        TrainError: an option that the backbone or the head refuses.
    """
    backbone = create_backbone(
        config.backbone.backbone,
        pretrained=config.backbone.pretrained,
        image_size=config.data.image_size,
        resize=config.data.resize,
    )
    try:
        return GGAMClassifier(backbone, create_head(backbone, num_classes, config.head))
    except (ValueError, TypeError) as error:
        raise TrainError(str(error)) from error


def image_batches(
    images: ImageSet,
    model: GGAMClassifier,
    config: TrainConfig,
    device: torch.device,
    world: World = ALONE,
) -> dict[str, Batches]:
    """Batches of decoded images for every split; the training split augmented and shuffled."""
    look = model.backbone.preprocessing
    if config.data.resize is None:
        size, mean, std, _ = look
        crops = train_transform(images, size, mean, std)
    else:
        crops = train_transform(images, *look)
    batches: dict[str, Batches] = {}
    for split, rows in images.splits.items():
        train = split == "train"
        transform = crops if train else eval_transform(*look)
        batches[split] = ImageBatches(
            ImageFiles(images, split, transform),
            min(config.optim.batch_size, len(rows)),
            device,
            workers(config.data, device),
            config.optim.seed if train else None,
            world,
        )
    return batches


def map_batches(
    images: ImageSet,
    model: GGAMClassifier,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    report: Report,
    interrupt: InterruptGuard,
    world: World = ALONE,
) -> dict[str, Batches]:
    """Batches of the frozen backbone's maps for every split: from the cache, else computed now.

    The training split holds every image once for each of its mirrorings.
    """
    backbone = model.backbone.eval()
    transform = eval_transform(*backbone.preprocessing)
    folder = config.data.cache_dir or default_cache_dir()
    datasets = {
        split: ImageFiles(images, split, transform, images.flips if split == "train" else ((),))
        for split in images.splits
    }
    weights = backbone.fingerprint()
    files = {
        split: MapFile(folder, backbone, weights, dataset, dtype, config.data.enlarge)
        for split, dataset in datasets.items()
    }
    missing = {split: datasets[split] for split, file in files.items() if not file.exists()}
    count = sum(map(len, missing.values()))
    if count and world.speaks:
        if not config.data.skip_bad_images:  # else it was done before
            check_images(images, backbone, config.data, report)
        report.note(
            f"computing {count} feature maps, {sum(files[s].nbytes for s in missing) / 1e6:,.1f} MB"
            f", kept in {folder}"
        )
        largest = max(missing, key=lambda split: len(missing[split]))
        batch_size = min(config.optim.batch_size, len(missing[largest]))
        sources = {
            split: ImageBatches(dataset, batch_size, device, workers(config.data, device))
            for split, dataset in missing.items()
        }

        def encode(inputs: Tensor) -> Tensor:
            with autocast(device, dtype):
                return backbone(inputs)

        if config.run.compile and count >= _COMPILE_BACKBONE_FROM:
            report.note("compiling the backbone")
            example, _ = sources[largest].example()
            with torch.no_grad():
                encode = compile_or_eager(encode, backbone, lambda f: f(example), report.note)
        with report.bar("feature maps", count) as bar:

            def on_batch(images: int) -> None:
                interrupt.check()
                bar.advance(images)

            for split, source in sources.items():
                files[split].write(encoded(source.epoch(0), encode, batch_size, on_batch))
    world.wait()
    return {
        split: MapBatches(
            file.open(),
            datasets[split].labels,
            min(config.optim.batch_size, len(datasets[split])),
            device,
            config.optim.seed if split == "train" else None,
            world,
        )
        for split, file in files.items()
    }
