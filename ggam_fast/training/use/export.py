"""`ggam-fast export`: a trained classifier as a file that runs without this package."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

from ggam_fast.training.errors import TrainError, first_line
from ggam_fast.training.model.classifier import GGAMClassifier
from ggam_fast.training.model.heatmaps import heat_maps
from ggam_fast.training.system.files import writable_folder, write_together
from ggam_fast.training.use.open_run import open_run, weights_name

logger = logging.getLogger(__name__)

NAMES = {"torch": "model.pt2", "onnx": "model.onnx"}
DESCRIPTION = "export.json"
_METADATA_KEY = "ggam_fast"
_BATCHES = (1, 2, 5)
_TOLERANCE = 1e-4
_NEEDED = ("onnx", "onnxscript", "onnxruntime")

Exported = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class ExportConfig:
    run: tyro.conf.Positional[Path] = tyro.MISSING
    """Folder of a run, or a checkpoint in it."""
    format: Literal["torch", "onnx", "both"] = "torch"
    """File format. torch writes model.pt2, which torch.export.load reads; onnx writes model.onnx."""
    maps: bool = False
    """Output attention and Grad-CAM too, (N, h, w) each. Grad-CAM is that of the predicted class."""
    weights: Literal["last", "best"] = "last"
    """Classifier of the run. best is that of the best epoch, as --best-by of the training chose
    it."""
    out: Path | None = None
    """Folder for the files. The default is the run's own folder. Older files are replaced."""


class Deployed(nn.Module):
    """The module to export. It maps normalised images to a tuple of the outputs in `names`."""

    def __init__(self, classifier: GGAMClassifier, maps: bool) -> None:
        super().__init__()
        self.classifier = classifier
        self.maps = maps
        spatial = classifier.head.attention in ("channel_spatial", "spatial")
        self.names = ("logits", *(("attention",) if spatial else ()), "grad_cam") if maps else ("logits",)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.classifier.backbone(images)
        if not self.maps:
            return (self.classifier.head(features),)
        found = heat_maps(self.classifier.head, features)
        return tuple(part for part in found[:3] if part is not None)


def export_run(config: ExportConfig) -> list[Path]:
    """Write the files, log how much each differs from the eager model, and return their paths.

    Raises:
        TrainError: a package is missing, the model cannot be exported or written, or the exported model
            differs from the eager one by more than 1e-4 of its largest output. No file is changed then.
    """
    formats = ("torch", "onnx") if config.format == "both" else (config.format,)
    missing = [name for name in _NEEDED if "onnx" in formats and importlib.util.find_spec(name) is None]
    if missing:
        raise TrainError(
            f'--format {config.format} needs {", ".join(missing)}: pip install "ggam-fast[export]"'
        )
    checkpoint = open_run(config.run, config.weights)
    model = Deployed(checkpoint.model, config.maps).eval()
    side = checkpoint.model.backbone.image_size
    out = config.out or (config.run if config.run.is_dir() else config.run.parent)
    text = json.dumps(
        {
            **checkpoint.description,
            "weights": weights_name(config.run, config.weights),
            "inputs": {"images": ["N", 3, side, side]},
            "outputs": list(model.names),
        },
        indent=2,
    )
    differences: dict[str, float] = {}

    def write(kind: Literal["torch", "onnx"], part: Path) -> None:
        try:
            with _quiet():
                exported = (_torch if kind == "torch" else _onnx)(model, side, part, text)
        except OSError:
            raise  # from writing the files
        except Exception as error:  # exporters raise errors of many kinds
            raise TrainError(f"cannot export to {kind}: {first_line(error)}") from error
        differences[kind] = difference(model, exported, side, kind)

    writers: dict[str, Callable[[Path], Any]] = {
        NAMES[kind]: lambda part, kind=kind: write(kind, part)  # type: ignore[misc]
        for kind in formats
    }
    writers[DESCRIPTION] = lambda part: part.write_text(text + "\n")
    with writable_folder(out):
        write_together(out, writers)
    for kind, value in differences.items():
        logger.info(
            f"{out / NAMES[kind]}: images (N, 3, {side}, {side}) to {', '.join(model.names)}; largest "
            f"difference from the eager model: {value:.1e} of its largest output ({sum(_BATCHES)} images in "
            f"batches of {', '.join(map(str, _BATCHES))})"
        )
    logger.info(f"{out / DESCRIPTION}: classes, preprocessing and outputs")
    return [out / name for name in writers]


@torch.no_grad()
def difference(model: nn.Module, exported: Exported, side: int, kind: str) -> float:
    """The largest difference between outputs of `exported` and of `model`, on batches of random images.

    It is a share of the largest value of that output.

    Raises:
        TrainError: the difference is too large.
    """
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for size in _BATCHES:
        images = torch.randn(size, 3, side, side, generator=generator)
        for name, want, got in zip(model.names, model(images), exported(images), strict=True):  # type: ignore[arg-type]
            if got.shape != want.shape:
                raise TrainError(f"{kind}: {name} has shape {tuple(got.shape)}, not {tuple(want.shape)}")
            share = ((got - want).abs().max() / want.abs().max().clamp_min(1e-6)).item()
            if not share <= _TOLERANCE:
                raise TrainError(
                    f"{kind}: {name} differs from the eager model by {share:.1e} of its largest value, more "
                    f"than {_TOLERANCE:.0e}; nothing was written"
                )
            largest = max(largest, share)
    return largest


def _torch(model: nn.Module, side: int, part: Path, text: str) -> Exported:
    """Save as a torch.export program, and load it again."""
    program = torch.export.export(model, (torch.zeros(2, 3, side, side),), dynamic_shapes=({0: _batch()},))
    # It is saved in memory first, because on a full disk torch ends the process.
    whole = io.BytesIO()
    torch.export.save(program, whole, extra_files={_METADATA_KEY: text})
    part.write_bytes(whole.getbuffer())
    return torch.export.load(part).module()


def _onnx(model: nn.Module, side: int, part: Path, text: str) -> Exported:
    """Save as an ONNX model, and load it into ONNX Runtime."""
    import onnxruntime  # type: ignore[import-untyped]

    program = torch.onnx.export(
        model,
        (torch.zeros(2, 3, side, side),),
        dynamic_shapes=({0: _batch()},),
        input_names=["images"],
        output_names=list(model.names),  # type: ignore[arg-type]
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props[_METADATA_KEY] = text
    program.save(part)
    session = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(value) for value in session.run(None, {"images": images.numpy()}))

    return run


def _batch() -> torch.export.Dim:
    return torch.export.Dim("batch")


@contextlib.contextmanager
def _quiet() -> Any:
    """Hide the exporters' progress and deprecation notes. A user can do nothing about them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
