"""The files that a run keeps in its folder."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from ggam_fast import GGAMHead
from ggam_fast.training.config.config_file import config_text, read_config_file
from ggam_fast.training.config.options import HeadConfig, OptimConfig, TrainConfig
from ggam_fast.training.errors import TrainError
from ggam_fast.training.model import model_file
from ggam_fast.training.model.classifier import GGAMClassifier, LastClassifier
from ggam_fast.training.model.cut import with_last
from ggam_fast.training.run import resume_state
from ggam_fast.training.run.history import best_epoch, exhausted
from ggam_fast.training.run.log import IDS
from ggam_fast.training.run.loggers import BOARD, CSV
from ggam_fast.training.run.loop import Trainer
from ggam_fast.training.show.curves import draw_curves
from ggam_fast.training.system.distributed import World
from ggam_fast.training.system.files import write_atomically
from ggam_fast.training.use import evaluate as evaluation
from ggam_fast.training.use import export

METRICS = "metrics.json"
OPTIONS = "options.yaml"
GALLERY = "gallery.png"
CURVES = "curves.png"
# Files that `evaluate` and `export` add to the folder of a run.
_MADE_OF_A_RUN = (evaluation.NUMBERS, evaluation.PAGE, export.DESCRIPTION, *export.NAMES.values())


class RunArtifacts:
    """The files that a run keeps in its folder `out`.

    They are snapshots for --resume, the classifier of the best epoch (see `history.best_epoch`), the last
    classifier, which is the result, and the learning curves.
    """

    def __init__(
        self, out: Path, trainer: Trainer, model: GGAMClassifier, description: dict[str, Any], world: World
    ) -> None:
        self._out = out
        self._trainer = trainer
        self._model = model
        self._description = description
        self._world = world
        self._epochs = 0
        self._best_by = description["optim"]["best_by"]
        # A resumed run must have the same values.
        self._run = {name: description[name] for name in ("backbone", "head", "classes", "optim", "finetune")}
        self._run["finetune_from"] = description["finetune_from"]
        self._run["images"] = description["data"]["images"]
        self._run["init_from"] = description.get("init_from")

    def clear(self) -> None:
        """Remove the files of an older run (--overwrite). Otherwise --resume would use its snapshots."""
        for name in (resume_state.FOLDER, BOARD, CSV):
            shutil.rmtree(self._out / name, ignore_errors=True)
        for name in (model_file.WEIGHTS, model_file.BEST, METRICS, GALLERY, CURVES, IDS, *_MADE_OF_A_RUN):
            (self._out / name).unlink(missing_ok=True)

    def restore(self) -> None:
        """Restore the trainer from the newest snapshot in the folder. A finished run may get more epochs.

        Raises:
            TrainError: there is no snapshot, or it is one of another model, data set or number of processes,
                or more epochs are asked of a run that is not finished.
        """
        state = resume_state.load_snapshot(self._out)
        processes, size = len(state["fit"]["random"]), self._world.size
        if processes != size:
            started = f"with torchrun --nproc-per-node {processes}" if processes > 1 else "without torchrun"
            raise TrainError(
                f"--resume {self._out}: this run has {size} process{'es'[: 2 * (size > 1)]} and the stopped "
                f"one had {processes}. Batches and learning rates would be others; start it {started}"
            )
        state["run"]["head"] = HeadConfig.from_saved(state["run"]["head"]).keywords()
        optim = {**asdict(OptimConfig()), **state["run"]["optim"]}  # from an older version
        before, epochs = optim["epochs"], self._run["optim"]["epochs"]
        state["run"]["optim"] = {**optim, "epochs": max(before, epochs)}
        for name, value in self._run.items():
            if state["run"].get(name, value) != value:  # older snapshots do not record all of them
                raise TrainError(
                    f"--resume {self._out}: its snapshot has another {name} than this run"
                    if name != "images"
                    else f"--resume {self._out}: images were added or removed since its snapshot"
                )
        history = state["fit"]["history"]
        if epochs > before:
            waited = exhausted(history[state["fit"].get("first", 0) :], self._best_by, optim["patience"])
            if len(history) < before and not waited:
                raise TrainError(
                    f"--epochs {epochs} extends a finished run; {self._out} has {len(history)} of its "
                    f"{before} epochs: resume it without --epochs first"
                )
        self._trainer.load_state_dict(state["fit"])
        if epochs > before:
            self._trainer.extend()
            if self._world.is_main:
                options = read_config_file(self._out / OPTIONS, TrainConfig().values())
                text = config_text({**options, "epochs": epochs})
                write_atomically(self._out / OPTIONS, lambda part: part.write_text(text))
        self._epochs = len(self._trainer.history)

    def classifier(self) -> GGAMClassifier:
        """The present classifier. Its weights are the running average, if there is one."""
        result = self._trainer.result
        if isinstance(result, GGAMClassifier):
            return result
        if isinstance(result, LastClassifier):
            return GGAMClassifier(with_last(self._model.backbone, result.backbone), result.head)
        return GGAMClassifier(self._model.backbone, cast(GGAMHead, result))

    def save_snapshot(self) -> None:
        # Every process does this, because each has its own part of the state.
        state = {"run": self._run, "fit": self._trainer.state_dict()}
        # The best comes first. A run killed between the two lines resumes before this epoch and saves it
        # again.
        history = self._trainer.history
        if len(history) > self._epochs:
            self._epochs = len(history)
            if best_epoch(history, self._best_by) == len(history) - 1:
                self._save(model_file.BEST)
        if self._world.is_main:
            resume_state.save_snapshot(self._out, self._trainer.steps, state)

    def save_curves(self) -> None:
        """Draw the learning curves of the finished epochs, if there are any."""
        history = self._trainer.history
        if self._world.is_main and history:
            optim = self._description["optim"]
            weights = optim["guidance_weight"], optim.get("position_weight", 0.0)
            draw_curves(self._out / CURVES, history, best_epoch(history, self._best_by), *weights)

    def save_result(self) -> Path:
        self._save(model_file.WEIGHTS)
        return self._out / model_file.WEIGHTS

    def _save(self, name: str) -> None:
        classifier = self.classifier()
        if self._world.is_main:
            model_file.save_checkpoint(self._out, classifier, self._description, name)
