"""`ggam-fast ablate`: compare attentions, norms of beta and guidance weights over several seeds.

All heads are trained on cached maps: those of a frozen backbone, or those that enter its trained last layers.
One cell is one head, trained with one seed. Each finished cell is one file, so the same command run again
trains only the cells that are missing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch

from ggam_fast import GGAMHead
from ggam_fast.training.ablation.cell import CellData, run_cell
from ggam_fast.training.ablation.report import write_report
from ggam_fast.training.config.options import (
    BEFORE,
    BackboneConfig,
    DataConfig,
    HeadConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from ggam_fast.training.data.image_set import ImageSet
from ggam_fast.training.errors import Interrupted, TrainError
from ggam_fast.training.model.cut import LastLayers
from ggam_fast.training.run.prepare import check_images, create_classifier, divided, load_images, map_batches
from ggam_fast.training.show.console import Report
from ggam_fast.training.system.devices import device_name, precision, resolve_device
from ggam_fast.training.system.files import remove_parts, write_atomically
from ggam_fast.training.system.interrupts import InterruptGuard

logger = logging.getLogger(__name__)

CELLS = "cells"
CamNorm = Literal["sigmoid", "softmax", "standardized"]
_HELD_OUT = 5


@dataclass(frozen=True)
class StudyConfig:
    out: Path = field(default_factory=lambda: Path("ablation"))
    """Folder of the results. A study that was begun in it is continued."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of initial weights and order of the batches. Each head is trained once with each seed."""
    guidance_weights: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    """Values of lambda to try. Validation accuracy chooses among them."""
    cam_norms: tuple[CamNorm, ...] = ("standardized", "sigmoid", "softmax")
    """Norms of the Grad-CAM weights. Each is tried with every lambda. The paper's table uses the first
    norm."""
    attentions: tuple[Literal["none", "channel", "spatial", "channel_spatial"], ...] = (
        "none",
        "channel",
        "spatial",
        "channel_spatial",
    )
    """Attentions to compare. Each is a row of the paper's table."""
    spatial_norm: Literal["softmax", "sum", "sigmoid"] = "softmax"
    """Norm of the channel sum. The result is the spatial attention."""
    pool_type: Literal["avg", "max", "flatten"] = "avg"
    """How the attended map reaches the classifier."""
    attention_scale: Literal["unit_mean", "printed"] = "unit_mean"
    """Scale of the attended map. With unit_mean its weights average to one. With printed they are 1/L of
    that, as the paper prints them."""
    hidden_size: int = 512
    """Width of the classifier's hidden layer; 0 for one linear layer."""
    norm_eps: float = HeadConfig.norm_eps
    """Eps of the classifier's first batch norm. It is the same for every cell."""
    backbone: str = "tf_efficientnet_lite0"
    """Name of a timm model. It must end in a feature map or in patch tokens. Without --finetune-from it stays
    frozen."""
    pretrained: bool = True
    """Start from ImageNet weights."""
    finetune_from: str | None = None
    """Train the backbone from this module on, such as blocks.5 or layer4. Every cell trains it anew."""
    epochs: int = 6
    """Passes over the training split. Their number is the same for every cell."""
    batch_size: int = 64
    """Images in a batch."""
    lr: float = 3e-4
    """Highest learning rate of the head."""
    backbone_lr: float = 1e-4
    """Highest learning rate of the backbone, with --finetune-from."""
    thresholds: int = 25
    """Number of thresholds of MaxBoxAccV2. Most of the time of localisation goes into them."""
    pictures: bool = True
    """Draw photographs too. Turn this off if their licence forbids passing them on."""
    device: str = "auto"
    """Device, such as cpu or cuda:1. auto is the first GPU, or the CPU if there is none."""
    compile: bool = True
    """Compile the training step with torch.compile."""


@dataclass(frozen=True)
class AblateConfig:
    data: DataConfig = field(default_factory=DataConfig)
    study: StudyConfig = field(default_factory=StudyConfig)

    def check(self) -> None:
        """Raise a `TrainError` for an empty, repeated or impossible choice."""
        study = self.study
        for flag, chosen in (
            ("--seeds", study.seeds),
            ("--guidance-weights", study.guidance_weights),
            ("--cam-norms", study.cam_norms),
            ("--attentions", study.attentions),
        ):
            if not chosen or len(set(chosen)) < len(chosen):
                raise TrainError(f"{flag} must be one or more different values; got {list(chosen)}")
        if min(study.guidance_weights) <= 0:
            raise TrainError(
                f"--guidance-weights must be above 0 (0 is always run); got {min(study.guidance_weights)}"
            )
        if not 1 <= study.thresholds <= 1000:
            raise TrainError(f"--thresholds must be from 1 to 1000; got {study.thresholds}")
        for seed in study.seeds:
            self.training("none", study.cam_norms[0], 0.0, seed).check()

    def training(self, attention: str, cam_norm: str, weight: float, seed: int) -> TrainConfig:
        """The options of the training run of one cell."""
        study = self.study
        return TrainConfig(
            data=self.data,
            backbone=BackboneConfig(study.backbone, study.pretrained, finetune_from=study.finetune_from),
            head=HeadConfig(
                attention=attention,  # type: ignore[arg-type]
                cam_norm=cam_norm,  # type: ignore[arg-type]
                spatial_norm=study.spatial_norm,
                pool_type=study.pool_type,
                attention_scale=study.attention_scale,
                hidden_size=study.hidden_size,
                norm_eps=study.norm_eps,
            ),
            optim=OptimConfig(
                epochs=study.epochs,
                batch_size=study.batch_size,
                lr=study.lr,
                backbone_lr=study.backbone_lr,
                guidance_weight=weight,
                seed=seed,
            ),
            run=RunConfig(device=study.device, compile=study.compile),
        )


@dataclass(frozen=True)
class Cell:
    """One head with one guidance and one seed. `weight` is lambda; 0 means no guidance."""

    attention: str
    cam_norm: str
    weight: float
    seed: int

    @property
    def name(self) -> str:
        guidance = f"{self.cam_norm}-{self.weight:g}" if self.weight else "unguided"
        return f"{self.attention}-{guidance}-seed{self.seed}"


def plan(study: StudyConfig, best: Callable[[], float]) -> Iterator[Cell]:
    """Every cell, in the order in which it is run.

    `best` gives the lambda that the sweep of the first cam_norm chose. It is called after that sweep. Without
    channel attention S is always 1/C and guidance cannot change it, so those rows are run without guidance.
    """
    first = study.cam_norms[0]
    for attention in study.attentions:
        yield from (Cell(attention, first, 0.0, seed) for seed in study.seeds)
    if "channel_spatial" in study.attentions:
        for cam_norm in study.cam_norms:
            for weight in study.guidance_weights:
                yield from (Cell("channel_spatial", cam_norm, weight, seed) for seed in study.seeds)
    if "channel" in study.attentions:
        weight = best()
        yield from (Cell("channel", first, weight, seed) for seed in study.seeds)


def chosen_weight(results: list[dict[str, Any]], cam_norm: str) -> float | None:
    """The lambda with the highest mean validation accuracy. Of equals it is the smallest."""
    scores: dict[float, list[float]] = {}
    for result in results:
        cell = result["cell"]
        if cell["attention"] == "channel_spatial" and cell["cam_norm"] == cam_norm and cell["weight"]:
            scores.setdefault(cell["weight"], []).append(result["val"]["accuracy"])
    return max(sorted(scores), key=lambda weight: sum(scores[weight]) / len(scores[weight]), default=None)


def ablate(config: AblateConfig, report: Report, command: str) -> bool:
    """Run the cells that are missing, write the report, and return whether all cells are done.

    The first Ctrl-C ends the current cell without a result and still writes the report.

    Raises:
        TrainError: an option or the data are unfit, or a file cannot be written.
    """
    config.check()
    study = config.study
    device = resolve_device(study.device)
    dtype = precision("auto", device)
    images = load_images(config.data)
    digest = images.digest(sizes=True)
    images.log_notes(f"{images.name}: {images.summary()}")
    torch.manual_seed(0)
    base = config.training("none", study.cam_norms[0], 0.0, 0)
    model = create_classifier(base, len(images.classes)).to(device)
    model.backbone.to(memory_format=torch.channels_last)
    frozen, trained = divided(model, base)
    assert frozen is not None
    last = None if isinstance(trained, GGAMHead) else cast(LastLayers, trained.backbone)
    if config.data.skip_bad_images:
        images = check_images(images, model.backbone, config.data)
    images = with_validation(images)
    folder = cells_folder(study.out)
    results: list[dict[str, Any]] = []

    def best() -> float:
        # Without a sweep, take the middle value.
        middle = study.guidance_weights[len(study.guidance_weights) // 2]
        return chosen_weight(results, study.cam_norms[0]) or middle

    finished = False
    with InterruptGuard() as interrupt:
        data: CellData | None = None
        try:
            for cell in plan(study, best):
                training = config.training(cell.attention, cell.cam_norm, cell.weight, cell.seed)
                options = {**comparable(config, training), "images": digest}
                path = folder / f"{cell.name}.json"
                found = stored(path, options)
                if found is None:
                    batches = map_batches(images, frozen, training, device, dtype, report, interrupt)
                    data = data or CellData(images, model.backbone, device, dtype, study.thresholds, last)
                    found = {
                        "cell": vars(cell),
                        "options": options,
                        **run_cell(training, data, batches, interrupt.check),
                    }
                    text = json.dumps(found)
                    write_atomically(path, lambda part, text=text: part.write_text(text))  # type: ignore[misc]
                    val, test = (found[split]["accuracy"] for split in ("val", "test"))
                    logger.info(
                        f"{cell.name}: accuracy {val:.3f} val, {test:.3f} test  {found['seconds']:.0f} s"
                    )
                results.append(found)
            finished = True
        except Interrupted:
            logger.info(f"interrupted after {len(results)} cells. The same command continues the study")
    if results:
        about = {
            "data": images.name,
            "splits": {name: len(rows) for name, rows in images.splits.items()},
            "notes": images.notes,
            "classes": images.classes,
            "backbone": study.backbone,
            "finetune_from": study.finetune_from,
            "preprocessing": (model.backbone.image_size, model.backbone.resize),
            "device": device_name(device),
            "command": command,
            "cam_norms": study.cam_norms,
            "finished": finished,
        }
        best_weights: dict[str, float | None] = {
            norm: chosen_weight(results, norm) for norm in study.cam_norms
        }
        for path in write_report(study.out, about, results, best_weights, images if study.pictures else None):
            logger.info(f"wrote {path}")
    return finished


def cells_folder(out: Path) -> Path:
    """Make and return `out`/cells.

    Raises:
        TrainError: the folder cannot be made, or `out` holds other files.
    """
    folder = out / CELLS
    if out.is_dir() and any(out.iterdir()) and not folder.is_dir():
        raise TrainError(f"--out {out} must be empty or hold an ablation; it holds other files")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainError(f"--out {out} cannot be written: {error.strerror}") from error
    remove_parts(out)
    return folder


def comparable(config: AblateConfig, training: TrainConfig) -> dict[str, Any]:
    """The options that a stored cell must have to be used again, in JSON's types."""
    elsewhere = {
        "root",
        "cache_dir",
        "workers",
        "out",
        "overwrite",
        "resume",
        "save_every",
        "device",
        "compile",
    }
    values = {name: value for name, value in training.values().items() if name not in elsewhere}
    return json.loads(json.dumps({**values, "thresholds": config.study.thresholds}, default=str))


def stored(path: Path, options: dict[str, Any]) -> dict[str, Any] | None:
    """The finished cell at `path`, if there is one.

    Raises:
        TrainError: it has other options, or it cannot be read.
    """
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        theirs = found["options"]
    except (OSError, ValueError, KeyError) as error:
        raise TrainError(f"{path} is not a finished cell. Remove it") from error
    # Cells of older versions lack the newer options.
    theirs = {**TrainConfig().values(), **BEFORE, **theirs}
    for name, value in options.items():
        if name == "images" and theirs.get(name) != value:
            raise TrainError(f"--out holds cells of other images, such as {path.name}. Choose another folder")
        if theirs.get(name) != value:
            raise TrainError(
                f"--out holds cells with --{name.replace('_', '-')} {theirs.get(name)}, not {value}, such as "
                f"{path.name}. Choose another folder"
            )
    return found


def with_validation(images: ImageSet) -> ImageSet:
    """The set with a validation split. If it has none, every fifth training image of a class becomes one."""
    if "val" in images.splits:
        return images
    train = images.splits["train"]
    labels = images.labels[train]
    held = torch.zeros(len(train), dtype=torch.bool)
    for label in labels.unique():
        held[(labels == label).nonzero().flatten()[_HELD_OUT - 1 :: _HELD_OUT]] = True
    if not held.any():
        raise TrainError(
            f"{images.name} needs {_HELD_OUT} training images in some class; validation takes every fifth one"
        )
    splits = {"train": train[~held], "val": train[held], "test": images.splits["test"]}
    return images.with_splits(splits, "every fifth training image of each class is in the validation split")
