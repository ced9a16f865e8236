"""Trained classifiers on disk. One safetensors file holds all that is needed to load one."""

from __future__ import annotations

import hashlib
import json
import os
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

import ggam_fast
from ggam_fast.training.config.options import HeadConfig, TrainConfig
from ggam_fast.training.data.image_set import ImageSet
from ggam_fast.training.errors import TrainError
from ggam_fast.training.model.backbones import create_backbone
from ggam_fast.training.model.classifier import GGAMClassifier, create_head
from ggam_fast.training.system.files import write_atomically

WEIGHTS = "model.safetensors"
BEST = "best.safetensors"
CONFIG = "config.json"
_METADATA_KEY = "ggam_fast"
_CHECKSUM_KEY = "sha256"
_NO_CHECKSUM = "0" * 64


class Checkpoint(NamedTuple):
    """A loaded classifier, in eval mode, and the description of its run."""

    model: GGAMClassifier
    classes: tuple[str, ...]
    description: dict[str, Any]


def describe(model: GGAMClassifier, images: ImageSet, config: TrainConfig) -> dict[str, Any]:
    """All that is needed to rebuild `model`, except its weights, and how it was trained."""
    return {
        "ggam_fast": ggam_fast.__version__,
        "backbone": {
            "name": model.backbone.name,
            "image_size": model.backbone.image_size,
            "resize": model.backbone.resize,
        },
        "preprocessing": {"mean": list(model.backbone.mean), "std": list(model.backbone.std)},
        "head": config.head.keywords(),
        "classes": list(images.classes),
        "data": {
            "data": config.data.data,
            "root": config.data.root and str(config.data.root.absolute()),
            "images": images.digest(),
            "val_fraction": config.data.val_fraction,
            "split_by": config.data.split_by and str(config.data.split_by.absolute()),
            "banner": images.banner,
            "enlarge": config.data.enlarge,
            "skip_bad_images": config.data.skip_bad_images,
        },
        "optim": asdict(config.optim),
        "finetune": config.backbone.finetune,
        "finetune_from": config.backbone.finetune_from,
    }


def save_checkpoint(
    folder: Path, model: GGAMClassifier, description: dict[str, Any], name: str = WEIGHTS
) -> Path:
    """Write the weights file `name` into `folder`, and `config.json` for people to read.

    The metadata of the weights file hold the description too, so the two always belong together. They also
    hold the SHA-256 of the whole file, with 64 zeros in its own place. Each file replaces an older one in one
    step.

    Raises:
        TrainError: a file cannot be written. An older file is then unchanged.
    """
    text = json.dumps(description, indent=2)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    path = folder / name
    content = save(tensors, {_METADATA_KEY: text, _CHECKSUM_KEY: _NO_CHECKSUM})
    content = content.replace(_quoted(_NO_CHECKSUM), _quoted(hashlib.sha256(content).hexdigest()), 1)
    write_atomically(path, lambda part: part.write_bytes(content))
    write_atomically(folder / CONFIG, lambda part: part.write_text(text + "\n"))
    return path


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Rebuild the classifier of a run from its folder or its `model.safetensors`.

    Raises:
        TrainError: there is no such file, it is damaged, it is not a checkpoint of this package, or its
            weights do not fit its description.
    """
    file = Path(path)
    file = file / WEIGHTS if file.is_dir() else file
    if not file.is_file():
        raise TrainError(f"there is no checkpoint at {file}")
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise TrainError(f"cannot read checkpoint {file}: {error}") from error
    if _METADATA_KEY not in metadata:
        raise TrainError(f"{file} must be a checkpoint written by ggam_fast; it is another file")
    _check_bytes(file, metadata.get(_CHECKSUM_KEY))
    try:
        description = json.loads(metadata[_METADATA_KEY])
        backbone = create_backbone(**description["backbone"], pretrained=False)
        classes = tuple(description["classes"])
        options = HeadConfig.from_saved(description["head"])
        description["head"] = options.keywords()
        model = GGAMClassifier(backbone, create_head(backbone, len(classes), options))
        model.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise TrainError(f"{file} is of another architecture or version: {reason}") from error
    return Checkpoint(model.eval(), classes, description)


def _check_bytes(file: Path, written: str | None) -> None:
    """Raise a `TrainError` if `file` has another SHA-256 than `written` in it. Older files have none."""
    if written is None:
        return
    content = file.read_bytes().replace(_quoted(written), _quoted(_NO_CHECKSUM), 1)
    if hashlib.sha256(content).hexdigest() != written:
        raise TrainError(f"checkpoint {file} is damaged: its bytes are not those that were written")


def _quoted(checksum: str) -> bytes:
    return f'"{_CHECKSUM_KEY}":"{checksum}"'.encode()
