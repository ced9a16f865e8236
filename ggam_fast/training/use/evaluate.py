"""`ggam-fast evaluate`: how good a trained classifier is, and whether it looks at the object."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from rich.table import Table
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from ggam_fast.training.config.options import DataConfig, DataName
from ggam_fast.training.data.batches import ImageBatches
from ggam_fast.training.data.image_set import ImageFiles, ImageSet, eval_transform, workers
from ggam_fast.training.data.scan import readable
from ggam_fast.training.errors import TrainError
from ggam_fast.training.measure.calibration import calibration_error, reliability
from ggam_fast.training.measure.classification import classification_metrics
from ggam_fast.training.measure.faithfulness import area, deletion_curves, insertion_curves, ranks
from ggam_fast.training.measure.geometry import Placed, object_share, placed
from ggam_fast.training.measure.intervals import bootstrapped, wilson
from ggam_fast.training.measure.localization import Tally, centred, enlarged, localisation_rows
from ggam_fast.training.model.classifier import GGAMClassifier
from ggam_fast.training.model.heatmaps import heat_maps
from ggam_fast.training.model.model_file import BEST, WEIGHTS, Checkpoint
from ggam_fast.training.show.console import Report
from ggam_fast.training.show.gallery import choose_examples
from ggam_fast.training.show.page import Example, Seen, Training, page, write_html
from ggam_fast.training.system.devices import device_name, resolve_device
from ggam_fast.training.system.files import writable_folder, write_atomically
from ggam_fast.training.system.versions import versions
from ggam_fast.training.use.mirrored import with_mirrored
from ggam_fast.training.use.open_run import check_splits, open_run, run_images, weights_name

logger = logging.getLogger(__name__)

NUMBERS, PAGE = "evaluation.json", "evaluation.html"
ATTENTION, CAM_LABEL, CAM_PREDICTED = "attention", "Grad-CAM, label", "Grad-CAM, guess"
CENTRE, UNIFORM, RANDOM = "centre Gaussian", "uniform map", "random order"
# The results of the training, in the folder of a run.
TRAINED = "metrics.json"


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
    insertion_steps: Annotated[int, tyro.conf.arg(aliases=["--steps"])] = 16
    """Points of the insertion and deletion curves. The first point is not counted."""
    max_images: int = 0
    """Most images to evaluate. They are spread over the split. 0 takes all of them."""
    thresholds: int = 100
    """Number of thresholds of MaxBoxAccV2."""
    examples: int = 12
    """Number of pictures of the worst errors on the page, and of pictures spread over the classes."""
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
            ("--insertion-steps", self.insertion_steps, 1),
            ("--max-images", self.max_images, 0),
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
    images = limited(images, config.split, config.max_images)
    out = config.out or (config.run if config.run.is_dir() else config.run.parent)
    with writable_folder(out):
        results, html = evaluated(model, checkpoint, images, config, device, report)
        text = json.dumps(results, indent=1) + "\n"
        write_atomically(out / NUMBERS, lambda part: part.write_text(text))
        write_html(out / PAGE, html)
    logger.info(f"results in {out}: {NUMBERS}, {PAGE}")
    return out / PAGE


def evaluated(
    model: GGAMClassifier,
    checkpoint: Checkpoint,
    images: ImageSet,
    config: EvaluateConfig,
    device: torch.device,
    report: Report,
) -> tuple[dict[str, Any], str]:
    """The contents of evaluation.json, and the page."""
    rows = images.splits[config.split]
    images.log_notes(f"{images.name}: {len(rows)} images of split {config.split}; {device_name(device)}")
    if config.faithfulness:
        logger.info(
            f"insertion and deletion: {passes(model, len(rows), config)} forward passes, as many as "
            "--faithfulness and --insertion-steps ask for"
        )
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
    worst, others = pick_examples(model, images, looked, config)
    return results, page(results, seen(images, looked, config.split), worst, others, training_of(config.run))


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
            if not logits and config.faithfulness:
                each = seconds_of(partial(model, inputs), device) / len(target)
                logger.info(
                    f"they will take about {each * passes(model, len(files), config):.0f} s: "
                    f"{1000 * each:.3g} ms for each pass, measured on the first batch"
                )
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


def more_metrics(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Top-5 accuracy (top-K with K < 5 classes), calibration, and 95 % intervals."""
    classes, count = logits.shape[1], len(labels)

    def top(k: int) -> float:
        return multiclass_accuracy(logits, labels, num_classes=classes, average="micro", top_k=k).item()

    shares = {"accuracy": top(1), "top5": top(min(5, classes))}
    return {
        "top5": shares["top5"],
        "calibration_error": calibration_error(logits, labels),
        "reliability": [None if one is None else one._asdict() for one in reliability(logits, labels)],
        "intervals": {
            **{name: wilson(round(share * count), count) for name, share in shares.items()},
            **bootstrapped(logits.argmax(1), labels, classes),
        },
    }


def seen(images: ImageSet, looked: Looked, split: str) -> list[Seen]:
    """What the classifier says of each image of the split."""
    probabilities = looked.logits.softmax(1)
    best, guesses = probabilities.max(1)
    of_label = probabilities.gather(1, looked.labels[:, None])[:, 0]
    found = zip(
        images.splits[split].tolist(), looked.labels.tolist(), guesses.tolist(), best.tolist(),
        of_label.tolist(), strict=True,
    )  # fmt: skip
    return [
        Seen(images.files[row].name, images.classes[label], images.classes[guess], probability, share)
        for row, label, guess, probability, share in found
    ]


def training_of(run: Path) -> Training | None:
    """The epochs of a finished run, from its folder or one of its checkpoints. None if it has no results.

    Raises:
        TrainError: the results cannot be read.
    """
    if not run.is_dir() and run.name not in (WEIGHTS, BEST):
        return None
    path = (run if run.is_dir() else run.parent) / TRAINED
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        # Older runs have no best epoch.
        return Training(found["epochs"], found.get("best_epoch", len(found["epochs"])) - 1)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainError(f"{path} cannot be read: {error}") from error


def limited(images: ImageSet, split: str, most: int) -> ImageSet:
    """The images with at most `most` in the split, evenly spread over it. 0 keeps all."""
    rows = images.splits[split]
    if not 0 < most < len(rows):
        return images
    note = f"{most} of the {len(rows)} images of split {split}, spread over it (--max-images)"
    return images.with_splits({**images.splits, split: rows[spread(len(rows), most)]}, note)


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
                curves["insertion"].append(
                    insertion_curves(probability, inputs, rank, config.insertion_steps).cpu()
                )
                curves["deletion"].append(
                    deletion_curves(probability, inputs, rank, config.insertion_steps).cpu()
                )
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
    return {"images": len(rows), "steps": config.insertion_steps, "maps": results}


def passes(model: GGAMClassifier, images: int, config: EvaluateConfig) -> int:
    """Forward passes of one image that `faithful` needs: one for each point of each curve."""
    orders = 3 if model.head.attention in ("channel_spatial", "spatial") else 2
    return min(config.faithfulness, images) * orders * 2 * (config.insertion_steps + 1)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Time of a second call of `run`. The first one may compile and allocate."""
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


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
) -> tuple[list[Example], list[Example]]:
    """Pictures for the page: of the worst errors, and of others as `choose_examples` chooses them."""
    backbone = model.backbone
    size, _, _, resize = backbone.preprocessing
    plain = eval_transform(size, (0.0,) * 3, (1.0,) * 3, resize)
    rows = images.splits[config.split]

    def drawn(place: int) -> Example:
        label, guess = int(looked.labels[place]), int(looked.logits[place].argmax())
        maps = {name: those[place] for name, those in looked.maps.items()}
        return Example(
            row=place,
            picture=plain(images.read(int(rows[place]))).clamp(0, 1).permute(1, 2, 0),
            attention=maps.get(ATTENTION),
            cams={images.classes[label]: maps[CAM_LABEL], images.classes[guess]: maps[CAM_PREDICTED]},
        )

    worst = worst_errors(looked.logits, looked.labels, config.examples)
    others = choose_examples(looked.logits, looked.labels, config.examples) if config.examples else []
    return [drawn(place) for place in worst], [drawn(place) for place in others if place not in worst]


def worst_errors(logits: Tensor, labels: Tensor, count: int) -> list[int]:
    """Places of at most `count` wrong predictions, that with the least probability of its label first."""
    of_label = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    wrong = (logits.argmax(1) != labels).nonzero()[:, 0]
    return wrong[of_label[wrong].argsort(stable=True)][:count].tolist()
