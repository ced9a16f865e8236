"""Mixup and CutMix: batches of mixed inputs, whose targets are class probabilities."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import v2  # type: ignore[import-untyped]


class Mix:
    """torchvision's MixUp (Zhang et al., arXiv 1710.09412) and CutMix (Yun et al., arXiv 1905.04899).

    The result maps inputs (n, ...) and labels (n,) to mixed inputs and probabilities (n, num_classes). If
    both are on, each batch gets one of them at random. If neither is on, the batch does not change.
    """

    def __init__(self, num_classes: int, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        self._mixers = []
        if mixup:
            self._mixers.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
        if cutmix:
            self._mixers.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))

    def __call__(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if not self._mixers:
            return inputs, labels
        index = int(torch.randint(len(self._mixers), ())) if len(self._mixers) > 1 else 0
        channels_last = inputs.is_contiguous(memory_format=torch.channels_last)
        # torchvision takes inputs of four dimensions, and tokens have three.
        shaped = inputs.unsqueeze(1) if inputs.ndim == 3 else inputs
        mixed, targets = self._mixers[index](shaped, labels)
        mixed = mixed.view_as(inputs)
        return mixed.contiguous(memory_format=torch.channels_last) if channels_last else mixed, targets


def hard(targets: Tensor) -> Tensor:
    """The most probable class of each target, (n,). Targets are labels (n,) or probabilities (n, K)."""
    return targets.argmax(1) if targets.is_floating_point() else targets
