"""One cell of an ablation: train a head, test it, and measure its localisation, S, T and beta."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ggam_fast import GGAMHead
from ggam_fast.training.ablation.controls import ControlLoss
from ggam_fast.training.ablation.mechanism import statistics_of
from ggam_fast.training.config.options import TrainConfig
from ggam_fast.training.data.batches import Batches
from ggam_fast.training.data.image_set import ImageSet, eval_transform
from ggam_fast.training.errors import TrainError
from ggam_fast.training.measure.calibration import calibration_error
from ggam_fast.training.measure.classification import classification_metrics
from ggam_fast.training.measure.geometry import Placed, object_share, placed
from ggam_fast.training.measure.localization import Tally, centred
from ggam_fast.training.model.backbones import Backbone
from ggam_fast.training.model.classifier import LastClassifier, Trained, create_head, head_and_features
from ggam_fast.training.model.cut import LastLayers
from ggam_fast.training.model.heatmaps import heat_maps
from ggam_fast.training.run.loop import Trainer, evaluate
from ggam_fast.training.run.optimizer import parameter_groups
from ggam_fast.training.system.devices import autocast
from ggam_fast.training.system.versions import versions

_METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "majority")
_CHUNK = 64
_PICTURES = 6


class CellData:
    """What all cells share, such as the annotations of the test split in pixels of the network's input.

    `last`: the layers of the backbone that every cell trains from these weights on.
    """

    def __init__(
        self,
        images: ImageSet,
        backbone: Backbone,
        device: torch.device,
        dtype: torch.dtype,
        thresholds: int,
        last: LastLayers | None = None,
    ) -> None:
        self.images = images
        self.backbone = backbone
        self.device = device
        self.dtype = dtype
        self.thresholds = thresholds
        self.last = last

    @cached_property
    def annotations(self) -> list[Placed]:
        """Annotations of the test split, in pieces of `_CHUNK` images. Empty if the data set has none."""
        if self.images.annotations is None:
            return []
        transform = eval_transform(*self.backbone.preprocessing)
        rows = self.images.splits["test"]
        return [
            placed(self.images, part.tolist(), transform, self.backbone.image_size)
            for part in rows.split(_CHUNK)
        ]

    @property
    def pictures(self) -> list[int]:
        """Positions in the test split whose maps are kept: the first image of some evenly spread classes."""
        labels = self.images.labels[self.images.splits["test"]]
        classes = labels.unique()
        count = min(_PICTURES, len(classes))
        spread = [int(classes[index * len(classes) // count]) for index in range(count)]
        return [int((labels == label).nonzero()[0]) for label in spread]

    def localised(self, maps: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
        """Localisation measures of maps (N, h, w) by name. The maps cover the test split, in its order."""
        tally = Tally((self.backbone.image_size,) * 2, self.thresholds)
        for number, truth in enumerate(self.annotations):
            rows = slice(number * _CHUNK, (number + 1) * _CHUNK)
            tally.add({name: heat[rows] for name, heat in maps.items()}, truth)
        return tally.means()

    @cached_property
    def chance(self) -> dict[str, dict[str, float]]:
        """What chance reaches: all measures of a Gaussian around the centre, the energy of a uniform map."""
        if not self.annotations:
            return {}
        count, side = len(self.images.splits["test"]), self.backbone.image_size
        found = self.localised({"centre": centred(count, (side, side))})
        covered = object_share(self.annotations)
        return found if covered is None else {**found, "uniform": {"energy": covered}}


def run_cell(
    config: TrainConfig,
    data: CellData,
    batches: dict[str, Batches],
    check: Callable[[], None],
    control: str = "",
) -> dict[str, Any]:
    """Train a head, or the last layers too, on cached maps. Measure it, and return numbers in JSON's types.

    With `control` T is guided by that map, see `controls`.

    Raises:
        Interrupted: `check` raised it.
        TrainError: the head refuses an option.
    """
    started = time.monotonic()
    device, dtype, classes = data.device, data.dtype, len(data.images.classes)
    torch.manual_seed(config.optim.seed)
    try:
        head = create_head(data.backbone, classes, config.head).to(device)
    except (ValueError, TypeError) as error:
        raise TrainError(str(error)) from error
    trained: Trained = head if data.last is None else LastClassifier(copy.deepcopy(data.last), head)
    before = statistics_of(trained, batches["val"])
    loss = None
    if control:
        loss = ControlLoss(trained, control, config.optim.guidance_weight, device, dtype)
    trainer = Trainer(
        trained,
        parameter_groups(trained, config.optim),
        config.optim,
        classes,
        device,
        dtype=dtype,
        compile=config.run.compile,
        check=check,
        loss=loss,
    )
    trained_from = time.monotonic()
    epochs = trainer.run(batches["train"], batches["val"])
    trained_for = time.monotonic() - trained_from
    trained = cast(Trained, trainer.result).eval()
    # A control's head had another one in training. Maps are compared at the same place.
    (trained if isinstance(trained, GGAMHead) else trained.head).cam_at = "features"
    results: dict[str, Any] = {"epochs": epochs}
    for split in ("val", "test", *(("shifted",) if "shifted" in batches else ())):
        logits, labels = evaluate(trained, batches[split], device, dtype, check=check)
        metrics = classification_metrics(logits, labels)
        results[split] = {
            **{name: getattr(metrics, name) for name in _METRICS},
            "nll": cross_entropy(logits, labels).item(),
            "calibration_error": calibration_error(logits, labels),
        }
    grad_cam, attention = _test_maps(trained, data, batches["test"])
    if data.annotations:
        maps = {"grad_cam": grad_cam} | ({} if attention is None else {"attention": attention})
        results["localisation"] = data.localised(maps) | data.chance
    results["mechanism"] = {"before": before, "after": statistics_of(trained, batches["val"])}
    results["pictures"] = {
        "rows": data.pictures,
        "grad_cam": _plain(grad_cam[data.pictures]),
        "attention": None if attention is None else _plain(attention[data.pictures]),
    }
    results["training_seconds"] = round(trained_for, 2)
    results["seconds"] = round(time.monotonic() - started, 2)
    results["versions"] = versions()
    return results


@torch.no_grad()
def _test_maps(trained: Trained, data: CellData, batches: Batches) -> tuple[Tensor, Tensor | None]:
    """Grad-CAM of the label and spatial attention of every test image, (N, h, w) on the CPU."""
    cams, attentions = [], []
    for inputs, labels in batches.epoch(0):
        with autocast(data.device, data.dtype):
            found = heat_maps(*head_and_features(trained, inputs), labels)
        cams.append(found.grad_cam.cpu())
        if found.attention is not None:
            attentions.append(found.attention.cpu())
    return torch.cat(cams), torch.cat(attentions) if attentions else None


def _plain(maps: Tensor) -> list[Sequence[Any]]:
    """Maps for a JSON file. Each value is a share of its map's largest value, with four digits."""
    scaled = maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-30)
    return [[[round(value, 4) for value in line] for line in heat] for heat in scaled.tolist()]
