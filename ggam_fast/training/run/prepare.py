"""Make the images, classifier and batches of a run, before its first step."""

from __future__ import annotations

import hashlib
import logging
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ggam_fast.training.config.options import DataConfig, OptimConfig, TrainConfig
from ggam_fast.training.data.balance import class_weights, row_weights
from ggam_fast.training.data.batches import Batches, ImageBatches, MapBatches
from ggam_fast.training.data.image_set import ImageFiles, ImageSet, eval_transform, train_transform, workers
from ggam_fast.training.data.readers import read_images
from ggam_fast.training.data.scan import readable
from ggam_fast.training.errors import TrainError, first_line
from ggam_fast.training.model.backbones import Backbone, create_backbone
from ggam_fast.training.model.classifier import GGAMClassifier, LastClassifier, Trained, create_head
from ggam_fast.training.model.cut import FirstLayers, cut
from ggam_fast.training.model.feature_cache import MapFile, default_cache_dir, encoded
from ggam_fast.training.show.console import Report
from ggam_fast.training.system.cache import remove_dead_parts
from ggam_fast.training.system.compiling import compile_or_eager
from ggam_fast.training.system.devices import autocast
from ggam_fast.training.system.distributed import ALONE, World
from ggam_fast.training.system.files import locked
from ggam_fast.training.system.interrupts import InterruptGuard
from ggam_fast.training.use.open_run import open_run, weights_file

logger = logging.getLogger(__name__)

# With fewer images, compiling the frozen backbone takes more time than it saves (measured on two cores).
_COMPILE_BACKBONE_FROM = 1500


def load_images(config: DataConfig) -> ImageSet:
    """The data set that `config` names."""
    return read_images(
        config.data,
        config.root,
        config.cache_dir or default_cache_dir(),
        split_by=config.split_by,
        val_fraction=config.val_fraction,
    )


def check_images(images: ImageSet, backbone: Backbone | FirstLayers, config: DataConfig) -> ImageSet:
    """`scan.readable` with the options of `config`."""
    return readable(
        images,
        backbone.image_size,
        skip_bad=config.skip_bad_images,
        enlarge=config.enlarge,
    )


def create_classifier(config: TrainConfig, num_classes: int) -> GGAMClassifier:
    """The backbone and head that `config` describes, with random or pretrained weights.

    Raises:
        TrainError: the backbone or the head refuses an option.
    """
    backbone = create_backbone(
        config.backbone.backbone,
        pretrained=config.backbone.pretrained and config.run.init_from is None,
        image_size=config.data.image_size,
        resize=config.data.resize,
    )
    try:
        return GGAMClassifier(backbone, create_head(backbone, num_classes, config.head))
    except (ValueError, TypeError) as error:
        raise TrainError(str(error)) from error


def divided(
    model: GGAMClassifier, config: TrainConfig
) -> tuple[None, GGAMClassifier] | tuple[Backbone | FirstLayers, Trained]:
    """What stays frozen and makes the maps, None if nothing does, and what is trained on them.

    Both share the modules of `model`. Gradients are turned on and off as this says.

    Raises:
        TrainError: the backbone cannot be cut where --finetune-from says.
    """
    if config.backbone.finetune:
        return None, model
    frozen: Backbone | FirstLayers = model.backbone
    trained: Trained = model.head
    if config.backbone.finetune_from is not None:
        frozen, last = cut(model.backbone, config.backbone.finetune_from)
        trained = LastClassifier(last, model.head)
    model.requires_grad_(False)
    trained.requires_grad_(True)
    return frozen, trained


def take_weights(model: GGAMClassifier, classes: tuple[str, ...], config: TrainConfig) -> str | None:
    """Give `model` the weights of the run --init-from, and return the SHA-256 of their file.

    The head keeps its own if its classes or options are others. Without --init-from nothing happens.

    Raises:
        TrainError: there is no such run, or its backbone is another one.
    """
    run = config.run.init_from
    if run is None:
        return None
    checkpoint = open_run(run)
    name = checkpoint.model.backbone.name
    if name != model.backbone.name:
        raise TrainError(
            f"--init-from {run} has the backbone {name}, and --backbone is {model.backbone.name}"
        )
    try:
        model.backbone.load_state_dict(checkpoint.model.backbone.state_dict())
    except RuntimeError as error:
        raise TrainError(
            f"--init-from {run} has a backbone of another shape, for images of "
            f"{checkpoint.model.backbone.image_size}: {first_line(error)}"
        ) from error
    same = checkpoint.classes == classes and checkpoint.description["head"] == config.head.keywords()
    if same:
        model.head.load_state_dict(checkpoint.model.head.state_dict())
        logger.info(f"backbone and head start from {run}")
    else:
        other = "classes" if checkpoint.classes != classes else "head options"
        logger.info(f"the backbone starts from {run}; the head starts anew, because {other} differ")
    return hashlib.sha256(weights_file(run).read_bytes()).hexdigest()


def loss_weights(images: ImageSet, optim: OptimConfig) -> Tensor | None:
    """Weights (K,) of the classes in the cross entropy, None if all are the same."""
    if optim.class_weights == "none":
        return None
    return class_weights(images.labels[images.splits["train"]], len(images.classes))


def image_batches(
    images: ImageSet,
    model: GGAMClassifier,
    config: TrainConfig,
    device: torch.device,
    world: World = ALONE,
) -> dict[str, Batches]:
    """Batches of decoded images for every split. The training split is augmented and shuffled."""
    look = model.backbone.preprocessing
    names = ("rand_augment", "color_jitter", "random_erasing")
    augmentation: dict[str, Any] = {name: getattr(config.optim, name) for name in names}
    if config.data.resize is None:
        size, mean, std, _ = look
        crops = train_transform(images, size, mean, std, **augmentation)
    else:
        crops = train_transform(images, *look, **augmentation)
    batches: dict[str, Batches] = {}
    for split, rows in images.splits.items():
        train = split == "train"
        transform = crops if train else eval_transform(*look)
        files = ImageFiles(images, split, transform)
        batches[split] = ImageBatches(
            files,
            min(config.optim.batch_size, len(rows)),
            device,
            workers(config.data, device),
            config.optim.seed if train else None,
            world,
            row_weights(files.labels) if train and config.optim.balanced_sampling else None,
        )
    return batches


def map_batches(
    images: ImageSet,
    frozen: Backbone | FirstLayers,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    report: Report,
    interrupt: InterruptGuard,
    world: World = ALONE,
) -> dict[str, Batches]:
    """Batches of the maps of `frozen` for every split. Maps that the cache lacks are computed,
    and so are those without their checksum.

    The training split has every image in all its mirrorings.
    """
    frozen.eval()
    transform = eval_transform(*frozen.preprocessing)
    folder = config.data.cache_dir or default_cache_dir()
    datasets = {
        split: ImageFiles(images, split, transform, images.flips if split == "train" else ((),))
        for split in images.splits
    }
    weights = frozen.fingerprint()
    files = {
        split: MapFile(folder, frozen, weights, dataset, dtype, config.data.enlarge)
        for split, dataset in datasets.items()
    }
    if world.is_main:
        for part in remove_dead_parts(folder):
            logger.info(f"removed {part}, which a killed run left unfinished")
    if world.is_main and not all(file.sound() for file in files.values()):
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        # If two runs need the same maps, the second waits for the first.
        with locked(next(iter(files.values())).path.with_suffix(".lock"), interrupt.check):
            _fill(files, datasets, images, frozen, config, device, dtype, report, interrupt)
    world.barrier()
    return {
        split: MapBatches(
            file.open(),
            datasets[split].labels,
            min(config.optim.batch_size, len(datasets[split])),
            device,
            config.optim.seed if split == "train" else None,
            world,
            row_weights(datasets[split].labels)
            if split == "train" and config.optim.balanced_sampling
            else None,
        )
        for split, file in files.items()
    }


def _fill(
    files: dict[str, MapFile],
    datasets: dict[str, ImageFiles],
    images: ImageSet,
    frozen: Backbone | FirstLayers,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    report: Report,
    interrupt: InterruptGuard,
) -> None:
    """Compute and store the maps of the splits that have none."""
    missing = {split: datasets[split] for split, file in files.items() if not file.sound()}
    if not missing:
        return
    count = sum(map(len, missing.values()))
    if not config.data.skip_bad_images:  # with that option they are already checked
        check_images(images, frozen, config.data)
    logger.info(
        f"computing {count} {frozen.kind}, {sum(files[s].nbytes for s in missing) / 1e6:,.1f} MB"
        f", kept in {files[next(iter(missing))].path.parent}"
    )
    largest = max(missing, key=lambda split: len(missing[split]))
    batch_size = min(config.optim.batch_size, len(missing[largest]))
    sources = {
        split: ImageBatches(dataset, batch_size, device, workers(config.data, device))
        for split, dataset in missing.items()
    }

    def encode(inputs: Tensor) -> Tensor:
        with autocast(device, dtype):
            return frozen(inputs)

    if config.run.compile and count >= _COMPILE_BACKBONE_FROM:
        logger.info("compiling the backbone")
        example, _ = sources[largest].example()
        with torch.no_grad():
            encode = compile_or_eager(encode, frozen, lambda f: f(example))
    with report.bar(frozen.kind, count) as bar:

        def on_batch(images: int) -> None:
            interrupt.check()
            bar.advance(images)

        for split, source in sources.items():
            files[split].write(encoded(source.epoch(0), encode, batch_size, on_batch))
