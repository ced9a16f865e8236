"""Training GGAM classifiers on photographs: `ggam-fast train`, and what it is made of.

Needs the extra: pip install "ggam-fast[train]". Importing `ggam_fast` never imports this.

    config       the options             data, batches       images, splits, batches
    readers      data sets' layouts      annotations         their boxes, parts and masks
    backbones    timm feature maps       feature_cache       a frozen backbone's maps on disk
    classifier   backbone + GGAM head    fitting, compiling  the loop and its compiled step
    metrics      numbers of a split      reports, gallery    what the user sees
    checkpoints  saving and loading      snapshots           all that --resume needs
    engine       a run from start to end
    heatmaps     attention, Grad-CAM     localization        whether they lie on the object
    evaluation, explanation, ablation, exporting             the other commands
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ggam_fast.training.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
    from ggam_fast.training.config import TrainConfig
    from ggam_fast.training.engine import Outcome, train
    from ggam_fast.training.errors import TrainError

__all__ = [
    "Checkpoint",
    "Outcome",
    "TrainConfig",
    "TrainError",
    "load_checkpoint",
    "save_checkpoint",
    "train",
]

_HOME = {
    "Checkpoint": "checkpoints",
    "Outcome": "engine",
    "TrainConfig": "config",
    "TrainError": "errors",
    "load_checkpoint": "checkpoints",
    "save_checkpoint": "checkpoints",
    "train": "engine",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that the command can say which extra is missing before anything needs it.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
