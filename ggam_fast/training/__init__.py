"""Train GGAM classifiers on photographs: the command `ggam-fast` and its parts.

This package needs the extra `train`: pip install "ggam-fast[train]". `import ggam_fast` does not import it.

Each subpackage imports only from those below it in this list:

    cli                the commands
    ablation           compares many runs
    run                one training run
    use                a finished run: evaluate, explain, predict, export
    show               console, figures, gallery, page
    model, measure     backbone and head; numbers from logits and maps
    data               images, splits, batches
    config, system     options and recipes; devices, processes, files
    errors             what ends a run early
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ggam_fast.training.config.options import TrainConfig
    from ggam_fast.training.errors import TrainError
    from ggam_fast.training.model.model_file import Checkpoint, load_checkpoint, save_checkpoint
    from ggam_fast.training.run.train import Outcome, train
    from ggam_fast.training.show.console import Report

__all__ = [
    "Checkpoint",
    "Outcome",
    "Report",
    "TrainConfig",
    "TrainError",
    "load_checkpoint",
    "save_checkpoint",
    "train",
]

_HOME = {
    "Checkpoint": "model.model_file",
    "Outcome": "run.train",
    "Report": "show.console",
    "TrainConfig": "config.options",
    "TrainError": "errors",
    "load_checkpoint": "model.model_file",
    "save_checkpoint": "model.model_file",
    "train": "run.train",
}


def __getattr__(name: str) -> Any:
    # Imports wait until a name is used, so that the command can first say which extra is missing.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
