"""A backbone with a GGAM head on top."""

from __future__ import annotations

from torch import Tensor, nn

from ggam_fast import GGAMHead, GGAMOutput
from ggam_fast.training.backbones import Backbone
from ggam_fast.training.config import HeadConfig


class GGAMClassifier(nn.Module):
    """Images (N, 3, size, size) to logits (N, K); with a target, to the head's `GGAMOutput`."""

    def __init__(self, backbone: Backbone, head: GGAMHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor, target: Tensor | None = None) -> Tensor | GGAMOutput:
        return self.head(self.backbone(images), target)


def create_head(backbone: Backbone, num_classes: int, options: HeadConfig) -> GGAMHead:
    """The GGAM head that fits the maps of `backbone`."""
    return GGAMHead(
        backbone.num_features,
        num_classes,
        feat_size=backbone.feat_size if options.pool_type == "flatten" else None,
        **options.keywords(),
    )
