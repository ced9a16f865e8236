"""`ggam-fast evaluate`: how good a trained classifier is, and whether it looks at the object."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from rich.table import Table
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from ggam_fast.training.config.options import DataConfig, DataName
from ggam_fast.training.data.batches import ImageBatches
from ggam_fast.training.data.image_set import ImageFiles, ImageSet, eval_transform, workers
from ggam_fast.training.data.scan import readable
from ggam_fast.training.errors import TrainError
from ggam_fast.training.measure.classification import classification_metrics
from ggam_fast.training.measure.faithfulness import area, deletion_curves, insertion_curves, ranks
from ggam_fast.training.measure.geometry import Placed, object_share, placed
from ggam_fast.training.measure.localization import Tally, centred, enlarged, localisation_rows
from ggam_fast.training.model.classifier import GGAMClassifier
from ggam_fast.training.model.heatmaps import heat_maps
from ggam_fast.training.model.model_file import Checkpoint
from ggam_fast.training.show.console import Report
from ggam_fast.training.show.gallery import choose_examples
from ggam_fast.training.show.page import Example, write_html
from ggam_fast.training.system.devices import device_name, resolve_device
from ggam_fast.training.system.files import writable_folder, write_atomically
from ggam_fast.training.system.versions import versions
from ggam_fast.training.use.mirrored import with_mirrored
from ggam_fast.training.use.open_run import check_splits, open_run, run_images, weights_name

logger = logging.getLogger(__name__)

NUMBERS, PAGE = "evaluation.json", "evaluation.html"
ATTENTION, CAM_LABEL, CAM_PREDICTED = "attention", "Grad-CAM, label", "Grad-CAM, guess"
CENTRE, UNIFORM, RANDOM = "centre Gaussian", "uniform map", "random order"
_BINS = 15


@dataclass(frozen=True)
class EvaluateConfig:
    run: tyro.conf.Positional[Path] = tyro.MISSING
    """Folder of a run, or a checkpoint in it."""
    data: DataName | None = None
    """Name of the data set. The default is the run's own data set."""
    root: Path | None = None
    """Folder of the data set. The default is the folder that the run used."""
    split: str = "test"
    """Split to evaluate."""
    weights: Literal["last", "best"] = "last"
    """Classifier of the run. best is that of the best epoch, as --best-by of the training chose
    it."""
    tta: Literal["none", "flip"] = "none"
    """flip averages the probabilities of each image and of its mirror image, for the classification measures
    alone."""
    out: Path | None = None
    """Folder for evaluation.json and evaluation.html. The default is the run's own folder."""
    faithfulness: int = 32
    """Images for insertion and deletion curves. They are spread over the split. 0 draws no curves."""
    steps: int = 16
    """Points of the insertion and deletion curves. The first point is not counted."""
    thresholds: int = 100
    """Number of thresholds of MaxBoxAccV2."""
    examples: int = 12
    """Number of pictures on the page. Half of them are mistakes, if there are that many."""
    batch_size: int = 32
    """Images in a batch."""
    workers: int | None = None
    """Number of processes that decode images. By default 0 on the CPU and up to 8 on a GPU."""
    cache_dir: Path | None = None
    """Where composed images are kept. By default $XDG_CACHE_HOME/ggam_fast or ~/.cache."""
    skip_bad_images: bool = False
    """Leave out files that cannot be read. A run that was trained with this option always leaves them out."""
    enlarge: bool = False
    """Allow images that are smaller than the network's input. A run that was trained with this option
    always allows them."""
    device: str = "auto"
    """Device, such as cpu or cuda:1. auto is the first GPU, or the CPU if there is none."""

    def check(self) -> None:
        """Raise a `TrainError` for a number out of range."""
        for name, value, least in (
            ("--faithfulness", self.faithfulness, 0),
            ("--steps", self.steps, 1),
            ("--thresholds", self.thresholds, 1),
            ("--examples", self.examples, 0),
            ("--batch-size", self.batch_size, 1),
            ("--workers", self.workers, 0),
        ):
            if value is not None and value < least:
                raise TrainError(f"{name} must be {least} or more; got {value}")


class Looked(NamedTuple):
    """Results of a pass over a split: logits (N, K), labels (N,), maps (N, h, w) by name, localisation.

    `averaged` (N, K) are the logits that --tta asks for. Without it they are `logits`.
    """

    logits: Tensor
    averaged: Tensor
    labels: Tensor
    maps: dict[str, Tensor]
    localisation: dict[str, dict[str, float]]


def evaluate_run(config: EvaluateConfig, report: Report) -> Path:
    """Evaluate as `config` says, and return the path of the page.

    Raises:
        TrainError: an option or the data are unfit, or a file cannot be read or written.
    """
    config.check()
    device = resolve_device(config.device)
    checkpoint = open_run(config.run, config.weights)
    model = checkpoint.model.to(device)
    images = run_images(checkpoint, config.data, config.root, config.cache_dir)
    theirs = checkpoint.description["data"] if config.data is None else {}
    if config.split not in images.splits:
        raise TrainError(
            f"--split must be one of {', '.join(images.splits)} for {images.name}; got {config.split}"
        )
    images = readable(
        images,
        model.backbone.image_size,
        skip_bad=config.skip_bad_images or theirs.get("skip_bad_images", False),
        enlarge=config.enlarge or theirs.get("enlarge", False),
    )
    if config.data is None:
        check_splits(checkpoint, images, config.root)
    out = config.out or (config.run if config.run.is_dir() else config.run.parent)
    with writable_folder(out):
        results, examples = evaluated(model, checkpoint, images, config, device, report)
        text = json.dumps(results, indent=1) + "\n"
        write_atomically(out / NUMBERS, lambda part: part.write_text(text))
        write_html(out / PAGE, results, examples)
    logger.info(f"results in {out}: {NUMBERS}, {PAGE}")
    return out / PAGE


def evaluated(
    model: GGAMClassifier,
    checkpoint: Checkpoint,
    images: ImageSet,
    config: EvaluateConfig,
    device: torch.device,
    report: Report,
) -> tuple[dict[str, Any], list[Example]]:
    """The contents of evaluation.json, and the pictures of the page."""
    rows = images.splits[config.split]
    images.log_notes(f"{images.name}: {len(rows)} images of split {config.split}; {device_name(device)}")
    looked = look(model, images, config, device, report)
    metrics = classification_metrics(looked.averaged, looked.labels)
    report.table(metrics, images.classes, config.split)
    results: dict[str, Any] = {
        "run": {
            **{name: checkpoint.description[name] for name in ("backbone", "head", "optim", "finetune")},
            "finetune_from": checkpoint.description.get("finetune_from"),  # older checkpoints have none
        },
        "weights": weights_name(config.run, config.weights),
        "tta": config.tta,
        "data": images.name,
        "notes": images.notes,
        "split": config.split,
        "classes": images.classes,
        "classification": {**metrics.as_dict(), **more_metrics(looked.averaged, looked.labels)},
        "localisation": looked.localisation,
        "localised_against": against(images),
        "thresholds": config.thresholds,
        "faithfulness": None,
        "device": device_name(device),
        "versions": versions(),
    }
    for name in ("top5", "calibration_error"):
        logger.info(f"{name.replace('_', ' ')} {results['classification'][name]:.3f}")
    if looked.localisation:
        show_localisation(looked.localisation, results["localised_against"], report)
    else:
        logger.info(f"{images.name} has no annotations of objects, so localisation is not measured")
    if config.faithfulness:
        results["faithfulness"] = faithful(model, images, looked, config, device, report)
    return results, pick_examples(model, images, looked, config)


def against(images: ImageSet) -> str | None:
    """Names of the annotations that localisation is measured against."""
    found = images.annotations
    if found is None:
        return None
    return " and ".join(
        name
        for name, there in (
            ("object masks", found.masks is not None),
            ("boxes", found.boxes is not None),
            ("parts", found.parts is not None),
        )
        if there
    )


@torch.no_grad()
def look(
    model: GGAMClassifier,
    images: ImageSet,
    config: EvaluateConfig,
    device: torch.device,
    report: Report,
) -> Looked:
    """One pass over the split, for logits, heat maps and localisation."""
    model.eval()
    backbone = model.backbone.to(memory_format=torch.channels_last)
    side = backbone.image_size
    transform = eval_transform(*backbone.preprocessing)
    files = ImageFiles(images, config.split, transform)
    reading = workers(DataConfig(workers=config.workers), device)
    batches = ImageBatches(files, config.batch_size, device, reading)
    logits: list[Tensor] = []
    averaged: list[Tensor] = []
    labels: list[Tensor] = []
    maps: dict[str, list[Tensor]] = {}
    tally = Tally((side, side), config.thresholds)
    truths: list[Placed] = []
    rows = iter(images.splits[config.split].split(config.batch_size))
    with report.bar("looking", len(files)) as bar:
        for inputs, target in batches.epoch(0):
            features = backbone(inputs)
            of_label = heat_maps(model.head, features, target)
            heats = {CAM_LABEL: of_label.grad_cam, CAM_PREDICTED: heat_maps(model.head, features).grad_cam}
            if of_label.attention is not None:
                heats[ATTENTION] = of_label.attention
            logits.append(of_label.logits.cpu())
            if config.tta == "flip":
                mirrored = model(inputs.flip(-1)).float().cpu()
                averaged.append(with_mirrored(logits[-1], mirrored))
            labels.append(target.cpu())
            for name, heat in heats.items():
                maps.setdefault(name, []).append(heat.cpu())
            truths.append(placed(images, next(rows).tolist(), transform, side))
            centre = centred(len(target), (side, side))
            tally.add({**{name: heat.cpu() for name, heat in heats.items()}, CENTRE: centre}, truths[-1])
            bar.advance(len(target))
    localisation = tally.means()
    covered = object_share(truths)
    if covered is not None:
        localisation[UNIFORM] = {"energy": covered}
    joined = {name: torch.cat(parts) for name, parts in maps.items()}
    plain = torch.cat(logits)
    return Looked(plain, torch.cat(averaged) if averaged else plain, torch.cat(labels), joined, localisation)


def more_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-5 accuracy and expected calibration error over 15 bins. With K < 5 classes, it is top-K."""
    classes = logits.shape[1]
    top5 = multiclass_accuracy(logits, labels, num_classes=classes, average="micro", top_k=min(5, classes))
    error = multiclass_calibration_error(logits.softmax(1), labels, num_classes=classes, n_bins=_BINS)
    return {"top5": top5.item(), "calibration_error": error.item()}


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` places, evenly spread, or all places if there are fewer."""
    wanted = min(wanted, count)
    return [place * count // wanted for place in range(wanted)]


@torch.no_grad()
def faithful(
    model: GGAMClassifier,
    images: ImageSet,
    looked: Looked,
    config: EvaluateConfig,
    device: torch.device,
    report: Report,
) -> dict[str, Any]:
    """Insertion and deletion curves of the predicted class, for each map and for random order."""
    backbone = model.backbone
    side = (backbone.image_size,) * 2
    transform = eval_transform(*backbone.preprocessing)
    chosen = spread(len(looked.labels), config.faithfulness)
    rows = images.splits[config.split][chosen].tolist()
    predicted = looked.logits[chosen].argmax(1)
    orders = {name: looked.maps[name] for name in (CAM_PREDICTED, ATTENTION) if name in looked.maps}
    found: dict[str, dict[str, list[Tensor]]] = {
        name: {"insertion": [], "deletion": []} for name in (*orders, RANDOM)
    }
    generator = torch.Generator().manual_seed(0)
    with report.bar("insertion and deletion", len(rows)) as bar:
        for places in _batched(range(len(rows)), config.batch_size):
            inputs = torch.stack([transform(images.read(rows[place])) for place in places]).to(device)
            classes = predicted[list(places)].to(device)

            def probability(shown: Tensor, classes: Tensor = classes) -> Tensor:
                out = model(shown.contiguous(memory_format=torch.channels_last))
                assert isinstance(out, Tensor)
                return out.float().softmax(1).gather(1, classes[:, None])[:, 0]

            for name, curves in found.items():
                if name == RANDOM:
                    heat = torch.zeros(len(places), *side)
                else:
                    heat = enlarged(orders[name][[chosen[place] for place in places]], side)
                rank = ranks(heat, generator).to(device)
                curves["insertion"].append(insertion_curves(probability, inputs, rank, config.steps).cpu())
                curves["deletion"].append(deletion_curves(probability, inputs, rank, config.steps).cpu())
            bar.advance(len(places))
    results = {
        name: {
            kind: {
                "area": area(torch.cat(curves)).mean().item(),
                "curve": torch.cat(curves).mean(0).tolist(),
            }
            for kind, curves in both.items()
        }
        for name, both in found.items()
    }
    title = f"area under insertion (higher is better) and deletion (lower) curves, {len(rows)} images"
    table = Table(title=title, title_justify="left")
    for column in ("pixels in the order of", "insertion", "deletion"):
        table.add_column(column, justify="left" if column.startswith("pixels") else "right")
    for name, both in results.items():
        table.add_row(name, f"{both['insertion']['area']:.3f}", f"{both['deletion']['area']:.3f}")
    report.console.print(table)
    return {"images": len(rows), "steps": config.steps, "maps": results}


def _batched(places: range, size: int) -> Iterator[range]:
    for start in range(0, len(places), size):
        yield places[start : start + size]


def show_localisation(found: dict[str, dict[str, float]], truth: str, report: Report) -> None:
    header, lines = localisation_rows(found)
    title = f"localisation against {truth}, % (the last lines do not depend on the image)"
    table = Table(title=title, title_justify="left")
    for column in header:
        table.add_column(column, justify="left" if column == "map" else "right")
    for line in lines:
        table.add_row(*line)
    report.console.print(table)


def pick_examples(
    model: GGAMClassifier, images: ImageSet, looked: Looked, config: EvaluateConfig
) -> list[Example]:
    """Pictures for the page, as `choose_examples` chooses them."""
    if not config.examples:
        return []
    backbone = model.backbone
    size, _, _, resize = backbone.preprocessing
    plain = eval_transform(size, (0.0,) * 3, (1.0,) * 3, resize)
    examples = []
    for place in choose_examples(looked.logits, looked.labels, config.examples):
        row = int(images.splits[config.split][place])
        probabilities = looked.logits[place].softmax(0)
        guess = int(probabilities.argmax())
        examples.append(
            Example(
                file=images.files[row].name,
                picture=plain(images.read(row)).clamp(0, 1).permute(1, 2, 0),
                label=images.classes[int(looked.labels[place])],
                guess=images.classes[guess],
                probability=probabilities[guess].item(),
                maps=_named(looked.maps, place),
            )
        )
    return examples


def _named(maps: dict[str, Tensor], place: int) -> Sequence[tuple[str, Tensor]]:
    return [(name, maps[name][place]) for name in (ATTENTION, CAM_LABEL, CAM_PREDICTED) if name in maps]
