"""What a run optimizes: groups of parameters with their learning rates, the optimizer and the schedule."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, OneCycleLR, SequentialLR

from ggam_fast import GGAMHead
from ggam_fast.training.config.options import OptimConfig
from ggam_fast.training.errors import TrainError, first_line
from ggam_fast.training.model.classifier import Trained

_WARM_UP = 0.2
_MOMENTUM = 0.9

Groups = list[dict[str, Any]]


def parameter_groups(trained: Trained, optim: OptimConfig, model: nn.Module | None = None) -> Groups:
    """The head at `lr`, and what is trained of the backbone at `backbone_lr`.

    With `layer_decay`, each layer of the backbone learns at that share of the rate of the next one. `model`
    is the whole timm model, which knows its layers.

    Raises:
        TrainError: `layer_decay` without layers to tell apart.
    """
    if isinstance(trained, GGAMHead):
        return [{"params": list(trained.parameters()), "lr": optim.lr}]
    head = {"params": list(trained.head.parameters()), "lr": optim.lr}
    if optim.layer_decay == 1 or model is None:
        return [head, {"params": list(trained.backbone.parameters()), "lr": optim.backbone_lr}]
    layers = param_groups_layer_decay(
        model, optim.weight_decay, weight_decay_exclude_1d=False, layer_decay=optim.layer_decay
    )
    if len(layers) < 2:
        raise TrainError(
            f"--layer-decay {optim.layer_decay:g} needs two or more trained layers that timm tells apart; "
            f"here it finds {len(layers)}"
        )
    return [head] + [
        {"params": layer["params"], "lr": optim.backbone_lr * layer["lr_scale"]} for layer in layers
    ]


def create_optimizer(groups: Groups, optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of these groups. All but AdamW and SGD are made by timm.

    Raises:
        TrainError: the optimizer refuses the parameters.
    """
    if optim.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=_MOMENTUM, weight_decay=optim.weight_decay, fused=True)
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=optim.weight_decay, fused=True)
    try:
        return create_optimizer_v2(
            groups, optim.optimizer, lr=optim.lr, weight_decay=optim.weight_decay, momentum=_MOMENTUM
        )
    except (ValueError, TypeError, AssertionError, RuntimeError, NotImplementedError) as error:
        raise TrainError(f"--optimizer {optim.optimizer} cannot be used: {first_line(error)}") from error


def create_schedule(
    optimizer: torch.optim.Optimizer, optim: OptimConfig, epochs: int, length: int
) -> LRScheduler:
    """The schedule of the learning rates over `epochs` of `length` steps each."""
    steps = epochs * length
    warm = None if optim.warmup_epochs is None else min(round(optim.warmup_epochs * length), steps - 1)
    if optim.schedule == "one_cycle":
        share = _WARM_UP if warm is None else warm / steps
        return OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=steps,
            # OneCycleLR divides by zero if the warm-up is exactly one step.
            pct_start=share + 1e-6 * (round(steps * share, 9) == 1),
            cycle_momentum=False,
        )
    if not warm:
        return CosineAnnealingLR(optimizer, T_max=steps)
    return SequentialLR(
        optimizer,
        [
            LinearLR(optimizer, start_factor=1 / (warm + 1), total_iters=warm),
            CosineAnnealingLR(optimizer, T_max=steps - warm),
        ],
        milestones=[warm],
    )
