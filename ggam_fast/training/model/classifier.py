"""A backbone with a GGAM head on top, and the loss of one of its training steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ggam_fast import GGAMHead, GGAMOutput
from ggam_fast.functional import fused_ggam_loss
from ggam_fast.training.config.options import HeadConfig
from ggam_fast.training.data.mixing import hard
from ggam_fast.training.model.backbones import Backbone
from ggam_fast.training.system.devices import autocast


class GGAMClassifier(nn.Module):
    """Maps images (N, 3, size, size) to logits (N, K) or, if a target is given, to `GGAMOutput`."""

    def __init__(self, backbone: Backbone, head: GGAMHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor, target: Tensor | None = None) -> Tensor | GGAMOutput:
        return self.head(self.backbone(images), target)


class GuidedLoss(nn.Module):
    """The loss of a batch, and (loss, guidance loss, accuracy) without a graph.

    If the head guides positions, the position loss is a fourth number.

    Inputs are maps for a head and images for a classifier. The fused loss is computed in a module's forward,
    because torch.compile and DistributedDataParallel wrap modules. DistributedDataParallel averages only
    gradients of what its own forward computes.
    """

    def __init__(
        self,
        trained: GGAMHead | GGAMClassifier,
        guidance_weight: float,
        label_smoothing: float,
        device: torch.device,
        dtype: torch.dtype,
        position_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.trained = trained
        self._weights = {"guidance_weight": guidance_weight, "label_smoothing": label_smoothing}
        if guides_positions(trained):
            self._weights["position_weight"] = position_weight
        self._device = device
        self._dtype = dtype

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        trained = self.trained
        with autocast(self._device, self._dtype):
            if isinstance(trained, GGAMClassifier):
                head, features = trained.head, trained.backbone(inputs)
            else:
                head, features = trained, inputs
            loss, out = fused_ggam_loss(head, features, targets, **self._weights)
        accuracy = (out.logits.argmax(1) == hard(targets)).float().mean()
        numbers = [loss.detach(), out.guidance_loss, accuracy]
        if out.position_loss is not None:
            numbers.append(out.position_loss)
        return loss, torch.stack(numbers)


def guides_positions(trained: nn.Module) -> bool:
    """Whether the head, or the head of the classifier, guides positions."""
    head = trained.head if isinstance(trained, GGAMClassifier) else trained
    return isinstance(head, GGAMHead) and head.position_guidance != "none"


def create_head(backbone: Backbone, num_classes: int, options: HeadConfig) -> GGAMHead:
    """The GGAM head that fits the maps of `backbone`."""
    return GGAMHead(
        backbone.num_features,
        num_classes,
        feat_size=backbone.feat_size if options.pool_type == "flatten" else None,
        **options.keywords(),
    )
