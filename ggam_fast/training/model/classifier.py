"""A backbone with a GGAM head on top, and the loss of one of its training steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ggam_fast import GGAMHead, GGAMLoss, GGAMOutput
from ggam_fast.functional import fused_ggam_loss
from ggam_fast.training.config.options import HeadConfig
from ggam_fast.training.data.mixing import hard
from ggam_fast.training.model.backbones import Backbone
from ggam_fast.training.model.cut import LastLayers
from ggam_fast.training.system.devices import autocast


class GGAMClassifier(nn.Module):
    """Maps images (N, 3, size, size) to logits (N, K) or, if a target is given, to `GGAMOutput`."""

    def __init__(self, backbone: Backbone, head: GGAMHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor, target: Tensor | None = None) -> Tensor | GGAMOutput:
        return self.head(self.backbone(images), target)


class LastClassifier(nn.Module):
    """The last layers of a backbone with a head: from what enters them to logits (N, K) or `GGAMOutput`."""

    def __init__(self, backbone: LastLayers, head: GGAMHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, maps: Tensor, target: Tensor | None = None) -> Tensor | GGAMOutput:
        return self.head(self.backbone(maps), target)


Trained = GGAMHead | LastClassifier | GGAMClassifier
"""What a run trains. A head takes feature maps, and a whole classifier takes images."""


def head_and_features(trained: Trained, inputs: Tensor) -> tuple[GGAMHead, Tensor]:
    """The head of `trained` and the features that reach it."""
    if isinstance(trained, GGAMHead):
        return trained, inputs
    return trained.head, trained.backbone(inputs)


class GuidedLoss(nn.Module):
    """The loss of a batch, and (loss, guidance loss, accuracy) without a graph.

    If the head guides positions, the position loss is a fourth number.

    Inputs are those of the trained module, maps or images. `class_weights` (K,) weigh the cross entropy of
    each class, as in `torch.nn.CrossEntropyLoss`. The fused loss is computed in a module's forward,
    because torch.compile and DistributedDataParallel wrap modules. DistributedDataParallel averages only
    gradients of what its own forward computes.
    """

    def __init__(
        self,
        trained: Trained,
        guidance_weight: float,
        label_smoothing: float,
        device: torch.device,
        dtype: torch.dtype,
        class_weights: Tensor | None = None,
        position_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.trained = trained
        self._weights: dict[str, Any] = {
            "guidance_weight": guidance_weight,
            "label_smoothing": label_smoothing,
        }
        if guides_positions(trained):
            self._weights["position_weight"] = position_weight
        # The fused loss knows no weights of classes.
        self._weighted = None
        if class_weights is not None:
            self._weighted = GGAMLoss(**self._weights, weight=class_weights).to(device)
        self._device = device
        self._dtype = dtype

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(self._device, self._dtype):
            head, features = head_and_features(self.trained, inputs)
            if self._weighted is None:
                loss, out = fused_ggam_loss(head, features, targets, **self._weights)
            else:
                out = head(features, targets)
                loss = self._weighted(out, targets)
        accuracy = (out.logits.argmax(1) == hard(targets)).float().mean()
        numbers = [loss.detach(), out.guidance_loss.detach(), accuracy]
        if out.position_loss is not None:
            numbers.append(out.position_loss.detach())
        return loss, torch.stack(numbers)


def guides_positions(trained: Trained) -> bool:
    """Whether the head guides positions."""
    head = trained if isinstance(trained, GGAMHead) else trained.head
    return head.position_guidance != "none"


def create_head(backbone: Backbone, num_classes: int, options: HeadConfig) -> GGAMHead:
    """The GGAM head that fits the maps of `backbone`."""
    return GGAMHead(
        backbone.num_features,
        num_classes,
        feat_size=backbone.feat_size if options.pool_type == "flatten" else None,
        **options.keywords(),
    )
