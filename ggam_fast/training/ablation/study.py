"""`ggam-fast ablate`: compare attentions and guidances over several seeds.

Every head is trained on cached maps: those of a frozen backbone, or those that enter its trained last layers.
One cell is one training run. Each finished cell is one file, so the same command run again trains only the
cells that are missing.

Lambda of a guidance is chosen on validation images, with seeds of its own. The table has other seeds, so no
seed of the table took part in the choice.
"""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch

from ggam_fast import GGAMHead
from ggam_fast.training.ablation.cell import CellData, run_cell
from ggam_fast.training.ablation.guidances import GUIDANCES
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
from ggam_fast.training.data.readers import read_shifted
from ggam_fast.training.errors import Interrupted, TrainError
from ggam_fast.training.model.cut import LastLayers
from ggam_fast.training.model.feature_cache import default_cache_dir
from ggam_fast.training.run.prepare import check_images, create_classifier, divided, load_images, map_batches
from ggam_fast.training.show.console import Report
from ggam_fast.training.system.devices import device_name, precision, resolve_device
from ggam_fast.training.system.files import remove_parts, write_atomically
from ggam_fast.training.system.interrupts import InterruptGuard

logger = logging.getLogger(__name__)

CELLS = "cells"
GuidanceName = Literal[
    "none", "paper", "release", "standardized", "commensurate", "positions", "both",
    "mean_activation", "other_image", "gaussian",
]  # fmt: skip
_HELD_OUT = 5


@dataclass(frozen=True)
class StudyConfig:
    out: Path = field(default_factory=lambda: Path("ablation"))
    """Folder of the results. A study that was begun in it is continued."""
    seeds: tuple[int, ...] = (2, 3, 4, 5, 6)
    """Seeds of the table. A seed decides initial weights and the order of the batches."""
    choice_seeds: tuple[int, ...] = (0, 1)
    """Seeds with which lambda is chosen. They are not in the table."""
    attentions: tuple[Literal["none", "channel", "spatial", "channel_spatial"], ...] = (
        "none",
        "channel",
        "spatial",
        "channel_spatial",
    )
    """Attentions to compare."""
    guidances: tuple[GuidanceName, ...] = (
        "none",
        "paper",
        "release",
        "standardized",
        "commensurate",
        "positions",
        "both",
    )
    """Guidances to compare, each with the attentions that it can guide. The controls mean_activation,
    other_image and gaussian guide T by maps that know less than the class's own map."""
    guidance_weights: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0)
    """Values of lambda to try for guidances of channel attention. A single value is not tried, but taken."""
    position_weights: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)
    """Values of lambda to try for guidances of spatial attention, and of both."""
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
    """Train the backbone from this module on, such as blocks.5 or layer4, with every head anew."""
    epochs: int = 6
    """Passes over the training split. Their number is the same for every cell."""
    batch_size: int = 64
    """Images in a batch."""
    lr: float = 3e-4
    """Highest learning rate of the head."""
    backbone_lr: float = 1e-4
    """Highest learning rate of the backbone, with --finetune-from."""
    train_per_class: int | None = None
    """Train on the first images of each class alone, this many. By default on all."""
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
            ("--position-weights", study.position_weights),
            ("--guidances", study.guidances),
            ("--attentions", study.attentions),
        ):
            if not chosen or len(set(chosen)) < len(chosen):
                raise TrainError(f"{flag} must be one or more different values; got {list(chosen)}")
        for flag, weights in (
            ("--guidance-weights", study.guidance_weights),
            ("--position-weights", study.position_weights),
        ):
            if min(weights) <= 0:
                raise TrainError(f"{flag} must be above 0; got {min(weights)}")
            if len(weights) > 1 and not study.choice_seeds:
                raise TrainError(f"--choice-seeds must not be empty, because {flag} has several values")
        both = sorted(set(study.seeds) & set(study.choice_seeds))
        if both:
            raise TrainError(f"--seeds and --choice-seeds must differ; both have {both[0]}")
        if study.train_per_class is not None and study.train_per_class < 1:
            raise TrainError(f"--train-per-class must be 1 or more; got {study.train_per_class}")
        if not 1 <= study.thresholds <= 1000:
            raise TrainError(f"--thresholds must be from 1 to 1000; got {study.thresholds}")
        if not self.pairs():
            raise TrainError(
                f"--guidances {' '.join(study.guidances)} do not suit "
                f"--attentions {' '.join(study.attentions)}"
            )
        for seed in (*study.seeds, *study.choice_seeds):
            self.training(Cell(study.attentions[0], "none", 0.0, seed)).check()

    def pairs(self) -> list[tuple[str, str]]:
        """Attention and guidance of every row of the table."""
        study = self.study
        return [
            (attention, guidance)
            for attention in study.attentions
            for guidance in study.guidances
            if GUIDANCES[guidance].suits(attention)
        ]

    def weights(self, guidance: str) -> tuple[float, ...]:
        """The values of lambda to try."""
        about = GUIDANCES[guidance]
        if not (about.channels or about.positions):
            return (0.0,)
        return self.study.position_weights if about.positions else self.study.guidance_weights

    def training(self, cell: Cell) -> TrainConfig:
        """The options of the training run of one cell."""
        study, guidance = self.study, GUIDANCES[cell.guidance]
        of_positions = "position_guidance" in guidance.head
        # The controls need v, which is L times beta there.
        cam_at: Literal["features", "attended"] = "attended" if guidance.control else "features"
        options: dict[str, Any] = {"attention": cell.attention, "cam_at": cam_at, **guidance.head}
        return TrainConfig(
            data=self.data,
            backbone=BackboneConfig(study.backbone, study.pretrained, finetune_from=study.finetune_from),
            head=HeadConfig(
                spatial_norm=study.spatial_norm,
                pool_type=study.pool_type,
                attention_scale=study.attention_scale,
                hidden_size=study.hidden_size,
                norm_eps=study.norm_eps,
                **options,
            ),
            optim=OptimConfig(
                epochs=study.epochs,
                batch_size=study.batch_size,
                lr=study.lr,
                backbone_lr=study.backbone_lr,
                guidance_weight=cell.weight if guidance.channels or guidance.control else 0.0,
                position_weight=cell.weight if of_positions else OptimConfig.position_weight,
                seed=cell.seed,
            ),
            run=RunConfig(device=study.device, compile=study.compile),
        )


@dataclass(frozen=True)
class Cell:
    """One training run. `weight` is lambda; 0 means no guidance."""

    attention: str
    guidance: str
    weight: float
    seed: int

    @property
    def name(self) -> str:
        weight = f"-{self.weight:g}" if self.weight else ""
        return f"{self.attention}-{self.guidance}{weight}-seed{self.seed}"


def plan(config: AblateConfig, chosen: Callable[[str, str], float]) -> Iterator[Cell]:
    """Every cell, in the order in which it is run.

    Each lambda is tried first. `chosen` then gives the lambda of an attention and a guidance. The table's
    cells follow seed by seed, so a study that is stopped has the same seeds in all rows but one.
    """
    study, pairs = config.study, config.pairs()
    for attention, guidance in pairs:
        weights = config.weights(guidance)
        for weight in weights if len(weights) > 1 else ():
            yield from (Cell(attention, guidance, weight, seed) for seed in study.choice_seeds)
    for seed in study.seeds:
        for attention, guidance in pairs:
            yield Cell(attention, guidance, chosen(attention, guidance), seed)


def planned(config: AblateConfig) -> int:
    """The number of cells."""
    return sum(1 for _ in plan(config, lambda *_: 0.0))


def chosen_weight(
    results: list[dict[str, Any]], attention: str, guidance: str, weights: Sequence[float]
) -> float:
    """The lambda with the highest mean validation accuracy of the seeds of the choice.

    Of equals it is the one with the lower mean negative log likelihood.
    """
    if len(weights) == 1:
        return weights[0]
    scores: dict[float, list[dict[str, float]]] = {weight: [] for weight in weights}
    for result in results:
        cell = result["cell"]
        if (cell["attention"], cell["guidance"]) == (attention, guidance) and cell["weight"] in scores:
            scores[cell["weight"]].append(result["val"])

    def score(weight: float) -> tuple[float, float]:
        found = scores[weight]
        return statistics.mean(f["accuracy"] for f in found), -statistics.mean(f["nll"] for f in found)

    return max((weight for weight in weights if scores[weight]), key=score)


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
    base = config.training(Cell("none", "none", 0.0, 0))
    model = create_classifier(base, len(images.classes)).to(device)
    model.backbone.to(memory_format=torch.channels_last)
    frozen, trained = divided(model, base)
    assert frozen is not None
    last = None if isinstance(trained, GGAMHead) else cast(LastLayers, trained.backbone)
    if config.data.skip_bad_images:
        images = check_images(images, model.backbone, config.data)
    images = with_validation(images)
    if study.train_per_class is not None:
        images = few_shot(images, study.train_per_class)
    cache = config.data.cache_dir or default_cache_dir()
    shifted = read_shifted(config.data.data, config.data.root, cache)
    folder = cells_folder(study.out)
    results: list[dict[str, Any]] = []
    chosen: dict[tuple[str, str], float] = {}

    def choose(attention: str, guidance: str) -> float:
        # The results of the table must not change a choice.
        pair = attention, guidance
        if pair not in chosen:
            chosen[pair] = chosen_weight(results, *pair, config.weights(guidance))
        return chosen[pair]

    count, seconds, finished = planned(config), [], False
    with InterruptGuard() as interrupt:
        data: CellData | None = None
        try:
            for number, cell in enumerate(plan(config, choose)):
                training = config.training(cell)
                options = {**comparable(config, training), "images": digest}
                path = folder / f"{cell.name}.json"
                found = stored(path, options)
                if found is None:
                    batches = map_batches(images, frozen, training, device, dtype, report, interrupt)
                    if shifted is not None:
                        others = map_batches(shifted, frozen, training, device, dtype, report, interrupt)
                        batches["shifted"] = others["test"]
                    data = data or CellData(images, model.backbone, device, dtype, study.thresholds, last)
                    control = GUIDANCES[cell.guidance].control
                    measured = run_cell(training, data, batches, interrupt.check, control)
                    found = {"cell": vars(cell), "options": options, **measured}
                    text = json.dumps(found)
                    write_atomically(path, lambda part, text=text: part.write_text(text))  # type: ignore[misc]
                seconds.append(found["seconds"])
                results.append(found)
                logger.info(_progress(cell, found, count - number - 1, statistics.median(seconds)))
            finished = True
        except Interrupted:
            logger.info(
                f"interrupted after {len(results)} of {count} cells. The same command continues the study"
            )
    if results:
        about = {
            "data": images.name,
            "splits": {name: len(rows) for name, rows in images.splits.items()},
            "notes": (*images.notes, *(shifted.notes if shifted is not None else ())),
            "classes": images.classes,
            "backbone": study.backbone,
            "finetune_from": study.finetune_from,
            "preprocessing": (model.backbone.image_size, model.backbone.resize),
            "device": device_name(device),
            "command": command,
            "seeds": study.seeds,
            "choice_seeds": study.choice_seeds,
            "cells": (len(results), count),
            "finished": finished,
        }
        for path in write_report(study.out, about, results, images if study.pictures else None):
            logger.info(f"wrote {path}")
    return finished


def _progress(cell: Cell, found: dict[str, Any], left: int, seconds: float) -> str:
    """A line for a finished cell: its accuracies, the number of cells that are left, and their time."""
    minutes = left * seconds / 60
    time = f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{minutes:.0f} minutes"
    return (
        f"{cell.name}: accuracy {found['val']['accuracy']:.3f} val, {found['test']['accuracy']:.3f} test  "
        f"{found['seconds']:.0f} s.  {left} cells left, about {time}"
    )


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
    return _plain({**values, "thresholds": config.study.thresholds})


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values, default=str))


def stored(path: Path, options: dict[str, Any]) -> dict[str, Any] | None:
    """The finished cell at `path`, if there is one.

    An option that did not exist when it was trained counts with the value that it stands for.

    Raises:
        TrainError: it has other options, or it cannot be read.
    """
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        theirs = {**_plain(TrainConfig().values()), **BEFORE, **found["options"]}
    except (OSError, ValueError, KeyError) as error:
        raise TrainError(f"{path} is not a finished cell. Remove it") from error
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


def few_shot(images: ImageSet, count: int) -> ImageSet:
    """The set with the first `count` training images of each class."""
    train = images.splits["train"]
    labels = images.labels[train]
    kept = torch.cat([train[labels == label][:count] for label in labels.unique()]).sort().values
    note = f"the training split has {len(kept)} of its {len(train)} images: at most {count} of each class"
    return images.with_splits({**images.splits, "train": kept}, note)
