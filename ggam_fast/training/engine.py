"""A training run from configuration to results."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from ggam_fast.training import checkpoints, data
from ggam_fast.training.backbones import create_backbone
from ggam_fast.training.batches import Batches, ImageBatches, MapBatches
from ggam_fast.training.classifier import GGAMClassifier, create_head
from ggam_fast.training.compiling import compile_or_eager
from ggam_fast.training.config import DataConfig, TrainConfig
from ggam_fast.training.devices import autocast, device_name, map_dtype, resolve_device
from ggam_fast.training.errors import Interrupted, TrainError
from ggam_fast.training.feature_cache import MapFile, default_cache_dir, encoded
from ggam_fast.training.fitting import Fit, evaluate
from ggam_fast.training.gallery import draw_gallery
from ggam_fast.training.interrupts import InterruptGuard
from ggam_fast.training.metrics import Metrics, classification_metrics
from ggam_fast.training.outputs import output_folder, write_atomically
from ggam_fast.training.reports import Report

METRICS = "metrics.json"
GALLERY = "gallery.png"
# On two cores, compiling the frozen backbone costs the time it saves on about this many images.
_COMPILE_BACKBONE_FROM = 1500


@dataclass(frozen=True)
class Outcome:
    """The results of a run; `metrics` and `gallery` are None if it was interrupted."""

    checkpoint: Path
    metrics: Metrics | None
    gallery: Path | None


def train(config: TrainConfig, report: Report) -> Outcome:
    """Train as `config` says and write checkpoint, metrics, gallery and TensorBoard scalars.

    The first Ctrl-C ends training after the step it is in and still saves a checkpoint.

    Raises:
        TrainError: something the user can put right.
    """
    started = time.monotonic()
    config.check()
    device = resolve_device(config.run.device)
    images = load_images(config.data)
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
    )
    description = checkpoints.describe(model, images.classes, config)
    with output_folder(config.run, images.name) as out, InterruptGuard() as interrupt:
        fit = Fit(model, config, device, report, interrupt)

        def save() -> Path:
            return checkpoints.save_checkpoint(out, model, description)

        try:
            batches = (
                image_batches(images, model, config, device)
                if config.backbone.finetune
                else map_batches(images, model, config, device, report, interrupt)
            )
            epochs = fit.run(batches["train"], batches.get("val"), out / "tensorboard", save)
        except Interrupted:
            path = save()
            untrained = "" if fit.steps else " (its head is untrained)"
            report.note(f"interrupted after {fit.steps} steps; checkpoint: {path}{untrained}")
            return Outcome(path, None, None)
        logits, labels = evaluate(fit.trained, batches["test"], device)
        metrics = classification_metrics(logits, labels)
        report.table(metrics, images.classes, "test")
        path = save()
        gallery = draw_gallery(out / GALLERY, model, images, "test", logits)
        seconds = time.monotonic() - started
        results = {
            "test": metrics.as_dict(),
            "classes": images.classes,
            "epochs": epochs,
            "seconds": round(seconds, 1),
            "device": device_name(device),
            "versions": {name: metadata.version(name) for name in ("torch", "timm", "torchvision")},
        }
        write_atomically(out / METRICS, lambda part: part.write_text(json.dumps(results, indent=2) + "\n"))
        report.note(f"{seconds:.0f} s; results in {out}: {path.name}, {gallery.name}, {METRICS}")
        return Outcome(path, metrics, gallery)


def load_images(config: DataConfig) -> data.ImageSet:
    """The data set that `config` names."""
    if config.data == "folder":
        return data.image_folder(config.root)
    if config.root is not None:
        raise TrainError("--root goes with --data folder")
    return data.elpv()


def create_classifier(config: TrainConfig, num_classes: int) -> GGAMClassifier:
    """Backbone and head as configured.

    Raises:
        TrainError: an option that the backbone or the head refuses.
    """
    backbone = create_backbone(
        config.backbone.backbone,
        pretrained=config.backbone.pretrained,
        image_size=config.data.image_size,
    )
    try:
        return GGAMClassifier(backbone, create_head(backbone, num_classes, config.head))
    except (ValueError, TypeError) as error:
        raise TrainError(str(error)) from error


def image_batches(
    images: data.ImageSet, model: GGAMClassifier, config: TrainConfig, device: torch.device
) -> dict[str, Batches]:
    """Batches of decoded images for every split; the training split augmented and shuffled."""
    look = (model.backbone.image_size, model.backbone.mean, model.backbone.std)
    batches: dict[str, Batches] = {}
    for split, rows in images.splits.items():
        train = split == "train"
        transform = data.train_transform(images, *look) if train else data.eval_transform(*look)
        batches[split] = ImageBatches(
            data.ImageFiles(images, split, transform),
            min(config.optim.batch_size, len(rows)),
            device,
            data.workers(config.data, device),
            shuffle_seed=config.optim.seed if train else None,
        )
    return batches


def map_batches(
    images: data.ImageSet,
    model: GGAMClassifier,
    config: TrainConfig,
    device: torch.device,
    report: Report,
    interrupt: InterruptGuard,
) -> dict[str, Batches]:
    """Batches of the frozen backbone's maps for every split: from the cache, else computed now.

    The training split holds every image once for each of its mirrorings.
    """
    backbone = model.backbone.eval()
    transform = data.eval_transform(backbone.image_size, backbone.mean, backbone.std)
    folder = config.data.cache_dir or default_cache_dir()
    datasets = {
        split: data.ImageFiles(images, split, transform, images.flips if split == "train" else ((),))
        for split in images.splits
    }
    weights = backbone.fingerprint()
    files = {
        split: MapFile(folder, backbone, weights, dataset, map_dtype(device))
        for split, dataset in datasets.items()
    }
    missing = {split: datasets[split] for split, file in files.items() if not file.exists()}
    count = sum(map(len, missing.values()))
    if count:
        report.note(
            f"computing {count} feature maps, {sum(files[s].nbytes for s in missing) / 1e6:,.1f} MB"
            f", kept in {folder}"
        )
        largest = max(missing, key=lambda split: len(missing[split]))
        batch_size = min(config.optim.batch_size, len(missing[largest]))
        sources = {
            split: ImageBatches(dataset, batch_size, device, data.workers(config.data, device))
            for split, dataset in missing.items()
        }

        def encode(inputs: Tensor) -> Tensor:
            with autocast(device):
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
                files[split].write(encoded(source, encode, batch_size, on_batch))
    return {
        split: MapBatches(
            file.open(),
            datasets[split].labels,
            min(config.optim.batch_size, len(datasets[split])),
            device,
            shuffle_seed=config.optim.seed if split == "train" else None,
        )
        for split, file in files.items()
    }
