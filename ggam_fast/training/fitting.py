"""The training loop: steps, epochs, and their numbers."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from ggam_fast import GGAMLoss
from ggam_fast.training.batches import Batches
from ggam_fast.training.classifier import GGAMClassifier
from ggam_fast.training.compiling import compile_or_eager
from ggam_fast.training.config import TrainConfig
from ggam_fast.training.devices import autocast
from ggam_fast.training.interrupts import InterruptGuard
from ggam_fast.training.reports import Bar, Report

# Reading a number waits for the device, so it is not done in every step.
_READ_EVERY = 10
_WARM_UP = 0.2


class Fit:
    """Trains `trained`: the head on maps, or with `finetune` the whole classifier on images.

    `steps` counts the optimiser's steps so far.
    """

    def __init__(
        self,
        model: GGAMClassifier,
        config: TrainConfig,
        device: torch.device,
        report: Report,
        interrupt: InterruptGuard,
    ) -> None:
        finetune = config.backbone.finetune
        optim = config.optim
        model.backbone.requires_grad_(finetune)
        groups = [{"params": model.head.parameters(), "lr": optim.lr}]
        if finetune:
            groups.append({"params": model.backbone.parameters(), "lr": optim.backbone_lr})
        self.trained: nn.Module = model if finetune else model.head
        self.optimizer = torch.optim.AdamW(groups, weight_decay=optim.weight_decay, fused=True)
        self.steps = 0
        self._criterion = GGAMLoss(guidance_weight=optim.guidance_weight)
        self._epochs = optim.epochs
        self._compile = config.run.compile
        self._device = device
        self._report = report
        self._interrupt = interrupt

    def run(
        self, train: Batches, val: Batches | None, board_folder: Path, save: Callable[[], object]
    ) -> list[dict[str, float]]:
        """All epochs, `save` after each; their numbers.

        Raises:
            Interrupted: Ctrl-C, between two steps.
        """
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            max_lr=[group["lr"] for group in self.optimizer.param_groups],
            total_steps=self._epochs * len(train),
            pct_start=_WARM_UP,
            cycle_momentum=False,
        )
        loss_of = self._compiled(train) if self._compile else self._loss
        history = []
        with (
            SummaryWriter(str(board_folder)) as board,
            self._report.bar("training", self._epochs * len(train)) as bar,
        ):
            for epoch in range(1, self._epochs + 1):
                numbers = self._epoch(epoch, train, loss_of, schedule, board, bar)
                if val is not None:
                    logits, labels = evaluate(self.trained, val, self._device)
                    numbers["val_accuracy"] = (logits.argmax(1) == labels).float().mean().item()
                    board.add_scalar("val/accuracy", numbers["val_accuracy"], self.steps)
                history.append({"epoch": epoch, **numbers})
                self._report.epoch(history[-1], self._epochs)
                save()
        return history

    def _epoch(
        self,
        epoch: int,
        train: Batches,
        loss_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        schedule: torch.optim.lr_scheduler.LRScheduler,
        board: SummaryWriter,
        bar: Bar,
    ) -> dict[str, float]:
        self.trained.train()
        sums = torch.zeros(3, device=self._device)
        images = unread = 0
        began = read_at = time.monotonic()
        means: dict[str, float] = {}
        for index, (inputs, labels) in enumerate(train, 1):
            self._interrupt.check()
            loss, numbers = loss_of(inputs, labels)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            schedule.step()
            self.steps += 1
            sums += numbers
            images += len(labels)
            unread += 1
            if unread == _READ_EVERY or index == len(train):
                means = dict(zip(("loss", "guidance", "accuracy"), (sums / index).tolist(), strict=True))
                now = time.monotonic()
                speed = unread * len(labels) / (now - read_at)
                for name, value in means.items():
                    board.add_scalar(f"train/{name}", value, self.steps)
                board.add_scalar("train/images_per_second", speed, self.steps)
                board.add_scalar("train/lr", schedule.get_last_lr()[0], self.steps)
                bar.advance(
                    unread,
                    f"loss {means['loss']:.4g} guidance {means['guidance']:.4g}"
                    f" accuracy {means['accuracy']:.3f} {speed:.0f} images/s",
                    f"epoch {epoch}/{self._epochs}",
                )
                unread, read_at = 0, now
        return {**means, "images_per_second": images / (time.monotonic() - began)}

    def _loss(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and (loss, guidance loss, accuracy) without a graph."""
        with autocast(self._device):
            out = self.trained(inputs, labels)
            loss = self._criterion(out, labels)
        accuracy = (out.logits.argmax(1) == labels).float().mean()
        return loss, torch.stack([loss, out.guidance_loss, accuracy]).detach()

    def _compiled(self, train: Batches) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        self._report.note("compiling the training step")
        self.trained.train()
        inputs, labels = train.example()
        return compile_or_eager(
            self._loss,
            self.trained,
            lambda step: step(inputs, labels)[0].backward(),
            self._report.note,
        )


@torch.no_grad()
def evaluate(classifier: nn.Module, batches: Batches, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits (N, K) in float32 and labels (N,) of all batches, on the CPU."""
    classifier.eval()
    logits, labels = [], []
    for inputs, target in batches:
        with autocast(device):
            logits.append(classifier(inputs).float())
        labels.append(target)
    return torch.cat(logits).cpu(), torch.cat(labels).cpu()
