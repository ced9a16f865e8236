"""Controls: T guided by maps that know less than the class's own map does.

If a control does as well as guidance by positions, the class activation map is not the reason.

    mean_activation   q = relu(mean_c A) / sum, which knows no class
    other_image       q of the class map of another image of the batch
    gaussian          q = a Gaussian around the centre, which knows no image
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ggam_fast.functional import channel_sum, position_loss
from ggam_fast.training.data.mixing import hard
from ggam_fast.training.measure.localization import centred
from ggam_fast.training.model.classifier import Trained, head_and_features
from ggam_fast.training.system.devices import autocast


class ControlLoss(nn.Module):
    """Cross entropy + weight * KL(q, T) with the q of a control, in place of `GuidedLoss`."""

    def __init__(
        self, trained: Trained, control: str, weight: float, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.trained = trained
        self._control = control
        self._weight = weight
        self._device = device
        self._dtype = dtype

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(self._device, self._dtype):
            head, features = head_and_features(self.trained, inputs)
            out = head(features, targets)
            q = control_map(self._control, features.detach(), out.cam_weights)
            positions = position_loss(out.spatial_attention, q)
            loss = cross_entropy(out.logits, targets) + self._weight * positions
        accuracy = (out.logits.argmax(1) == hard(targets)).float().mean()
        return loss, torch.stack([loss, positions, accuracy]).detach()


def control_map(control: str, features: Tensor, cam_weights: Tensor) -> Tensor:
    """A map (N, H, W), not negative, from A (N, C, H, W) and v / L (N, C)."""
    height, width = features.shape[2:]
    if control == "gaussian":
        return centred(len(features), (height, width)).to(features.device)
    if control == "mean_activation":
        return features.float().mean(1).relu()
    return channel_sum(features, cam_weights).float().relu().roll(1, 0)
