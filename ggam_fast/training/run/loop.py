"""The training loop: steps, epochs and their numbers. It can resume in the middle of an epoch."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from ggam_fast import GGAMHead
from ggam_fast.training.config.options import OptimConfig
from ggam_fast.training.data.batches import Batches
from ggam_fast.training.data.mixing import Mix
from ggam_fast.training.errors import Interrupted, TrainError
from ggam_fast.training.model.batch_statistics import estimated, settled
from ggam_fast.training.model.classifier import (
    GGAMClassifier,
    GuidedLoss,
    LastClassifier,
    Trained,
    guides_positions,
)
from ggam_fast.training.run.history import exhausted
from ggam_fast.training.run.log import RunLog
from ggam_fast.training.run.optimizer import Groups, create_optimizer, create_schedule
from ggam_fast.training.run.resume_state import random_state, set_random_state
from ggam_fast.training.show.console import Bar, Report, parts_of_loss
from ggam_fast.training.system.compiling import compile_or_eager
from ggam_fast.training.system.devices import autocast
from ggam_fast.training.system.distributed import ALONE, World

logger = logging.getLogger(__name__)

# Reading a number waits for the device, so the loop does not do it in every step.
_READ_EVERY = 10
_NUMBERS = ("loss", "guidance", "accuracy")
# Batches from which the statistics of batch norm are estimated again.
_ESTIMATED_FROM = 50


class Trainer:
    """Trains `trained`, on maps or on images, as `optim` says.

    `groups`: the parameter groups, each with its highest learning rate `lr`. `num_classes`: number of
    classes, for mixed targets. `class_weights` (K,): weights in the cross entropy. `loss`: a module with the
    results of `GuidedLoss`, in its place. `steps`: number of optimizer steps so far. `history`: the numbers
    of every finished epoch. `load_state_dict` continues bit for bit from a `state_dict` that was taken
    between two steps.
    """

    def __init__(
        self,
        trained: Trained,
        groups: Groups,
        optim: OptimConfig,
        num_classes: int,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        world: World = ALONE,
        check: Callable[[], None] = lambda: None,
        class_weights: Tensor | None = None,
        loss: nn.Module | None = None,
    ) -> None:
        self.trained = trained
        self._loss = loss
        self.optimizer = create_optimizer(groups, optim)
        self.steps = 0
        self.history: list[dict[str, float]] = []
        self._optim = optim
        self._device = device
        self._dtype = dtype
        self._compile = compile
        self._world = world
        self._check = check
        self._class_weights = class_weights
        self._mix = Mix(num_classes, optim.mixup, optim.cutmix)
        # The scaler is on only for float16 on a GPU.
        self._scaler = torch.amp.GradScaler(
            device.type, enabled=dtype == torch.float16 and device.type == "cuda"
        )
        # A constant decay would keep the first weights for 1 / (1 - decay) steps.
        self._average = (
            ModelEmaV3(trained, optim.ema, use_warmup=True, exclude_buffers=True) if optim.ema else None
        )
        self._schedule: torch.optim.lr_scheduler.LRScheduler | None = None
        self._epoch, self._batch = 1, 0
        self._first = 0  # finished epochs when the present schedule began
        self._numbers = (*_NUMBERS, "positions") if guides_positions(trained) else _NUMBERS
        self._sums = torch.zeros(len(self._numbers), device=device)
        self._pending: dict[str, Any] | None = None
        self._train: Batches | None = None
        self._estimated: dict[str, tuple[int, nn.Module]] = {}

    @property
    def _has_backbone(self) -> bool:
        return not isinstance(self.trained, GGAMHead)

    @property
    def _head_alone(self) -> bool:
        """Whether the backbone is still frozen in the present epoch."""
        return self._has_backbone and self._epoch <= self._optim.freeze_epochs

    def _prepare(self) -> None:
        """Set what is trained in the present epoch, and its mode."""
        self.trained.train()
        if not isinstance(self.trained, GGAMHead):
            self.trained.backbone.requires_grad_(not self._head_alone)
            self.trained.backbone.train(not self._head_alone)

    @property
    def _weights(self) -> tuple[float, float]:
        """Those of the guidance and of the position loss."""
        return self._optim.guidance_weight, self._optim.position_weight

    @property
    def averages(self) -> bool:
        """Whether there is a running average of the weights."""
        return self._average is not None

    @property
    def result(self) -> nn.Module:
        """The module that is tested and saved. Its weights are the running average, if there is one.

        If the statistics of its batch norms still depend on the first values, they are estimated again from
        training batches. Under torchrun every process must then ask for it.
        """
        return self.last if self._average is None else self._with_statistics("average", self._average.module)

    @property
    def last(self) -> nn.Module:
        """`result` with the weights of the last step."""
        return self._with_statistics("last", self.trained)

    def _with_statistics(self, kind: str, module: nn.Module) -> nn.Module:
        if self._train is None or not self.steps:
            return module
        length = len(self._train)
        batches = (self._epoch - 1) * length + self._batch
        frozen = self._optim.freeze_epochs * length if self._has_backbone else 0
        if batches <= frozen:
            return self._with_head_statistics(kind, module, batches)
        if settled(module, batches - frozen):
            return module
        known = self._estimated.get(kind)
        if known is None or known[0] != batches:
            with autocast(self._device, self._dtype):
                known = batches, estimated(module, self._chosen(), self._world)
            self._estimated[kind] = known
        return known[1]

    def _with_head_statistics(self, kind: str, module: nn.Module, batches: int) -> nn.Module:
        """The same while the head alone is trained. The backbone keeps its own statistics."""
        whole = cast(GGAMClassifier | LastClassifier, module)
        if settled(whole.head, batches):
            return module
        known = self._estimated.get(kind)
        if known is None or known[0] != batches:
            whole = copy.deepcopy(whole)
            backbone = whole.backbone.eval()
            features = ((backbone(inputs), labels) for inputs, labels in self._chosen())
            with autocast(self._device, self._dtype):
                whole.head = cast(GGAMHead, estimated(whole.head, features, self._world))
            known = self._estimated[kind] = batches, whole
        return known[1]

    def _chosen(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The training batches from which statistics are estimated."""
        assert self._train is not None
        # No training epoch has the number 0.
        return self._train.epoch(0, max(0, len(self._train) - _ESTIMATED_FROM))

    def state_dict(self) -> dict[str, Any]:
        return {
            "trained": self.trained.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self._schedule is None else self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
            "steps": self.steps,
            "history": self.history,
            "position": (self._epoch, self._batch),
            "first": self._first,
            "sums": self._sums,
            "random": self._world.gather(random_state()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trained.load_state_dict(state["trained"])
        if self._average is not None:
            # Snapshots of older versions count the averaged steps.
            self._average.load_state_dict(
                {name: value for name, value in state["average"].items() if name != "n_averaged"}
            )
        self._scaler.load_state_dict(state["scaler"])
        self.steps, self.history = state["steps"], list(state["history"])
        self._epoch, self._batch = state["position"]
        self._first = state.get("first", 0)
        self._sums.copy_(state["sums"])
        self._pending = state

    def extend(self) -> None:
        """Begin a new schedule after the epochs of a finished run, with the optimizer's state.

        Call it after `load_state_dict`.
        """
        assert self._pending is not None
        self._first = len(self.history)
        self._epoch, self._batch = self._first + 1, 0
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(self._pending["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            for name in ("initial_lr", "max_lr", "min_lr"):  # of the finished schedule
                group.pop(name, None)
            group["lr"] = rate
        set_random_state(self._pending["random"][self._world.rank])
        self._pending = None

    def run(
        self,
        train: Batches,
        val: Batches | None,
        *,
        report: Report | None = None,
        log: RunLog | None = None,
        save: Callable[[], object] = lambda: None,
        save_every: int = 0,
    ) -> list[dict[str, float]]:
        """Run all remaining epochs, and return the numbers of every epoch.

        `save` is called after each epoch and after every `save_every` steps. With `patience`, the run ends
        after that many epochs without a better validation result.

        Raises:
            Interrupted: `check` raised it between two steps.
            TrainError: the loss of an epoch is not a finite number.
        """
        epochs, accumulate = self._optim.epochs, self._optim.accumulate
        self._train = train
        self._schedule = create_schedule(
            self.optimizer, self._optim, epochs - self._first, -(-len(train) // accumulate)
        )
        head_alone = self._head_alone
        loss_of = self._step_function(train, report)
        if self._pending is not None:
            # The schedule must be made before this, because making it sets the rates of the first step.
            self.optimizer.load_state_dict(self._pending["optimizer"])
            if self._pending["schedule"] is not None:
                self._schedule.load_state_dict(self._pending["schedule"])
            # This comes last, because the compiler and the loaders may draw random numbers.
            set_random_state(self._pending["random"][self._world.rank])
            self._pending = None
        elif not self.steps:
            save()  # a run that is killed in its first epoch can then resume too
        quiet = Report.silent() if report is None else report
        with quiet.bar("training", epochs * len(train), (self._epoch - 1) * len(train) + self._batch) as bar:
            while self._epoch <= epochs and not self._exhausted():
                if head_alone != self._head_alone:
                    head_alone = self._head_alone
                    loss_of = self._step_function(train, report)
                numbers = self._run_epoch(train, loss_of, log, bar, save, save_every)
                if not math.isfinite(numbers["loss"]):
                    raise TrainError(
                        f"the training loss of epoch {self._epoch} is {numbers['loss']} and must be finite; "
                        f"--clip-grad or a smaller --lr than {self._optim.lr:g} may help"
                    )
                if val is not None:
                    found = self._validated(val)
                    numbers.update({f"val_{name}": value for name, value in found.items()})
                    if log is not None:
                        log.numbers("val", self.steps, found)
                self.history.append({"epoch": self._epoch, **numbers})
                if log is not None:
                    log.numbers("epoch", self.steps, self.history[-1])
                quiet.epoch(self.history[-1], epochs, self._weights)
                self._epoch, self._batch = self._epoch + 1, 0
                self._sums.zero_()
                save()
                if self._exhausted() and self._epoch <= epochs:
                    logger.info(
                        f"no better validation {self._optim.best_by} for {self._optim.patience} epochs: "
                        f"stopped after epoch {len(self.history)} of {epochs}"
                    )
        return self.history

    def _exhausted(self) -> bool:
        return exhausted(self.history[self._first :], self._optim.best_by, self._optim.patience)

    def _validated(self, val: Batches) -> dict[str, float]:
        """Cross entropy and accuracy of `result`. Beside an average stand those of the last weights."""
        found = {}
        for ending, module in {"": self.result, **({"_last": self.last} if self.averages else {})}.items():
            logits, labels = evaluate(module, val, self._device, self._dtype, self._world, self._check)
            found[f"loss{ending}"] = F.cross_entropy(logits, labels).item()
            found[f"accuracy{ending}"] = (logits.argmax(1) == labels).float().mean().item()
        return found

    def _run_epoch(
        self,
        train: Batches,
        loss_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        log: RunLog | None,
        bar: Bar,
        save: Callable[[], object],
        save_every: int,
    ) -> dict[str, float]:
        self._prepare()
        unread = images = 0
        began = read_at = time.monotonic()
        means: dict[str, float] = {}
        accumulate = self._optim.accumulate
        assert self._schedule is not None
        for inputs, labels in train.epoch(self._epoch, self._batch):
            if self._batch % accumulate == 0:  # between steps, never between the gradients of one step
                self._stop_if_asked()
            left_over = len(train) % accumulate
            share = left_over if self._batch >= len(train) - left_over else accumulate
            loss, numbers = loss_of(*self._mix(inputs, labels))
            self._scaler.scale(loss / share).backward()
            self._sums += numbers
            self._batch += 1
            images += len(labels)
            unread += 1
            last = self._batch == len(train)
            if last or self._batch % accumulate == 0:
                self._step()
                if save_every and self.steps % save_every == 0 and not last:
                    save()
            if unread == _READ_EVERY or last:
                totals = torch.stack(self._world.gather(self._sums.cpu())).mean(0) / self._batch
                means = dict(zip(self._numbers, totals.tolist(), strict=True))
                guided = self._optim.guidance_weight * means["guidance"]
                guided += self._optim.position_weight * means.get("positions", 0.0)
                means["cross_entropy"] = max(0.0, means["loss"] - guided)
                now = time.monotonic()
                speed = unread * len(labels) * self._world.size / (now - read_at)
                if log is not None:
                    rate = float(self._schedule.get_last_lr()[0])
                    log.numbers("train", self.steps, {**means, "lr": rate, "images_per_second": speed})
                bar.advance(
                    unread,
                    f"{parts_of_loss(means, *self._weights)}"
                    f"  training accuracy {means['accuracy']:.3f}  {speed:.0f} images/s",
                    f"epoch {self._epoch}/{self._optim.epochs}",
                )
                unread, read_at = 0, now
        seconds = time.monotonic() - began
        return {**means, "images_per_second": images * self._world.size / seconds}

    def _stop_if_asked(self) -> None:
        """Raise `Interrupted` if `check` does so, in every process after the same step."""
        if self._world.size == 1:
            self._check()
            return
        if self.steps % _READ_EVERY:
            return
        try:
            self._check()
            asked = False
        except Interrupted:
            asked = True
        if any(self._world.gather(asked)):
            raise Interrupted

    def _step(self) -> None:
        assert self._schedule is not None
        if self._optim.clip_grad:
            self._scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.trained.parameters(), self._optim.clip_grad)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._schedule.step()
        self.steps += 1
        if self._average is not None:
            self._average.update(self.trained, self.steps)

    def _step_function(
        self, train: Batches, report: Report | None
    ) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """`GuidedLoss` of what is trained in the present epoch, compiled if the options say so."""
        self._prepare()
        optim = self._optim
        step = self._loss or GuidedLoss(
            self.trained,
            optim.guidance_weight,
            optim.label_smoothing,
            self._device,
            self._dtype,
            self._class_weights,
            optim.position_weight,
        )
        if not self._compile:
            return self._world.wrap(step, self._device)
        if report is not None:
            logger.info("compiling the training step")
        with torch.random.fork_rng():
            inputs, targets = self._mix(*train.example())

        def probe(loss_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
            loss_of(inputs, targets)[0].backward()

        # The compiler does not trace DistributedDataParallel, so it gets the module inside.
        return self._world.wrap(compile_or_eager(step, step, probe), self._device)


@torch.no_grad()
def evaluate(
    classifier: nn.Module,
    batches: Batches,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    world: World = ALONE,
    check: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Logits (N, K) in float32 and labels (N,) of all batches, on the CPU, in every process.

    A single process calls `check` before each batch. Of several, none may leave the others behind.
    """
    training = classifier.training
    classifier.eval()
    logits, labels = [], []
    for inputs, target in batches.epoch(0):
        if world.size == 1:
            check()
        with autocast(device, dtype):
            logits.append(classifier(inputs).float().cpu())
        labels.append(target.cpu())
    classifier.train(training)
    if world.size == 1:
        return torch.cat(logits), torch.cat(labels)
    # Row r is at place r // size of process r % size.
    parts = world.gather((torch.cat(logits), torch.cat(labels)))
    rows = sum(len(part[1]) for part in parts)
    all_logits = parts[0][0].new_empty(rows, parts[0][0].shape[1])
    all_labels = parts[0][1].new_empty(rows)
    for rank, (some_logits, some_labels) in enumerate(parts):
        all_logits[rank :: world.size] = some_logits
        all_labels[rank :: world.size] = some_labels
    return all_logits, all_labels
